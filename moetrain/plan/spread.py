"""Experts spread over ranks, on the meta device: the dispatchers' own code, with stand-ins for what other ranks send.

Shapes as in `moetrain.moe.dispatch.base`: T tokens, K choices, R rows of this rank's experts, H hidden, W ranks,
S = W*T tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import moetrain.backends.deep_ep as deep_ep_backend
import moetrain.kernels.exchange as exchange
import moetrain.kernels.experts as experts_kernels
import moetrain.moe.dispatch.alltoall as alltoall
import moetrain.moe.dispatch.collectives as collectives
import moetrain.moe.dispatch.deep_ep as deep_ep
from moetrain.kernels import (
    Activation,
    Exchange,
    ExpertWeights,
    GatherExchange,
    Place,
    Routing,
    RowStack,
    route_sort,
)
from moetrain.moe.dispatch import Dispatcher, StaticDispatcher
from moetrain.moe.layer import moe_forward


def spread_experts(
    experts: Any, dispatch: str, rows_over_mean: float, ranks: int = 8, stack: RowStack | None = None
) -> None:
    """Leave one expert of an experts module on the meta device here, and give it a dispatcher that brings rows.

    How many experts a rank has changes its weights and their gradients, which a trace does not count, and nothing that
    it does: one trace serves every number of ranks, but of dispatchers that make room for the tokens of all of them.

    Args:
        dispatch: key of `DISPATCHERS`.
        rows_over_mean: rows of this rank over T*K.
        ranks: of the expert group.
        stack: where a static dispatcher's rows lie; None: each call has its own memory.
    """
    dispatcher = DISPATCHERS[dispatch](experts.num_experts, rows_over_mean, ranks)
    if isinstance(dispatcher, StaticDispatcher):
        dispatcher.stack = stack
    for name, parameter in list(experts.named_parameters(recurse=False)):
        experts._parameters[name] = nn.Parameter(torch.empty_like(parameter[:1]), requires_grad=parameter.requires_grad)
    experts.num_experts = 1

    def forward(tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return moe_forward(experts, dispatcher, tokens_TH, expert_ids_TK, weights_TK)

    experts.forward = forward


class _AllToAll(alltoall.AllToAllDispatcher):
    """The dispatcher's own code; only the split sizes, which it reads from the device, are given."""

    def __init__(self, num_experts: int, rows_over_mean: float, ranks: int) -> None:
        Dispatcher.__init__(self, num_experts)
        self.group_name, self.ep_size, self.num_local = cast(Any, ""), num_experts, 1
        self.rows_over_mean = rows_over_mean

    def dispatch(self, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Any:
        slots = expert_ids_TK.numel()
        with SplitSizes([[slots], [round(slots * self.rows_over_mean)]]):
            return super().dispatch(tokens_TH, expert_ids_TK, weights_TK)


class SplitSizes(TorchFunctionMode):
    """Answers `Tensor.tolist` with the sizes sent and received."""

    def __init__(self, sizes: list[list[int]]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.sizes if func is Tensor.tolist else func(*args, **(kwargs or {}))


class Stack(RowStack):
    """The rows of all layers, laid out at the first call.

    Args:
        rows_over_mean: of all layers but the last, together.
    """

    def __init__(self, rows_over_mean: float, layers: int) -> None:
        super().__init__(torch.device("meta"))
        self.times = rows_over_mean * (layers - 1)

    def make_room(self, slots: int, capacity: int) -> None:
        if self.capacity is None:
            self.lay_out(round(slots * self.times), capacity)


class _Static(StaticDispatcher):
    """The dispatcher's own code; only the exchange between ranks is a stand-in."""

    def __init__(self, num_experts: int, rows_over_mean: float, ranks: int) -> None:
        Dispatcher.__init__(self, num_experts)
        self.group_name, self.ep_size, self.num_local = cast(Any, ""), ranks, 1
        self.rows_over_mean = rows_over_mean
        self.capacity: int | None = None
        self.needed: Tensor | None = None
        self.stack: RowStack | None = None

    def dispatch(self, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Any:
        slots = expert_ids_TK.numel()
        self.capacity = max(round(slots * self.rows_over_mean), 1)
        if isinstance(self.stack, Stack):
            self.stack.make_room(slots, self.capacity)
        return super().dispatch(tokens_TH, expert_ids_TK, weights_TK)


class _AllGather(_Static):
    def exchange_for(self, tokens_TH: Tensor, top_k: int) -> Exchange:
        return _one_for_all_layers(self.ep_size)


class _Nvlink(_Static):
    def exchange_for(self, tokens_TH: Tensor, top_k: int) -> Exchange:
        return _Arriving(self.ep_size)


class _DeepEp(_Static, deep_ep.DeepEpDispatcher):
    """Likewise; its group's name is the number of ranks.

    Raises:
        ValueError: DeepEP's kernels do not take the model.
    """

    def __init__(self, num_experts: int, rows_over_mean: float, ranks: int) -> None:
        super().__init__(num_experts, rows_over_mean, ranks)
        self.group_name = cast(Any, ranks)

    def dispatch(self, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Any:
        local = max(self.num_experts // self.ep_size, 1)
        sizes = deep_ep_backend.Sizes(tokens_TH.shape[1], expert_ids_TK.shape[1], local, tokens_TH.dtype)
        if reason := deep_ep_backend.ElasticLink.misfit(self.ep_size, sizes):
            raise ValueError(f"model.dispatch=deep_ep does not take this model: {reason}; set model.dispatch=auto")
        return super().dispatch(tokens_TH, expert_ids_TK, weights_TK)


class _DeepEpLink:
    """`moetrain.backends.deep_ep.ElasticLink`, which makes room for every token of every rank. Its buffer is no part of
    a trace."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def dispatch(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, static: bool) -> Any:
        (tokens, hidden), top_k = x_TH.shape, ids_TK.shape[1]
        came = self.ranks * tokens
        ids_NK, weights_NK = _empty(came, top_k, dtype=torch.int64), _empty(came, top_k, dtype=torch.float32)
        handle = deep_ep_backend.Handle(tokens, tokens, None)
        return deep_ep_backend.Arrived(_empty(came, hidden, dtype=x_TH.dtype), ids_NK, weights_NK, None, handle)

    def dispatch_again(self, x_TH: Tensor, handle: deep_ep_backend.Handle) -> Tensor:
        return _empty(self.ranks * handle.tokens, x_TH.shape[1], dtype=x_TH.dtype)

    def combine(self, x_NH: Tensor, weights_NK: Tensor | None, handle: deep_ep_backend.Handle) -> Any:
        weights = None if weights_NK is None else _empty(handle.tokens, weights_NK.shape[1], dtype=torch.float32)
        return _empty(handle.tokens, x_NH.shape[1], dtype=x_NH.dtype), weights


class _Gathering(GatherExchange):
    """The exchange's own code; only its collectives are stand-ins."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.first, self.num_local_experts = ranks, 0, 1

    def _gather(self, tensor: Tensor) -> Tensor:
        return tensor.new_empty(self.ranks * tensor.shape[0], *tensor.shape[1:])

    def _scatter(self, tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape[0] // self.ranks, *tensor.shape[1:])


@cache
def _one_for_all_layers(ranks: int) -> _Gathering:
    """What one layer has gathered stays until the next one gathers, as in training."""
    return _Gathering(ranks)


class _Arriving(Exchange):
    """`NvlinkExchange`, whose buffers are no part of a trace: they live as long as the run."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def post_tokens(self, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor | None) -> None:
        self.hidden, self.dtype, self.choices = x_TH.shape[1], x_TH.dtype, index_TK.shape

    def sort(self, capacity: int | None) -> Routing:
        assert capacity is not None
        tokens, top_k = self.choices
        return route_sort(_empty(self.ranks * tokens, top_k, dtype=torch.int32), 1, capacity)

    def take_rows(self, routing: Routing, place: Place | None = None) -> tuple[Tensor, Tensor]:
        rows = routing.slot_R.numel()
        weights_R = _empty(rows, dtype=torch.float32)
        if place is not None:
            return place.rows("rows", rows, self.hidden, self.dtype), weights_R
        return _empty(rows, self.hidden, dtype=self.dtype), weights_R

    def take_more_rows(self, row_SK: Tensor, capacity: int) -> Tensor:
        return _empty(capacity, self.hidden, dtype=self.dtype)

    def post_sums(self, rows_RH: Tensor, weights_R: Tensor | None, row_SK: Tensor) -> None:
        self.hidden, self.dtype = rows_RH.shape[1], rows_RH.dtype

    def take_sums(self, index_TK: Tensor, weighted: bool) -> tuple[Tensor, Tensor | None]:
        sums = _empty(len(index_TK), self.hidden, dtype=self.dtype)
        return sums, _empty(*index_TK.shape, dtype=torch.float32) if weighted else None


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


DISPATCHERS: dict[str, Callable[[int, float, int], Dispatcher]] = {
    "alltoall": _AllToAll,
    "allgather": _AllGather,
    "nvlink": _Nvlink,
    "deep_ep": _DeepEp,
}
"""Dispatchers over several ranks that a trace knows."""


def _received_rows(rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
    return rows.new_empty(sum(recv_sizes), *rows.shape[1:])


def _permute_rows(
    x_TH: Tensor, weights_TK: Tensor | None, row_TK: Tensor, num_rows: int, place: Place | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel's result; the meta device would run its reference, which needs more."""
    hidden = x_TH.shape[1]
    rows_RH = x_TH.new_empty(num_rows, hidden) if place is None else place.rows("rows", num_rows, hidden, x_TH.dtype)
    return rows_RH, _empty(0 if weights_TK is None else num_rows, dtype=torch.float32)


def _sum_rows(rows_RH: Tensor, weights_R: Tensor | None, row_TK: Tensor) -> tuple[Tensor, Tensor]:
    weights = (0,) if weights_R is None else row_TK.shape
    return rows_RH.new_empty(len(row_TK), rows_RH.shape[1]), _empty(*weights, dtype=torch.float32)


def _forward_rows(
    rows_RH: Tensor,
    weights_R: Tensor,
    offsets_E: Tensor,
    weights: ExpertWeights,
    activation: Activation,
    place: Place,
    outputs: bool = True,
) -> tuple[Tensor, Tensor]:
    """`moetrain.kernels.rows.forward_rows` on rows of a stack, by the operator that runs on others."""
    out_RH, up_RG = torch.ops.moetrain.expert_rows(rows_RH, weights_R, offsets_E, *weights, activation.key(), outputs)
    return out_RH, place.rows("up", up_RG.shape[0], up_RG.shape[1], up_RG.dtype)


def _rows_backward(
    grad_RH: Tensor,
    up_RG: Tensor,
    rows_RH: Tensor,
    weights_R: Tensor,
    offsets_E: Tensor,
    weights: ExpertWeights,
    activation: Activation,
    at: Tensor | None,
    needs_rows: bool,
    needs_parameters: bool,
) -> list[Tensor | None]:
    found = torch.ops.moetrain.expert_rows_backward(
        *(grad_RH, up_RG, rows_RH, weights_R, offsets_E), *weights, activation.key(), needs_rows, needs_parameters
    )
    return [tensor if tensor.numel() else None for tensor in found]


EXCHANGED: tuple[tuple[Any, str, Any], ...] = (
    (alltoall, "exchange_counts", lambda counts, group_name: torch.empty_like(counts)),
    (collectives, "_exchange_rows", _received_rows),
    (deep_ep, "resolve_group", lambda name: name),
    (deep_ep_backend, "link_for", lambda ranks, sizes: _DeepEpLink(ranks)),
    *((module, "permute_rows", _permute_rows) for module in (exchange, deep_ep)),
    *((module, "sum_rows", _sum_rows) for module in (exchange, deep_ep)),
    (experts_kernels, "forward_rows", _forward_rows),
    (experts_kernels, "_rows_backward", _rows_backward),
)
"""What a trace puts in the place of other ranks, and of kernels on memory that lies elsewhere."""
