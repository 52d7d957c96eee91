"""Ranks' work for the tests of DeepEP, with a fake in its place."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.backends import deep_ep
from moetrain.metrics.device import DeviceTimes
from moetrain.moe.dispatch import build_dispatcher
from moetrain.moe.dispatch.static import forget_exchanges
from moetrain.tape import keep_received
from tests import deep_ep_fake
from tests.dist.dispatch_cases import dispatch_differences, expert_function, routing
from tests.dist.graph_cases import differences

EXPERTS, HIDDEN = 8, 16


def exact(
    rank: int, world_size: int, interface: str, node: int | None, cases: list[tuple[str, int, int, int]]
) -> dict[tuple[str, int, int, int], float]:
    """Ranks with different numbers of tokens, against every expert in one process."""
    deep_ep_fake.install(interface, node=node)
    found = dispatch_differences(rank, world_size, "deep_ep", cases)
    assert "dispatch without waiting" not in deep_ep_fake.calls
    return found


def passes(rank: int, world_size: int, interface: str, node: int | None) -> dict[str, Any]:
    """With capacities, beside `alltoall`: differences in float64 and bfloat16, calls, and what a lack of room gives."""
    deep_ep_fake.install(interface, node=node)
    deep_ep_fake.ElasticBuffer.reads_speeds = False
    found: dict[str, Any] = {"differences": {}}
    for dtype in (torch.float64, torch.bfloat16):
        for kind in ("uniform", "skewed", "holes"):
            ids = routing(kind, 9, 2, EXPERTS, seed=rank)  # skewed: every token to the first rank
            tensors = _random(ids, dtype, rank)
            # first: without a collective, the group has no communicator that DeepEP could borrow
            ours = round_trip("deep_ep", ids, *tensors, capacity=world_size * 9 * 2)
            expected = round_trip("alltoall", ids, *tensors)
            found["differences"][kind, str(dtype)] = max(
                (a - b).abs().max().item() / b.abs().max().item() for a, b in zip(ours, expected, strict=True)
            )
    deep_ep_fake.calls.clear()
    times = DeviceTimes()
    with times.measured():
        round_trip("deep_ep", ids, *tensors, capacity=64)
    found["waited"] = times.take()
    found["calls"] = list(deep_ep_fake.calls)
    deep_ep_fake.calls.clear()
    round_trip("deep_ep", ids, *tensors, capacity=64, recomputed=True)
    found["calls_recomputed"] = list(deep_ep_fake.calls)

    skewed = routing("skewed", 9, 2, EXPERTS, seed=rank)
    dispatcher: Any = build_dispatcher("deep_ep", EXPERTS, dist.group.WORLD)
    dispatcher.capacity = 3
    dispatched = dispatcher.dispatch(tensors[0], skewed, tensors[1])
    found["cut"] = [dispatcher.needed.item(), dispatched.offsets_e[-1].item(), dispatched.rows_RH.shape[0]]
    deep_ep_fake.calls.clear()
    forget_exchanges()
    found["freed"] = list(deep_ep_fake.calls)
    found["links"] = len(deep_ep._links)
    return found


def captured(rank: int, world_size: int, interface: str, checkpointing: str, forced: list[int]) -> dict[str, Any]:
    """A model's steps as they are captured, beside plain ones of `alltoall`, with overflows."""
    deep_ep_fake.install(interface)
    found = differences(rank, world_size, checkpointing, forced, dispatch="deep_ep")
    forget_exchanges()
    return found


def round_trip(
    name: str,
    ids: Tensor,
    tokens: Tensor,
    weights: Tensor,
    upstream: Tensor,
    capacity: int | None = None,
    recomputed: bool = False,
) -> list[Tensor]:
    """Output, and the gradients of tokens and weights, in float64."""
    dispatcher: Any = build_dispatcher(name, EXPERTS, dist.group.WORLD)
    if capacity is not None:
        dispatcher.capacity = capacity
    first = dist.get_rank() * dispatcher.num_local
    x, w = tokens.clone().requires_grad_(), weights.clone().requires_grad_()

    def layer(x: Tensor, w: Tensor) -> Tensor:
        dispatched = dispatcher.dispatch(x, ids, w)
        row_R = torch.arange(dispatched.rows_RH.shape[0], device=x.device)
        expert = torch.bucketize(row_R, dispatched.offsets_e.long(), right=True) + first
        rows = expert_function(dispatched.rows_RH, dispatched.weights_R.to(x.dtype), 1.0 / (1.0 + expert.to(x.dtype)))
        return dispatcher.combine(rows, dispatched)

    out = checkpoint(layer, x, w, use_reentrant=False, context_fn=keep_received) if recomputed else layer(x, w)
    out.backward(upstream)
    assert x.grad is not None and w.grad is not None
    return [tensor.detach().double() for tensor in (out, x.grad, w.grad)]


def _random(ids: Tensor, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, upstream = torch.randn(2, ids.shape[0], HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    return tokens, weights if dtype == torch.float64 else weights.float(), upstream
