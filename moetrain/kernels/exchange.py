"""Tokens to the ranks of their experts and back, with shapes that do not depend on the choices and without the host.

Where a token lands is its own number, `[source rank, token]`, so nothing is counted or agreed on before it is sent.
Two ways: `NvlinkExchange` stores into the other GPUs' memory, each token once to each rank that holds any of its
experts, and one partial sum comes back from each: with 8 experts of 128 on 8 ranks 5.3 copies instead of 8.
`GatherExchange` uses the collectives of any backend, all-gather and reduce-scatter: every token to every rank.

Shapes: W ranks, T tokens of a rank, S = W*T tokens of all ranks, K choices of a token (top_k), H hidden, E experts of
this rank, R rows (capacity). Every rank must have the same T in a call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moetrain.kernels.nvlink import (
    push_choices,
    push_sums,
    push_tokens,
    sum_partials,
)
from moetrain.kernels.permutation import permute_rows, sum_rows
from moetrain.kernels.routing import Routing, route_sort
from moetrain.kernels.row_stack import Place
from moetrain.metrics.device import timed


class Peers(NamedTuple):
    """One buffer of every rank in the group, each reachable from this one."""

    local: torch.Tensor
    """This rank's own."""
    table: torch.Tensor
    """Addresses of all ranks' buffers, int64 [W] on the device."""


class Exchange(ABC):
    """Two round trips, each begun by `post` on every rank and ended by `take`. One instance serves all layers of a
    model, in the order of one stream: two calls in flight would overwrite each other."""

    @abstractmethod
    def post_tokens(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor | None) -> None:
        """Bring tokens to the ranks of their experts (int32 ids), with the choices and weights (fp32) where given."""

    @abstractmethod
    def sort(self, capacity: int | None) -> Routing:
        """The rows, in expert order, of the choices that `post_tokens` brought (`row_TK` is [S, K]).

        Args:
            capacity: rows R to make room for; more are cut, and `Routing.counts_E` tells. None makes room for all,
                whose number is read on the host.
        """

    @abstractmethod
    def take_rows(self, routing: Routing, place: Place | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What `post_tokens` brought, in the order of `sort`: rows [R, H] and their weights [R] in fp32.

        Args:
            place: where the rows go, `place.at` rows after the result; None makes room.
        """

    @abstractmethod
    def take_more_rows(self, row_SK: torch.Tensor, capacity: int) -> torch.Tensor:
        """What `post_tokens` brought without choices, in the order of an earlier `sort`: a gradient's rows."""

    @abstractmethod
    def post_sums(self, rows_RH: torch.Tensor, weights_R: torch.Tensor | None, row_SK: torch.Tensor) -> None:
        """Sum each token's rows and bring the sums back to the tokens' ranks, and the rows' weights where given."""

    @abstractmethod
    def take_sums(self, index_TK: torch.Tensor, weighted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum of what came back for each token [T, H], and the weight of each choice [T, K] if `weighted`."""

    def begin_capture(self) -> None:  # noqa: B027 - most have nothing to do
        """Called before a CUDA graph records calls: nothing may be assumed of the calls before a replay."""


class GatherExchange(Exchange):
    """By all-gather and reduce-scatter, on NCCL or gloo. Sums travel in the rows' type.

    Args:
        group: every rank has the same number of tokens in a call.
    """

    def __init__(self, group: dist.ProcessGroup, num_local_experts: int) -> None:
        self.group, self.num_local_experts = group, num_local_experts
        self.first = dist.get_rank(group) * num_local_experts
        self.posted: tuple[torch.Tensor | None, ...] = ()

    def post_tokens(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor | None) -> None:
        choices = (None, None) if weights_TK is None else (self._gather(index_TK), self._gather(weights_TK))
        self.posted = (self._gather(x_TH), *choices)

    def sort(self, capacity: int | None) -> Routing:
        index_SK = self.posted[1]
        assert index_SK is not None
        if capacity is None:
            capacity = count_rows(index_SK, self.first, self.num_local_experts)
        return route_sort(index_SK, self.num_local_experts, capacity, self.first)

    def take_rows(self, routing: Routing, place: Place | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x_SH, _, weights_SK = self.posted
        assert x_SH is not None
        return permute_rows(x_SH, weights_SK, routing.row_TK, routing.slot_R.numel(), place)

    def take_more_rows(self, row_SK: torch.Tensor, capacity: int) -> torch.Tensor:
        x_SH = self.posted[0]
        assert x_SH is not None
        return permute_rows(x_SH, None, row_SK, capacity)[0]

    def post_sums(self, rows_RH: torch.Tensor, weights_R: torch.Tensor | None, row_SK: torch.Tensor) -> None:
        out_SH, weights_SK = sum_rows(rows_RH, weights_R, row_SK)
        self.posted = (self._scatter(out_SH), None if weights_R is None else self._scatter(weights_SK))

    def take_sums(self, index_TK: torch.Tensor, weighted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        out_TH, weights_TK = self.posted
        assert out_TH is not None and (weights_TK is not None or not weighted)
        return out_TH, weights_TK

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        ranks = dist.get_world_size(self.group)
        out = tensor.new_empty(ranks * tensor.shape[0], *tensor.shape[1:])
        with timed("collective_wait", tensor.device, many=True):
            dist.all_gather_into_tensor(out, tensor.contiguous(), group=self.group)
        return out

    def _scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.new_empty(tensor.shape[0] // dist.get_world_size(self.group), *tensor.shape[1:])
        with timed("collective_wait", tensor.device, many=True):
            dist.reduce_scatter_tensor(out, tensor, group=self.group)
        return out


class NvlinkExchange(Exchange):
    """By stores over NVLink into symmetric memory.

    Args:
        group: ranks of one NVLink domain, each with `tokens` tokens in every call.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        tokens: int,
        hidden: int,
        top_k: int,
        num_local_experts: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.tokens, self.num_local_experts = tokens, num_local_experts
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
        self._handle.barrier(0)  # or it would wipe out what a faster rank has already sent
        self._busy: str | None = None

    def post_tokens(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor | None) -> None:
        self._before("sent")
        if weights_TK is not None:
            push_choices(index_TK, weights_TK, self.choices.table, self.weights.table, self.rank)
        push_tokens(x_TH, index_TK, self.sent.table, self.rank, self.num_local_experts)
        self._wait_for_all()

    def sort(self, capacity: int | None) -> Routing:
        first = self.rank * self.num_local_experts
        if capacity is None:
            capacity = count_rows(self.choices.local, first, self.num_local_experts)
        return route_sort(self.choices.local, self.num_local_experts, capacity, first)

    def take_rows(self, routing: Routing, place: Place | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return permute_rows(self.sent.local, self.weights.local, routing.row_TK, routing.slot_R.numel(), place)

    def take_more_rows(self, row_SK: torch.Tensor, capacity: int) -> torch.Tensor:
        return permute_rows(self.sent.local, None, row_SK, capacity)[0]

    def post_sums(self, rows_RH: torch.Tensor, weights_R: torch.Tensor | None, row_SK: torch.Tensor) -> None:
        self._before("returned")
        tables = self.returned.table, self.weight_grads.table
        push_sums(rows_RH, weights_R, row_SK, *tables, self.rank)
        self._wait_for_all()

    def take_sums(self, index_TK: torch.Tensor, weighted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights_SK = self.weight_grads.local if weighted else None
        return sum_partials(self.returned.local, weights_SK, index_TK, self.num_local_experts, self.world)

    def begin_capture(self) -> None:
        self._busy = "sent"  # so that the first call of a replay has the barrier whatever came before

    def _before(self, buffer: str) -> None:
        """A buffer may be written once every rank has read what was in it: the barrier of a use of the other buffer
        says so; two uses of the same need one more."""
        if self._busy == buffer:
            self._wait_for_all()
        self._busy = buffer

    def _wait_for_all(self) -> None:
        with timed("collective_wait", self.sent.local.device, many=True):
            self._handle.barrier(0)


def count_rows(index_SK: torch.Tensor, first_expert: int, num_experts: int) -> int:
    """Choices of this rank's experts, read on the host; at least 1."""
    return max(int(((index_SK >= first_expert) & (index_SK < first_expert + num_experts)).sum()), 1)


def _rendezvous(num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> tuple[torch.Tensor, Any]:
    from torch.distributed import _symmetric_memory as symmetric_memory

    buffer = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    return buffer, symmetric_memory.rendezvous(buffer, group.group_name)
