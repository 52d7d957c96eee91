"""Tokens to the ranks of their experts and back, by stores into the other GPUs' memory over NVLink.

A token goes once to each rank that holds any of its experts, and one partial sum comes back from each: with 8 experts
of 128 on 8 ranks 5.3 copies instead of 8. Where a token lands is its own number, `[source rank, token]`, so nothing is
counted or agreed on before it is sent, every shape is static and no rank waits for a host.

Shapes: W ranks, T tokens of a rank, S = W*T tokens of all ranks, K choices of a token (top_k), H hidden, E experts of
this rank, R rows (capacity). Every rank must have the same T.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moetrain.kernels.nvlink import (
    push_choices,
    push_sums,
    push_tokens,
    sum_partials,
)
from moetrain.kernels.permutation import permute_rows
from moetrain.kernels.routing import Routing, route_sort


class Peers(NamedTuple):
    """One buffer of every rank in the group, each reachable from this one."""

    local: torch.Tensor
    """This rank's own."""
    table: torch.Tensor
    """Addresses of all ranks' buffers, int64 [W] on the device."""


class Exchange:
    """The buffers of one group of ranks, and the exchange through them. Two calls in flight would overwrite each other:
    one instance serves all layers of a model, in the order of one stream.

    Args:
        group: ranks of one NVLink domain, each with `tokens` tokens in every call.
        capacity: rows of this rank's experts that there is room for; more are cut, see `Routing.counts_E`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        tokens: int,
        hidden: int,
        top_k: int,
        num_local_experts: int,
        capacity: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.tokens, self.num_local_experts, self.capacity = tokens, num_local_experts, capacity
        everyone = self.world * tokens
        device = torch.device("cuda", torch.cuda.current_device())
        sizes = {"sent": everyone * hidden * dtype.itemsize, "returned": everyone * hidden * dtype.itemsize}
        sizes |= {name: everyone * top_k * 4 for name in ("choices", "weights", "weight_grads")}
        whole, self._handle = _rendezvous(sum(sizes.values()), device, group)
        types = {"choices": torch.int32, "weights": torch.float32, "weight_grads": torch.float32}
        peers, start = {}, 0
        for name, size in sizes.items():
            width = hidden if name in ("sent", "returned") else top_k
            local = whole[start : start + size].view(types.get(name, dtype)).view(everyone, width)
            table = [pointer + start for pointer in self._handle.buffer_ptrs]
            peers[name] = Peers(local, torch.tensor(table, dtype=torch.int64, device=device))
            start += size
        self.sent, self.returned = peers["sent"], peers["returned"]
        self.choices, self.weights, self.weight_grads = peers["choices"], peers["weights"], peers["weight_grads"]
        self.choices.local.fill_(-1)
        self._busy: str | None = None

    def dispatch(
        self, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """Rows [R, H] for this rank's experts, their routing weights [R] in fp32, and where each came from (slots of
        S * K). Differentiable."""
        rows_RH, weights_R, *routing = _Dispatch.apply(x_TH, weights_TK, index_TK, self)
        return rows_RH, weights_R, Routing(*routing)

    def combine(self, rows_RH: torch.Tensor, index_TK: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Sum of each token's rows over all ranks [T, H]: in fp32 on each rank, rounded, and again in fp32.
        Differentiable."""
        out_TH: torch.Tensor = _Combine.apply(rows_RH, index_TK, routing.row_TK, self)
        return out_TH

    def post_tokens(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor | None) -> None:
        """Bring tokens to the ranks of their experts (int32 ids), with the choices and weights (fp32) where given.
        `take_rows` or `take_more_rows` may follow."""
        self._before("sent")
        if weights_TK is not None:
            push_choices(index_TK, weights_TK, self.choices.table, self.weights.table, self.rank)
        push_tokens(x_TH, index_TK, self.sent.table, self.rank, self.num_local_experts)
        self._handle.barrier(0)

    def take_rows(self) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """What `post_tokens` brought, in expert order: rows [R, H], weights [R], and where each came from."""
        first = self.rank * self.num_local_experts
        routing = route_sort(self.choices.local, self.num_local_experts, self.capacity, first)
        rows_RH, weights_R = permute_rows(self.sent.local, self.weights.local, routing.row_TK, self.capacity)
        return rows_RH, weights_R, routing

    def take_more_rows(self, row_SK: torch.Tensor) -> torch.Tensor:
        """What `post_tokens` brought without choices, in the order of an earlier `take_rows`: a gradient's rows."""
        return permute_rows(self.sent.local, None, row_SK, self.capacity)[0]

    def post_sums(self, rows_RH: torch.Tensor, weights_R: torch.Tensor | None, row_SK: torch.Tensor) -> None:
        """Sum each token's rows and bring the sums back to the tokens' ranks, and the rows' weights where given.
        `take_sums` may follow."""
        self._before("returned")
        tables = self.returned.table, self.weight_grads.table
        push_sums(rows_RH, weights_R, row_SK, *tables, self.rank)
        self._handle.barrier(0)

    def take_sums(self, index_TK: torch.Tensor, weighted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum of what came back for each token [T, H], and the weight of each choice [T, K] if `weighted`."""
        weights_SK = self.weight_grads.local if weighted else None
        return sum_partials(self.returned.local, weights_SK, index_TK, self.num_local_experts, self.world)

    def _before(self, buffer: str) -> None:
        """A buffer may be written once every rank has read what was in it: the barrier of a use of the other buffer
        says so; two uses of the same need one more."""
        if self._busy == buffer:
            self._handle.barrier(0)
        self._busy = buffer


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weights_TK, index_TK, exchange):  # type: ignore[no-untyped-def]
        index_TK = index_TK.int().contiguous()
        exchange.post_tokens(x_TH, index_TK, weights_TK.float().contiguous())
        rows_RH, weights_R, routing = exchange.take_rows()
        ctx.exchange, ctx.weights_dtype = exchange, weights_TK.dtype
        ctx.save_for_backward(index_TK, routing.row_TK)
        ctx.mark_non_differentiable(*routing)
        return rows_RH, weights_R, *routing

    @staticmethod
    def backward(ctx, grad_RH, grad_weights_R, *_):  # type: ignore[no-untyped-def]
        index_TK, row_SK = ctx.saved_tensors
        ctx.exchange.post_sums(grad_RH, grad_weights_R, row_SK)
        grad_x_TH, grad_weights_TK = ctx.exchange.take_sums(index_TK, weighted=True)
        return grad_x_TH, grad_weights_TK.to(ctx.weights_dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, index_TK, row_SK, exchange):  # type: ignore[no-untyped-def]
        ctx.exchange, index_TK = exchange, index_TK.int().contiguous()
        ctx.save_for_backward(index_TK, row_SK)
        exchange.post_sums(rows_RH, None, row_SK)
        return exchange.take_sums(index_TK, weighted=False)[0]

    @staticmethod
    def backward(ctx, grad_TH):  # type: ignore[no-untyped-def]
        index_TK, row_SK = ctx.saved_tensors
        ctx.exchange.post_tokens(grad_TH, index_TK, None)
        return ctx.exchange.take_more_rows(row_SK), None, None, None


def _rendezvous(num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> tuple[torch.Tensor, Any]:
    from torch.distributed import _symmetric_memory as symmetric_memory

    buffer = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    return buffer, symmetric_memory.rendezvous(buffer, group.group_name)
