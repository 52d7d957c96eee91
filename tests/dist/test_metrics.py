"""What a real run on two ranks tells: counters that agree with its records, a straggler, and one readback a step."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain import readback, trainer
from moetrain.config import parse_config
from moetrain.families import experts_modules
from moetrain.metrics import Expectation, StepRecord, endpoint, read_records
from tests.ranks import run_ranks
from tests.runs import records, tiny_run, write_text

STEPS = 6
SLEEP = 0.03
"""Seconds that rank 1 loses in each of its two layers."""
FLOPS = 1000.0


class Scalars(TorchDispatchMode):
    """Counts the fractions that are read off tensors one by one: each makes the host wait for a GPU. Counts of labels
    are read off batches, which lie on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def watched_run(rank: int, world_size: int, raw: dict[str, Any]) -> dict[str, Any]:
    """Train, rank 1 slowly; the readbacks of each step, and what Prometheus would have seen before the end."""
    seen: dict[str, Any] = {"readbacks": [], "scalars": [], "seconds": []}
    copies = [0]
    step, copy, finish = trainer.Run.step, readback.copy_to_host, trainer.Metrics.finish
    publish = trainer.Metrics.step

    def counting_copy(values: Any) -> Any:
        copies[0] += 1
        return copy(values)

    def watched_step(run: trainer.Run, number: int) -> bool:
        if number == 1:
            for _, experts in experts_modules(run.model):
                if rank == 1:
                    experts.register_forward_pre_hook(lambda *_: time.sleep(SLEEP))
        copies[0] = 0
        with Scalars() as scalars:
            stop = step(run, number)
        seen["readbacks"].append(copies[0])
        seen["scalars"].append(scalars.count)
        return stop

    def watched_publish(metrics: Any, record: StepRecord) -> None:
        seen["seconds"].append(record.step_seconds)
        publish(metrics, record)

    def watched_finish(metrics: Any) -> None:
        finish(metrics)
        time.sleep(endpoint.PAGE_SECONDS)
        url = f"http://127.0.0.1:{metrics.endpoint.port}/metrics"
        families = text_string_to_metric_families(urllib.request.urlopen(url).read().decode())
        samples = [sample for family in families for sample in family.samples]
        seen["samples"] = {(s.name.removeprefix("moetrain_"), *sorted(s.labels.items())): s.value for s in samples}
        if rank == 0:  # which removes the file when it closes, while the other one may still be here
            (file,) = Path(raw["output_dir"], "discovery").iterdir()
            seen["targets"] = json.loads(file.read_text())
        seen["port"] = metrics.endpoint.port

    readback.copy_to_host = counting_copy
    setattr(trainer.Run, "step", watched_step)  # noqa: B010 - for the type checker
    setattr(trainer.Metrics, "step", watched_publish)  # noqa: B010
    setattr(trainer.Metrics, "finish", watched_finish)  # noqa: B010
    trainer.train(parse_config(raw), lambda *_: Expectation(500.0, FLOPS, 2e12))
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    raw = tiny_run(
        folder,
        parallel={"ep_size": 2},
        train={"steps": STEPS, "eval_every": 4, "grad_accum": 2},
        checkpoint={"every": 3, "export": False},
        metrics={"prometheus_port": 0, "expert_matrix": True, "run_name": "slow one"},
    )
    return run_ranks(watched_run, 2, raw)


def test_one_readback_a_step(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["readbacks"] == [1] * STEPS
        assert seen["scalars"] == [0] * STEPS


def test_counters_agree_with_the_records(folder: Path, ranks: list[dict[str, Any]]) -> None:
    steps = records(folder)
    samples = [seen["samples"] for seen in ranks]
    assert sum(s["label_tokens_total",] for s in samples) == sum(step["tokens"] for step in steps.values())
    assert sum(s["tokens_total",] for s in samples) == sum(step["seen_tokens"] for step in steps.values())
    assert samples[1]["tokens_total",] == STEPS * 2 * 2 * 32, "passes, rows and tokens of a row"
    assert samples[1]["model_flops_total",] == FLOPS * samples[1]["tokens_total",]
    main = samples[0]
    assert main["loss",] == steps[STEPS]["loss"] and main["gradient_norm",] == steps[STEPS]["grad_norm"]
    assert main["validation_loss",] == records(folder, "eval")[STEPS]["loss"]
    assert main["productive_seconds_total",] == pytest.approx(sum(step["step_seconds"] for step in steps.values()))
    assert (main["checkpoint_saves_total",], main["last_checkpoint_step",]) == (2, 6)
    assert main["phase", ("phase", "done")] == 1 and main["expected_tokens_per_second_per_gpu",] == 500
    assert all(s["step",] == STEPS and s["gpu_peak_flops",] == 2e12 for s in samples)


def test_expert_load_agrees_with_the_matrix(folder: Path, ranks: list[dict[str, Any]]) -> None:
    samples = ranks[0]["samples"]
    top_k, experts, tokens = 2, 8, sum(seen["samples"]["tokens_total",] for seen in ranks)
    for layer in ("0", "1"):
        counts = [samples["expert_tokens_total", ("expert", str(e)), ("layer", layer)] for e in range(experts)]
        assert sum(counts) == top_k * tokens
    # the steps' own loads: their mean over steps of max/mean bounds that of the sum
    layers = [step["layers"] for step in records(folder).values()]
    for number, layer in enumerate(("0", "1")):
        counts = [samples["expert_tokens_total", ("expert", str(e)), ("layer", layer)] for e in range(experts)]
        ratio = max(counts) * experts / sum(counts)
        of_steps = [columns["max_over_mean"][number] for columns in layers]
        assert 1 <= ratio <= sum(of_steps) / len(of_steps) + 1e-3
        assert samples["expert_load_max_over_mean", ("layer", layer)] == pytest.approx(of_steps[-1], abs=1e-4)
        assert layers[-1]["min_over_mean"][number] <= 1 <= layers[-1]["max_over_mean"][number]


@pytest.mark.usefixtures("ranks")
def test_phases_add_up_to_the_time_of_the_rank(folder: Path) -> None:
    found = read_records(folder / "out" / "metrics.jsonl")
    steps = [record for record in found if record["kind"] == "step"]
    for before, after in itertools.pairwise(steps):
        assert sum(after["phase_seconds"].values()) == pytest.approx(after["time"] - before["time"], abs=0.01)
    assert steps[3]["phase_seconds"]["checkpoint"] > 0 == steps[2]["phase_seconds"]["checkpoint"]
    assert steps[4]["phase_seconds"]["evaluate"] > 0 == steps[3]["phase_seconds"]["evaluate"]


def test_a_straggler_shows_in_own_computation_and_not_in_the_step_time(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    lost = 2 * 2 * SLEEP  # layers and passes
    gaps = []
    for step in list(records(folder).values())[1:]:
        seconds = {entry["rank"]: entry["seconds"] for entry in step["slow_ranks"]}
        gaps.append(seconds[1] - seconds[0])
    assert statistics.median(gaps) > 0.7 * lost, gaps  # a busy machine may slow the other one down in a step
    fast, slow = (seen["samples"] for seen in ranks)
    waited = fast["phase_seconds_total", ("phase", "collective_wait")]
    assert waited > 0.7 * lost * STEPS and waited > slow["phase_seconds_total", ("phase", "collective_wait")]
    of_fast, of_slow = (seen["seconds"] for seen in ranks)
    longer = [b - a for a, b in zip(of_fast, of_slow, strict=True)]
    assert abs(statistics.median(longer)) < 0.5 * lost, longer
    assert fast["step_duration_seconds_sum",] == pytest.approx(sum(of_fast))
    assert slow["step_duration_seconds_sum",] == pytest.approx(sum(of_slow))


def test_a_straggler_shows_without_expert_parallelism(tmp_path: Path) -> None:
    """FSDP's gathers and reductions are where the other rank waits for it."""
    write_text(tmp_path)
    raw = tiny_run(
        tmp_path,
        parallel={"ep_size": 1},
        train={"steps": STEPS, "eval_every": STEPS, "grad_accum": 2},
        checkpoint={"export": False},
        metrics={"prometheus_port": 0},
    )
    ranks = run_ranks(watched_run, 2, raw)
    test_a_straggler_shows_in_own_computation_and_not_in_the_step_time(tmp_path, ranks)


def ends_without_numbers(rank: int, world_size: int, raw: dict[str, Any]) -> list[bool]:
    """Whether this rank waits for monitoring when a step is not finite; the second alone is watched."""
    read, waits = trainer.Readback.read, []

    def no_number(self: Any, *args: Any) -> Any:
        return replace(read(self, *args), loss=math.nan)

    setattr(trainer.Readback, "read", no_number)  # noqa: B010 - for the type checker
    setattr(trainer.Metrics, "watched", property(lambda self: rank == 1))  # noqa: B010
    setattr(trainer.Metrics, "nonfinite", lambda self, step, loss, norm, watched: waits.append(watched))  # noqa: B010
    with pytest.raises(Exception, match="not finite|nan"):
        trainer.train(parse_config(raw))
    return waits


def test_all_ranks_wait_where_one_is_watched(tmp_path: Path) -> None:
    write_text(tmp_path)
    raw = tiny_run(tmp_path, parallel={"ep_size": 2}, checkpoint={"export": False}, metrics={"prometheus_port": 0})
    assert run_ranks(ends_without_numbers, 2, raw) == [[True], [True]]


def test_all_ranks_are_found_until_the_end(folder: Path, ranks: list[dict[str, Any]]) -> None:
    targets = ranks[0]["targets"]
    assert [group["targets"] for group in targets] == [[f"127.0.0.1:{seen['port']}"] for seen in ranks]
    assert [(group["labels"]["run"], group["labels"]["rank"]) for group in targets] == [
        ("slow one", "0"),
        ("slow one", "1"),
    ]
    assert not (folder / "out" / "discovery").exists()


def test_the_file_tells_what_happened(folder: Path, ranks: list[dict[str, Any]]) -> None:
    found = read_records(folder / "out" / "metrics.jsonl")
    run = found[0]
    assert run["kind"] == "run" and run["run"] == "slow one" and run["world_size"] == 2
    assert run["layers"] == ["0", "1"] and run["expected_tokens_per_second_per_gpu"] == 500.0
    assert (run["model"], run["model_type"], run["ep_size"]) == ("start", "qwen3_moe", 2)
    assert str(folder) not in json.dumps(run | {"data": None}), "no paths"
    events = [(record["event"], record["step"]) for record in found if record["kind"] == "event"]
    assert events == [("checkpoint", 3), ("checkpoint", 6), ("done", 6)]
