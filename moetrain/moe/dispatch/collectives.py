"""All-to-all with autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from moetrain.metrics.device import timed
from moetrain.tape import receive


def exchange_counts(counts: Tensor, group_name: str) -> Tensor:
    """Row r of `counts` [ranks, n] goes to rank r; row r of the result came from rank r."""

    def exchange() -> Tensor:
        received = torch.empty_like(counts)
        with timed("collective_wait", counts.device, many=True):
            dist.all_to_all_single(received, counts.contiguous(), group=resolve_group(group_name))
        return received

    return receive(exchange)


def all_to_all_rows(rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
    """The first `send_sizes[0]` rows go to rank 0, the next `send_sizes[1]` to rank 1, ...; the result holds
    `recv_sizes[0]` rows from rank 0, then those from rank 1, ... Differentiable."""
    received: Tensor = _AllToAllRows.apply(rows, recv_sizes, send_sizes, group_name)
    return received


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
        ctx.sizes = (send_sizes, recv_sizes, group_name)
        return receive(lambda: _exchange_rows(rows, recv_sizes, send_sizes, group_name))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange_rows(grads[0], *ctx.sizes), None, None, None


def _exchange_rows(rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
    received = rows.new_empty(sum(recv_sizes), *rows.shape[1:])
    with timed("collective_wait", rows.device, many=True):
        dist.all_to_all_single(received, rows.contiguous(), recv_sizes, send_sizes, group=resolve_group(group_name))
    return received


def resolve_group(name: str) -> dist.ProcessGroup:
    """A group by its name: modules that hold groups cannot be copied."""
    return _resolve_process_group(name)  # type: ignore[arg-type]
