"""Dispatchers whose shapes need not depend on the routing: `allgather`, `nvlink`. They can run in a CUDA graph.

The rows of a rank's experts have a capacity. Nothing is ever dropped: what was needed is noted on the device, and who
runs the step reads it once (`Dispatcher.needed`), and runs the step again with more room where it did not suffice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.backends.deep_ep import close_links
from moetrain.kernels import Exchange, GatherExchange, NvlinkExchange, Place, RowStack
from moetrain.moe.dispatch.base import Dispatched, RankedDispatcher
from moetrain.moe.dispatch.collectives import resolve_group
from moetrain.tape import receive


@dataclass(frozen=True)
class _StaticDispatched(Dispatched):
    exchange: Exchange
    row_SK: Tensor
    """Row of each choice of all ranks' tokens (S of them); -1 where its expert is elsewhere."""
    expert_ids_TK: Tensor


class StaticDispatcher(RankedDispatcher):
    """All ranks of the group must have the same number of tokens in a call, and make the same calls.

    Attributes:
        capacity: rows there is room for; None makes room for what comes, which the host reads: one sync a layer.
        needed: int64 on the device, the rows that the fullest call since its last reset brought; None before a call.
        stack: where rows that a backward needs lie beside those of other layers; None gives each call its own memory.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        super().__init__(num_experts, group)
        self.capacity: int | None = None
        self.needed: Tensor | None = None
        self.stack: RowStack | None = None

    def dispatch(self, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        exchange = self.exchange_for(tokens_TH, expert_ids_TK.shape[1])
        ids_TK = expert_ids_TK.int().contiguous()
        rows_RH, weights_R, row_SK, counts_e, offsets_e, place = _Dispatch.apply(
            tokens_TH, weights_TK, ids_TK, exchange, self.capacity, self.stack
        )
        self.note(counts_e)
        return _StaticDispatched(rows_RH, offsets_e, weights_R, exchange, row_SK, ids_TK, place=place)

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        assert isinstance(dispatched, _StaticDispatched)
        out_TH: Tensor = _Combine.apply(rows_RH, dispatched.expert_ids_TK, dispatched.row_SK, dispatched.exchange)
        return out_TH

    def note(self, counts_e: Tensor) -> None:
        """Take the rows of a call into `needed`."""
        if self.needed is None:
            self.needed = torch.zeros((), dtype=torch.int64, device=counts_e.device)
        torch.maximum(self.needed, counts_e.sum(), out=self.needed)

    def exchange_for(self, tokens_TH: Tensor, top_k: int) -> Exchange:
        raise NotImplementedError


class AllGatherDispatcher(StaticDispatcher):
    """`allgather`: every token to every rank of the group, on any backend."""

    def exchange_for(self, tokens_TH: Tensor, top_k: int) -> Exchange:
        return _shared(GatherExchange, self.group_name, self.num_local)


class NvlinkDispatcher(StaticDispatcher):
    """`nvlink`: each token once to each rank that holds one of its experts, by stores into that GPU's memory."""

    def exchange_for(self, tokens_TH: Tensor, top_k: int) -> Exchange:
        tokens, hidden = tokens_TH.shape
        return _shared(NvlinkExchange, self.group_name, tokens, hidden, top_k, self.num_local, tokens_TH.dtype)


_exchanges: dict[tuple[Any, ...], Exchange] = {}
"""One for each kind, group and shape: the layers of a model take turns."""


def _shared(kind: type[Any], group_name: str, *shape: Any) -> Exchange:
    group = resolve_group(group_name)
    key = (kind, group, *shape)  # not its name, which a later group of this process may have again
    if key not in _exchanges:
        _exchanges[key] = kind(group, *shape)
    return _exchanges[key]


def forget_exchanges() -> None:
    """Free the buffers of every exchange, before their process groups go."""
    _exchanges.clear()
    close_links()


def exchanges() -> list[Exchange]:
    """Every exchange in use."""
    return list(_exchanges.values())


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        exchange: Exchange,
        capacity: int | None,
        stack: RowStack | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Place | None]:
        weights_dtype = torch.promote_types(weights_TK.dtype, torch.float32)
        exchange.post_tokens(x_TH, ids_TK, weights_TK.to(weights_dtype).contiguous())
        routing = exchange.sort(capacity)
        place = None if stack is None else stack.push(routing.counts_E)
        rows_RH, weights_R = exchange.take_rows(routing, place)
        ctx.exchange, ctx.weights_dtype = exchange, weights_TK.dtype
        ctx.save_for_backward(ids_TK, routing.row_TK)
        ctx.mark_non_differentiable(routing.row_TK, routing.counts_E, routing.offsets_E)
        return rows_RH, weights_R, routing.row_TK, routing.counts_E, routing.offsets_E, place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_RH, grad_weights_R = grads[:2]
        ids_TK, row_SK = ctx.saved_tensors
        ctx.exchange.post_sums(grad_RH, grad_weights_R, row_SK)
        grad_x_TH, grad_weights_TK = ctx.exchange.take_sums(ids_TK, weighted=True)
        return grad_x_TH, grad_weights_TK.to(ctx.weights_dtype), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, ids_TK: Tensor, row_SK: Tensor, exchange: Exchange) -> Tensor:
        def combine() -> Tensor:
            exchange.post_sums(rows_RH, None, row_SK)
            return exchange.take_sums(ids_TK, weighted=False)[0]

        ctx.exchange, ctx.capacity = exchange, rows_RH.shape[0]
        ctx.save_for_backward(ids_TK, row_SK)
        return receive(combine)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids_TK, row_SK = ctx.saved_tensors
        ctx.exchange.post_tokens(grads[0], ids_TK, None)
        return ctx.exchange.take_more_rows(row_SK, ctx.capacity), None, None, None
