"""Time of the optimizer's step and of the gradient norm, and their share of the rate of a device copy.

    python -m moetrain.bench.optimizer [--sizes 201m 3.8b] [--states bf16_stochastic ...]

Parameters are bf16, but for fp32 states. `step` is what the GPU takes for a step that the host issues, `step, graph`
for one in a CUDA graph, `step, host` what the host takes to issue it. Rates count each byte that must move once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import nn

from moetrain.bench.kernels import eager_milliseconds, graph_milliseconds
from moetrain.bench.rows import ON_CPU, Row, format_table
from moetrain.optim import AdamW, clip_factor, grad_norm
from moetrain.optim.adamw import States

_LAYER = [
    (16, 1536, 2048),
    (16, 2048, 768),
    *[(512, 2048)] * 2,
    *[(64, 2048)] * 2,
    (16, 2048),
    *[(16,)] * 2,
    *[(256,)] * 2,
]
SIZES: dict[str, list[tuple[int, ...]]] = {
    "small": [(3, 96, 64), (2, 48, 96), (1000,), (7,)],
    "201m": [(1024, 2048)] * 96,
    "3.8b": [*_LAYER * 48, *[(18992, 2048)] * 2, (256,)],
}
"""Shapes of the parameters on one rank; `3.8b` is Qwen3-30B-A3B on 8 ranks, `small` for trying this on a CPU."""


def bench_optimizer(sizes: Sequence[str] | None = None, states: Sequence[States] = get_args(States)) -> list[Row]:
    """Measure and print a table; on the current CUDA device, or for what it is worth on the CPU.

    Args:
        sizes: keys of SIZES, by default the two large ones on a GPU.
    """
    on_gpu = torch.cuda.is_available()
    if unknown := sorted(set(sizes or ()) - SIZES.keys()):
        raise ValueError(f"unknown size {unknown[0]!r}; valid: {', '.join(SIZES)}")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    sizes = sizes or (("201m", "3.8b") if on_gpu else ("small",))
    limit = _copy_rate(2**31 if on_gpu else 2**24, device)
    rows = [Row("copy", "device copy, read + written", 0.0, limit, "GB/s", 1.0)]
    for size in sizes:
        for kind in states:
            rows += _bench_states(size, kind, device, limit)
            if on_gpu:
                torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}")
    print(format_table(rows))
    if not on_gpu:
        print(ON_CPU)
    return rows


def _bench_states(size: str, states: States, device: torch.device, limit: float) -> list[Row]:
    dtype = torch.float32 if states == "fp32" else torch.bfloat16
    parameters = [
        nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02)) for shape in SIZES[size]
    ]
    optimizer = AdamW([{"params": parameters, "weight_decay": 0.1}], 1e-6, (0.9, 0.95), 1e-8, states)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3)

    def norm() -> torch.Tensor:
        return grad_norm(parameters)

    factor = clip_factor(norm(), 1.0)

    def step() -> None:
        optimizer.step(grad_factor=factor)

    grads = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    moved = grads + 2 * sum(_state_bytes(parameter, optimizer) for parameter in parameters)
    moved -= grads if states == "master" else 0  # the parameter is written from its master, not read
    timings = {
        "step": (_milliseconds(step, device), moved),
        "step, host": (_host_milliseconds(step, device), 0),
        "norm": (_milliseconds(norm, device), grads),
    }
    if device.type == "cuda":
        timings["step, graph"] = graph_milliseconds(step, calls=2), moved
        timings["norm, graph"] = graph_milliseconds(norm, calls=2), grads
    return [
        Row(size, f"{part}, {states}", ms, moved / ms / 1e6, "GB/s", moved / ms / 1e6 / limit)
        for part, (ms, moved) in timings.items()
    ]


def _state_bytes(parameter: nn.Parameter, optimizer: AdamW) -> int:
    """Of a parameter and what is kept for it."""
    tensors = [parameter, *optimizer.state[parameter].values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _copy_rate(num_bytes: int, device: torch.device) -> float:
    """GB/s read and written."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _milliseconds(lambda: target.copy_(source), device) / 1e6


def _milliseconds(fn: Callable[[], Any], device: torch.device) -> float:
    return eager_milliseconds(fn) if device.type == "cuda" else _host_milliseconds(fn, device)


def _host_milliseconds(fn: Callable[[], Any], device: torch.device, calls: int = 5) -> float:
    """Best time until `fn` returns, with nothing before it on the device."""
    times = []
    for _ in range(calls):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES))
    parser.add_argument("--states", nargs="+", choices=get_args(States), default=get_args(States))
    args = parser.parse_args()
    bench_optimizer(args.sizes, args.states)


if __name__ == "__main__":
    main()
