"""`deep_ep`: each token once to each rank that needs it, by DeepEP; over NVLink and RDMA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.backends import deep_ep
from moetrain.backends.deep_ep import Handle, Link, Sizes
from moetrain.kernels import Place, Routing, RowStack, route_sort
from moetrain.kernels.permutation import permute_rows, sum_rows
from moetrain.moe.dispatch.base import Dispatched
from moetrain.moe.dispatch.collectives import resolve_group
from moetrain.moe.dispatch.static import StaticDispatcher
from moetrain.tape import receive


@dataclass(frozen=True)
class _DeepEpDispatched(Dispatched):
    link: Link
    row_NK: Tensor
    """Row of each choice of the tokens that came; -1 where its expert is elsewhere."""
    handle: Handle


class DeepEpDispatcher(StaticDispatcher):
    """With a capacity, shapes do not depend on the routing and every rank has the same number of tokens; without one,
    ranks may have any number of tokens, and the host waits for how many came.

    Raises:
        ValueError: DeepEP cannot be used among the ranks of the group.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        super().__init__(num_experts, group)
        if reason := deep_ep.obstacle(self.ep_size):
            raise ValueError(f"dispatch='deep_ep' cannot be used: {reason}; use 'nvlink', 'alltoall' or 'auto'")
        self.waits = deep_ep.why_waits(self.ep_size)

    def dispatch(self, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> _DeepEpDispatched:
        sizes = Sizes(tokens_TH.shape[1], expert_ids_TK.shape[1], self.num_local, tokens_TH.dtype)
        link = deep_ep.link_for(resolve_group(self.group_name), sizes)
        rows_RH, weights_R, row_NK, counts_e, offsets_e, handle, place = _Dispatch.apply(
            tokens_TH, weights_TK, expert_ids_TK, link, self.num_local, self.capacity, self.stack
        )
        self.note(counts_e)
        return _DeepEpDispatched(rows_RH, offsets_e, weights_R, link, row_NK, handle, place=place)

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        assert isinstance(dispatched, _DeepEpDispatched)
        out_TH: Tensor = _Combine.apply(rows_RH, dispatched.row_NK, dispatched.link, dispatched.handle)
        return out_TH


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        link: Link,
        num_local: int,
        capacity: int | None,
        stack: RowStack | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Handle, Place | None]:
        weights_dtype = torch.promote_types(weights_TK.dtype, torch.float32)

        def dispatch() -> tuple[Tensor, Tensor, Routing, Handle, Place | None]:
            arrived = link.dispatch(
                x_TH, ids_TK, weights_TK.to(weights_dtype), num_local * link.ranks, static=capacity is not None
            )
            rows = max(arrived.rows or 0, 1) if capacity is None else capacity
            routing = route_sort(arrived.ids_NK, num_local, rows)
            place = None if stack is None else stack.push(routing.counts_E)
            rows_RH, weights_R = permute_rows(arrived.x_NH, arrived.weights_NK, routing.row_TK, rows, place)
            return rows_RH, weights_R, routing, arrived.handle, place

        rows_RH, weights_R, routing, handle, place = receive(dispatch)
        ctx.link, ctx.handle, ctx.weights_dtype = link, handle, weights_TK.dtype
        ctx.save_for_backward(routing.row_TK)
        ctx.mark_non_differentiable(routing.row_TK, routing.counts_E, routing.offsets_E)
        return rows_RH, weights_R, routing.row_TK, routing.counts_E, routing.offsets_E, handle, place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (row_NK,) = ctx.saved_tensors
        sums_NH, weights_NK = sum_rows(grads[0], grads[1], row_NK)
        grad_x_TH, grad_weights_TK = ctx.link.combine(sums_NH, weights_NK, ctx.handle)
        return grad_x_TH, grad_weights_TK.to(ctx.weights_dtype), None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, row_NK: Tensor, link: Link, handle: Handle) -> Tensor:
        ctx.link, ctx.handle, ctx.capacity = link, handle, rows_RH.shape[0]
        ctx.save_for_backward(row_NK)
        return receive(lambda: link.combine(sum_rows(rows_RH, None, row_NK)[0], None, handle)[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (row_NK,) = ctx.saved_tensors
        x_NH = ctx.link.dispatch_again(grads[0], ctx.handle)
        return permute_rows(x_NH, None, row_NK, ctx.capacity)[0], None, None, None
