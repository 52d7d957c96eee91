"""Ranks' work for the test of waiting inside a captured step: `torchrun -m tests.gpu.metrics_cases`."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from moetrain.graph import Passes
from moetrain.metrics.device import DeviceTimes
from moetrain.moe.dispatch.static import forget_exchanges
from tests.gpu import graph_cases

SLEEP_CYCLES = 4_000_000
"""A few milliseconds, by which rank 1 is late in each layer."""
STEPS = 4


def slept_seconds() -> float:
    """What `SLEEP_CYCLES` take on this GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    torch.cuda._sleep(SLEEP_CYCLES)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def leave_as_is(model: PreTrainedModel) -> None:
    """Instead of compiling its layers."""


def waited(rank: int) -> tuple[float, str]:
    """Seconds that this rank waited in a captured step of a model whose rank 1 is late in each of three layers."""
    setattr(graph_cases, "compile_layers", leave_as_is)  # noqa: B010 - a compiled layer would not run the hook
    model = graph_cases.build("qwen3_moe", "nvlink")
    for layer in model.get_decoder().layers:
        if rank == 1:
            layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(SLEEP_CYCLES))
    times, passes = DeviceTimes(torch.device("cuda", rank)), Passes(model, "on")
    with times.measured():
        while not passes._graphs:
            passes(graph_cases.batch(rank), 512.0)
            passes.overflowed()
        torch.cuda.synchronize()
        before = int(times.counter)
        for _ in range(STEPS):
            passes(graph_cases.batch(rank), 512.0)
            assert not passes.overflowed()
        nanoseconds = int(times.counter) - before
    status = passes.status
    passes.close()
    return nanoseconds / 1e9 / STEPS, status


if __name__ == "__main__":
    rank, world = graph_cases.join_nccl()
    mine = (*waited(rank), slept_seconds())
    everyone: list[tuple[float, str, float] | None] = [None] * world
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        print("RESULT", json.dumps(everyone), flush=True)
    dist.barrier()
    forget_exchanges()
    dist.destroy_process_group()
