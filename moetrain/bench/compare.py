"""`moetrain bench MODEL`: the step of moetrain, and of native Transformers beside it, each in processes of its own."""

from __future__ import annotations

import datetime
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from moetrain import doctor, mesh
from moetrain.bench import output
from moetrain.bench.flops import flop_per_token, peak_tflops
from moetrain.bench.isolate import Failure, Ranks
from moetrain.bench.profile import profile_steps
from moetrain.bench.rows import command_line
from moetrain.bench.shapes import count_experts
from moetrain.bench.step import Timings, random_batches, time_steps
from moetrain.bench.systems import Case, build_subject, systems_of
from moetrain.facts import read_memory
from moetrain.moe.layer import ep_implementation
from moetrain.prepare import keep_quiet

GIB = 2**30
PROFILED_STEPS = 2


@dataclass(frozen=True)
class Measurement:
    """One system at one case, the same on every rank. Times are means over steps and ranks."""

    status: str
    """How forward and backward ran: in a CUDA graph, or eager and why."""
    tps_per_gpu: float
    """Tokens a second of one rank, by the time of forward, loss and backward."""
    tps_per_gpu_with_optimizer: float
    forward_backward_ms: float
    forward_ms: float | None
    """None where forward and backward are one graph."""
    backward_ms: float | None
    optimizer_ms: float
    host_ms: float
    """Until the host had issued forward and backward."""
    step_ms: list[float]
    """Forward and backward of each timed step, on rank 0."""
    redone_steps: int
    """Runs again of steps whose rows did not fit, most of any rank."""
    peak_gib: float
    """Peak allocated of the fullest rank since its model was built; the resident set on a CPU."""
    device_gib: float | None
    """Memory that the fullest GPU has given away at the end: graphs, communication buffers and the allocator's
    reserves included."""
    flop_per_token: float
    tflops_per_gpu: float
    limit_tflops: float | None
    """What a large matrix product reaches."""
    share_of_limit: float | None
    load_max_over_mean: float | None
    idle_experts: int | None
    loss: float
    """Of the last step, mean over ranks."""
    environment: dict[str, Any]
    profile: dict[str, Any] | None = None
    """Of two further steps on rank 0."""


def check_case(case: Case, world: int) -> None:
    """Raises ValueError, with the remedy, where a case cannot be measured on `world` ranks."""
    mesh.layout(world, case.ep_size, dispatch=ep_implementation(case.dispatch))
    mesh.check_ep_divides(count_experts(case.model), case.ep_size, world)
    if case.warmup < 3:
        raise ValueError(f"--warmup {case.warmup} is too short: the third step is captured; give 3 or more")
    if case.steps < 1:
        raise ValueError(f"--steps {case.steps} measures nothing; give 1 or more")
    case.config()


def largest_ep_size(model: str, world: int) -> int:
    """The most of `world` ranks that can share a layer's experts evenly."""
    return math.gcd(world, count_experts(model))


def bench_model(case: Case, out: Path, words: Sequence[str], against: bool = False, profile: bool = False) -> int:
    """Measure the systems in turn, on the ranks that torchrun or the launcher has started; rank 0 prints and writes.

    Args:
        out: directory for JSON, plot and trace.
        words: the arguments of the command line, for the record.
        against: native Transformers too.

    Returns:
        Exit code: 0 if any system could be measured.
    """
    ranks = Ranks()
    check_case(case, ranks.world)
    stem = out / output.stem(case, ranks.world)
    results: dict[str, Measurement | Failure] = {}
    for system in systems_of(case, ranks.world, against):
        if ranks.rank == 0:
            print(f"measuring {system} ...", flush=True)
        trace = Path(f"{stem}.trace.json.gz") if profile and system == "moetrain" else None
        results[system] = ranks.run(system.replace(" ", "-"), measure, system, case, trace)
    measured = {name: result for name, result in results.items() if isinstance(result, Measurement)}
    if ranks.rank == 0:
        report = {
            "case": asdict(case),
            "world": ranks.world,
            "command": command_line(words),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "systems": {name: asdict(result) for name, result in results.items()},
            "ratio": output.ratio(measured),
        }
        output.show(case, ranks.world, results)
        output.write(stem, report, case, ranks.world, measured)
    return 0 if measured else 1


def measure(system: str, case: Case, trace: Path | None = None) -> Measurement:
    """Build one system in this process and time its steps; every rank calls it.

    Args:
        trace: file for a trace of two further steps, written by rank 0; None profiles nothing.
    """
    keep_quiet()
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")
    device, config = mesh.device(), case.config()
    limit, flop = peak_tflops(device), flop_per_token(config, case.seq_len)
    subject = build_subject(system, case)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    number = case.warmup + case.steps + (PROFILED_STEPS if trace else 0)
    batches = random_batches(config.get_text_config().vocab_size, case.batch, case.seq_len, number)
    timings = time_steps(subject, batches[: case.warmup + case.steps], case.warmup)
    peak, taken = read_memory().peak / GIB, _taken_gib(device)
    seconds = _means(timings, device)
    tokens, passes = case.batch * case.seq_len, seconds["forward_backward"]
    tflops = flop * tokens / passes / 1e12
    return Measurement(
        status=subject.status(),
        tps_per_gpu=tokens / passes,
        tps_per_gpu_with_optimizer=tokens / (passes + seconds["optimizer"]),
        forward_backward_ms=1e3 * passes,
        forward_ms=1e3 * seconds["forward"] if timings.forward else None,
        backward_ms=1e3 * (passes - seconds["forward"]) if timings.forward else None,
        optimizer_ms=1e3 * seconds["optimizer"],
        host_ms=1e3 * seconds["host"],
        step_ms=[1e3 * value for value in timings.forward_backward],
        redone_steps=int(_reduce(timings.redone, device, most=True)),
        peak_gib=_reduce(peak, device, most=True),
        device_gib=None if taken is None else _reduce(taken, device, most=True),
        flop_per_token=flop,
        tflops_per_gpu=tflops,
        limit_tflops=limit,
        share_of_limit=tflops / limit if limit else None,
        load_max_over_mean=timings.load.max_over_mean if timings.load else None,
        idle_experts=timings.load.idle_experts if timings.load else None,
        loss=_reduce(timings.loss, device),
        environment={
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "versions": doctor.versions(),
        },
        profile=profile_steps(subject, batches[-PROFILED_STEPS:], trace) if trace else None,
    )


def _means(timings: Timings, device: torch.device) -> dict[str, float]:
    """Seconds of each part, mean over steps and ranks; 0 for a part that was not timed."""
    parts = ("forward_backward", "forward", "host", "optimizer")
    return {part: _reduce(fmean(getattr(timings, part) or [0.0]), device) for part in parts}


def _reduce(value: float, device: torch.device, most: bool = False) -> float:
    """Mean over ranks, or the maximum."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX if most else dist.ReduceOp.SUM)
    return tensor.item() / (1 if most else dist.get_world_size())


def _taken_gib(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB
