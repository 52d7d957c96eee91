"""Where the time of a step goes: its GPU kernels by part, and the communication that nothing hides.

From a trace of torch's profiler. Times of kernels that run at the same time add up in the table of parts, but not in
what the GPU was busy with.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

from moetrain import kernels, mesh
from moetrain.bench.step import Subject, run_passes

COMMUNICATION = "communication"
PARTS = {
    COMMUNICATION: r"nccl|symmetric_memory|barrier_kernel|deep_?ep|nvshmem",
    "attention": r"flash|fmha|sdpa|attention|attn",
    "grouped GEMM": r"GroupProblemShape|grouped",
    "loss": r"cross_entropy|nll_loss|log_softmax|logsoftmax",
    "Mamba": r"mamba|chunk_scan|chunk_state|chunk_cumsum|state_passing|causal_conv1d|selective_scan|bmm_chunk",
    "optimizer": r"multi_tensor_apply|adam",
    "dense GEMM": r"gemm|gemv|nvjet|cutlass|cublas|splitk|wgmma|triton_tem_fused_(add)?mm",
    "routing and permutation": r"top_?k|sort|gather|scatter|index|histogram|cumsum|devicescan",
    "norms and rotary": r"norm|rope|rotary|rsqrt",
    "copies": r"memcpy|memset|copy|catarray|chunk_cat|fill",
    "elementwise and sums": r"elementwise|reduce|softmax|triton_(poi|red|per)|vectorized",
    "other": r"",
}
"""What a kernel's name contains, the first that fits; case does not count."""
OURS = {
    "nvlink": COMMUNICATION,
    "attention": "attention",
    "grouped": "grouped GEMM",
    "mamba2": "Mamba",
    "adamw": "optimizer",
    "tensor_list": "optimizer",
    "routing": "routing and permutation",
    "permutation": "routing and permutation",
    "gated": "expert activation and bias",
    "bias": "expert activation and bias",
}
"""How the names of the files in `moetrain.kernels` begin, and the part that their kernels belong to."""

PASSES, OPTIMIZER = "moetrain: forward and backward", "moetrain: optimizer"
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = re.compile(r"^cu(da)?(LaunchKernel|GraphLaunch|Memcpy|Memset)")

Interval = tuple[float, float]


class Kernel(NamedTuple):
    """One piece of GPU work, in microseconds."""

    name: str
    begin: float
    end: float


def profile_steps(subject: Subject, batches: Sequence[dict[str, Tensor]], trace: Path) -> dict[str, Any] | None:
    """Run a step on each batch, on all ranks, and take rank 0's apart; None on the others.

    Args:
        trace: file for the trace, for chrome://tracing or ui.perfetto.dev; compressed if its name ends in `.gz`.
    """
    first = mesh.rank() == 0
    on_gpu = subject.model.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) if first else contextlib.nullcontext() as profiler:
        for batch in batches:
            # a name around the wait as well, so that a kernel can be told by its time
            with record_function(PASSES):
                run_passes(subject, batch)
                _wait(on_gpu)
            with record_function(OPTIMIZER):
                subject.update()
                _wait(on_gpu)
    if profiler is None:
        return None
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return summarise(read_trace(trace))


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Events of a trace in Chrome's format."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def summarise(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the steps in a trace, of their forward and backward: milliseconds and kernels of each part, most
    first; the span, and how much of it the GPU was busy, communicated, and communicated only."""
    events = [event for event in events if event.get("ph") == "X"]
    spans = [_interval(event) for event in events if _is_range(event, PASSES)]
    updates = [_interval(event) for event in events if _is_range(event, OPTIMIZER)]
    work = [Kernel(event["name"], *_interval(event)) for event in events if event.get("cat") in _KERNELS]
    inside = [kernel for kernel in work if _within(kernel.begin, spans)]
    launches = [event for event in events if _LAUNCHES.match(event["name"]) and _within(event["ts"], spans)]
    steps = max(len(spans), 1)
    parts: dict[str, dict[str, float]] = {}
    for kernel in inside:
        part = parts.setdefault(part_of(kernel.name), {"ms": 0.0, "kernels": 0.0})
        part["ms"] += (kernel.end - kernel.begin) / 1e3 / steps
        part["kernels"] += 1 / steps
    communication = [kernel[1:] for kernel in inside if part_of(kernel.name) == COMMUNICATION]
    computation = [kernel[1:] for kernel in inside if part_of(kernel.name) != COMMUNICATION]
    busy, computing = length(communication + computation), length(computation)
    return {
        "steps": len(spans),
        "span_ms": sum(end - begin for begin, end in spans) / 1e3 / steps,
        "busy_ms": busy / 1e3 / steps,
        "communication_ms": length(communication) / 1e3 / steps,
        "exposed_communication_ms": (busy - computing) / 1e3 / steps,
        "optimizer_kernel_ms": length([k[1:] for k in work if _within(k.begin, updates)]) / 1e3 / steps,
        "host_launches": len(launches) / steps,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1]["ms"])),
        "slowest_kernels": _slowest(inside, steps),
    }


def part_of(kernel: str) -> str:
    """The part of the step that a kernel belongs to, by its name; for one of ours by the file that it stands in."""
    if kernel == "_sum_partials":
        return "routing and permutation"  # of what has arrived
    if file := _our_kernels().get(kernel):
        return next((part for start, part in OURS.items() if file.startswith(start)), file)
    return next(part for part, pattern in PARTS.items() if re.search(pattern, kernel, re.IGNORECASE))


@functools.cache
def _our_kernels() -> dict[str, str]:
    """Name of each Triton function of `moetrain.kernels`, and of its file."""
    files = Path(kernels.__file__).parent.glob("*.py")
    return {
        name: file.stem
        for file in files
        for name in re.findall(r"^@jit\ndef (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }


def length(intervals: Iterable[Interval]) -> float:
    """How long at least one of the intervals lasts."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def _slowest(work: Iterable[Kernel], steps: int, number: int = 25) -> list[dict[str, Any]]:
    """The kernels that take most, by name."""
    found: dict[str, list[float]] = {}
    for kernel in work:
        found.setdefault(kernel.name, []).append(kernel.end - kernel.begin)
    most = sorted(found.items(), key=lambda item: -sum(item[1]))[:number]
    return [
        {"name": name, "part": part_of(name), "ms": sum(times) / 1e3 / steps, "kernels": len(times) / steps}
        for name, times in most
    ]


def _is_range(event: Mapping[str, Any], name: str) -> bool:
    return event["name"] == name and event.get("cat") == "user_annotation"


def _interval(event: Mapping[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _within(moment: float, spans: Sequence[Interval]) -> bool:
    return any(begin <= moment <= end for begin, end in spans)


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
