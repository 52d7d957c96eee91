"""`alltoall`: torch collectives, on NCCL and gloo. The reference of the faster dispatchers, and the path on CPUs.

Each (token, expert) pair travels on its own, so a token with several experts on one rank is sent there several times.
The split sizes are read on the host: one sync a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.dispatch.base import Dispatched, Dispatcher, Permutation, at_least_one_row, exclusive_sum
from moetrain.moe.dispatch.collectives import all_to_all_rows, exchange_counts
from moetrain.moe.dispatch.permute import permute, permute_weights, unpermute_sum


@dataclass(frozen=True)
class _AllToAllDispatched(Dispatched):
    permutation: Permutation
    expert_order_R: Tensor  # received row (source rank major) of each row in expert order
    received_order_R: Tensor  # its inverse
    send_sizes: list[int]
    recv_sizes: list[int]


class AllToAllDispatcher(Dispatcher):
    """Experts in contiguous ranges over the ranks of `group`, E / ranks on each.

    Raises:
        ValueError: the group's size does not divide the number of experts.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        super().__init__(num_experts)
        self.group_name = group.group_name
        self.ep_size = dist.get_world_size(group)
        if num_experts % self.ep_size:
            raise ValueError(f"{num_experts} experts cannot be split evenly over {self.ep_size} ranks")
        self.num_local = num_experts // self.ep_size

    def dispatch(self, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> _AllToAllDispatched:
        permutation = Permutation(expert_ids_TK, self.num_experts)
        send_counts = permutation.counts_E.view(self.ep_size, self.num_local)
        recv_counts = exchange_counts(send_counts, self.group_name)
        send_sizes, recv_sizes = torch.stack([send_counts.sum(1), recv_counts.sum(1)]).tolist()

        used = sum(send_sizes)  # slots without an expert sort last and stay here
        rows = all_to_all_rows(permute(tokens_TH, permutation)[:used], recv_sizes, send_sizes, self.group_name)
        weights = permute_weights(weights_TK, permutation)[:used].unsqueeze(1)
        weights = all_to_all_rows(weights, recv_sizes, send_sizes, self.group_name).squeeze(1)

        expert_order, received_order = _expert_major(recv_counts, sum(recv_sizes))
        return _AllToAllDispatched(
            rows_RH=at_least_one_row(rows[expert_order]),
            offsets_e=recv_counts.sum(0).cumsum(0).to(torch.int32),
            weights_R=at_least_one_row(weights[expert_order]),
            permutation=permutation,
            expert_order_R=expert_order,
            received_order_R=received_order,
            send_sizes=send_sizes,
            recv_sizes=recv_sizes,
        )

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        assert isinstance(dispatched, _AllToAllDispatched)
        rows = rows_RH[dispatched.received_order_R]
        rows = all_to_all_rows(rows, dispatched.send_sizes, dispatched.recv_sizes, self.group_name)
        num_slots = dispatched.permutation.order_N.numel()
        if rows.shape[0] < num_slots:
            rows = torch.cat([rows, rows.new_zeros(num_slots - rows.shape[0], rows.shape[1])])
        return unpermute_sum(rows, dispatched.permutation)


def _expert_major(recv_counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Orders between rows as received (source rank, then expert) and as computed (expert, then source rank).

    Args:
        recv_counts: int64 [ranks, e], rows received from each rank for each local expert.

    Returns:
        received row of each computed row, and computed row of each received row: int64 [R].
    """
    starts = exclusive_sum(recv_counts.t().reshape(-1)).view(recv_counts.shape[1], recv_counts.shape[0]).t()
    shift = (starts.reshape(-1) - exclusive_sum(recv_counts.reshape(-1))).repeat_interleave(
        recv_counts.reshape(-1), output_size=num_rows
    )
    received = torch.arange(num_rows, device=recv_counts.device)
    computed_of_received = received + shift
    received_of_computed = torch.empty_like(received).scatter_(0, computed_of_received, received)
    return received_of_computed, computed_of_received
