"""DeepEP where it is installed, on several GPUs: its interfaces against `alltoall`, eager and in a CUDA graph."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.backends import deep_ep
from moetrain.moe.dispatch import build_dispatcher
from moetrain.moe.dispatch.static import forget_exchanges
from tests.dist.dispatch_cases import expert_function, routing
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
GPUS = torch.cuda.device_count()
RANKS = next((ranks for ranks in (8, 4, 2) if ranks <= GPUS), 0)
EXPERTS, TOP_K, HIDDEN, TOKENS = 64, 8, 2048, 512
SIZES = deep_ep.Sizes(HIDDEN, TOP_K, EXPERTS // max(RANKS, 1), torch.bfloat16)
TOLERANCE = 1e-2
"""Relative difference of bf16 sums: over the ranks' partial sums here, over a token's rows there."""
REASON = deep_ep.missing() or ("needs two GPUs" if RANKS < 2 else "")

# ElasticBuffer compiles its kernels when they are first used
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON or "-"), pytest.mark.timeout(580)]


@pytest.mark.parametrize("interface", ["ElasticBuffer", "Buffer"])
def test_equals_alltoall(interface: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(RANKS))
        patch.setattr(deep_ep, "LINKS", tuple(kind for kind in deep_ep.LINKS if kind.name == interface))
        deep_ep._choose.cache_clear()
        reason = deep_ep.obstacle(RANKS, SIZES)
    deep_ep._choose.cache_clear()
    if reason:
        pytest.skip(reason)
    for found in run_ranks(on_rank, RANKS, interface, backend="nccl", timeout=500.0):
        print(found)
        bad = {case: value for case, value in found.items() if not value < TOLERANCE}
        assert not bad


def test_layer_of_the_benchmark() -> None:
    """It compares outputs and all gradients with Transformers' before it measures."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "moetrain", "bench", "layer", "qwen3-30b-a3b", "--dispatch", "deepep", "--tokens", "1024"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    print(result.stdout)


def on_rank(rank: int, world_size: int, interface: str) -> dict[str, float]:
    """Relative differences from `alltoall`, the largest of output and gradients, by case."""
    faulthandler.enable()
    deep_ep.LINKS = tuple(kind for kind in deep_ep.LINKS if kind.name == interface)
    torch.manual_seed(rank)
    found = {}
    for kind in ("uniform", "skewed", "last_rank", "holes", "empty_rank"):
        tokens = 0 if (kind, rank) == ("empty_rank", 0) else TOKENS - 7 * rank
        found[f"{kind}, ragged"] = difference(case(kind, tokens, rank), None)
    for kind in ("uniform", "skewed", "holes"):
        found[f"{kind}, static"] = difference(case(kind, TOKENS, rank), world_size * TOKENS * TOP_K)
    if deep_ep.why_waits(world_size) is None:
        found["uniform, captured"] = captured(rank, world_size)
    forget_exchanges()
    return found


def case(kind: str, tokens: int, seed: int) -> tuple[Tensor, ...]:
    """Choices, tokens, weights and the output's gradient."""
    ids = routing(kind, tokens, TOP_K, EXPERTS, seed).cuda()
    x, upstream = torch.randn(2, tokens, HIDDEN, device="cuda").bfloat16()
    return ids, x, torch.rand(tokens, TOP_K, device="cuda"), upstream


def difference(tensors: tuple[Tensor, ...], capacity: int | None) -> float:
    ours, wanted = layer("deep_ep", capacity)(*tensors), layer("alltoall", None)(*tensors)
    return max(relative(a, b) for a, b in zip(ours, wanted, strict=True))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9)).item()


def layer(name: str, capacity: int | None) -> Any:
    """A function of one case: output, and the gradients of tokens and weights."""
    dispatcher: Any = build_dispatcher(name, EXPERTS, dist.group.WORLD)
    if capacity is not None:
        dispatcher.capacity = capacity
    first = dist.get_rank() * dispatcher.num_local

    def run(ids: Tensor, tokens: Tensor, weights: Tensor, upstream: Tensor) -> list[Tensor]:
        x, w = tokens.detach().requires_grad_(), weights.detach().requires_grad_()
        dispatched = dispatcher.dispatch(x, ids, w)
        row_R = torch.arange(dispatched.rows_RH.shape[0], device=x.device)
        expert_R = torch.bucketize(row_R, dispatched.offsets_e.long(), right=True) + first
        rows_RH = expert_function(
            dispatched.rows_RH, dispatched.weights_R.to(x.dtype), 1.0 / (1.0 + expert_R.to(x.dtype))
        )
        out = dispatcher.combine(rows_RH, dispatched)
        return [out.detach(), *torch.autograd.grad(out, [x, w], upstream)]

    return run


def captured(rank: int, world_size: int) -> float:
    """A graph recorded on one case and replayed on another, after a pass that may not wait for the GPU."""
    step = layer("deep_ep", world_size * TOKENS * TOP_K)
    buffers = case("uniform", TOKENS, 100 + rank)
    step(*buffers)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step(*buffers)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = step(*buffers)
    worst = 0.0
    for seed in range(3):
        fresh = case("skewed" if seed == 1 else "uniform", TOKENS, 200 + 10 * seed + rank)
        for buffer, value in zip(buffers, fresh, strict=True):
            buffer.copy_(value)
        graph.replay()
        wanted = layer("alltoall", None)(*fresh)
        worst = max(worst, *(relative(a, b) for a, b in zip(results, wanted, strict=True)))
    torch.cuda.synchronize()
    dist.barrier()
    del graph, results
    return worst
