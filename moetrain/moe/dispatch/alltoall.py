"""`alltoall`: torch collectives, on NCCL and gloo. The reference of the faster dispatchers, and the path on CPUs.

Each (token, expert) pair travels on its own, so a token with several experts on one rank is sent there several times.
The split sizes are read on the host: one sync a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.kernels import Routing, permute, route_sort, unpermute_reduce
from moetrain.moe.dispatch.base import Dispatched, RankedDispatcher
from moetrain.moe.dispatch.collectives import all_to_all_rows, exchange_counts


@dataclass(frozen=True)
class _AllToAllDispatched(Dispatched):
    sent: Routing
    """This rank's slots in the order of all experts."""
    received: Routing
    """The rows that came, by source rank, in the order of this rank's experts."""
    send_sizes: list[int]
    recv_sizes: list[int]


class AllToAllDispatcher(RankedDispatcher):
    """Any number of tokens on each rank."""

    waits = "the dispatcher alltoall reads the number of rows on the host; static: nvlink, allgather"

    def dispatch(self, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> _AllToAllDispatched:
        sent = route_sort(expert_ids_TK, self.num_experts)
        send_counts = sent.counts_E.view(self.ep_size, self.num_local)
        recv_counts = exchange_counts(send_counts, self.group_name)
        send_sizes, recv_sizes = torch.stack([send_counts.sum(1), recv_counts.sum(1)]).tolist()

        rows, weights = permute(tokens_TH, weights_TK, sent)
        used = sum(send_sizes)  # slots without an expert have no row
        rows = all_to_all_rows(rows[:used], recv_sizes, send_sizes, self.group_name)
        weights = all_to_all_rows(weights[:used].unsqueeze(1), recv_sizes, send_sizes, self.group_name)

        received = route_sort(_expert_of_received(recv_counts, sum(recv_sizes)).unsqueeze(1), self.num_local)
        rows, weights = permute(rows, weights, received)
        return _AllToAllDispatched(
            rows_RH=_at_least_one_row(rows),
            offsets_e=received.offsets_E,
            weights_R=_at_least_one_row(weights),
            sent=sent,
            received=received,
            send_sizes=send_sizes,
            recv_sizes=recv_sizes,
        )

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        assert isinstance(dispatched, _AllToAllDispatched)
        rows = unpermute_reduce(rows_RH, dispatched.received)
        rows = all_to_all_rows(rows, dispatched.send_sizes, dispatched.recv_sizes, self.group_name)
        return unpermute_reduce(rows, dispatched.sent)


def _expert_of_received(recv_counts: Tensor, num_rows: int) -> Tensor:
    """Local expert of each row as it came, from the counts [ranks, e] by source rank and expert: [R]."""
    ranks, num_local = recv_counts.shape
    experts = torch.arange(num_local, device=recv_counts.device).repeat(ranks)
    return experts.repeat_interleave(recv_counts.reshape(-1), output_size=num_rows)


def _at_least_one_row(rows: Tensor) -> Tensor:
    """A rank that receives nothing still runs its experts on one row that no expert owns, so that its parameters take
    part in the backward's collectives with zero gradients."""
    return rows if rows.shape[0] else rows.new_zeros(1, *rows.shape[1:]) + rows.sum()
