"""All-to-all as custom operators.

Operators, not plain calls, because selective activation checkpointing recognises what to keep by operator, and
because autograd needs their backward, which is the same exchange with the sizes swapped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


def _group(name: str) -> dist.ProcessGroup:
    # operators take no process groups, only their names
    return _resolve_process_group(name)  # type: ignore[arg-type]


@torch.library.custom_op("moetrain::exchange_counts", mutates_args=())
def exchange_counts(counts: Tensor, group_name: str) -> Tensor:
    """Row r of `counts` [ranks, n] goes to rank r; row r of the result came from rank r."""
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=_group(group_name))
    return received


@exchange_counts.register_fake
def _(counts: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(counts)


@torch.library.custom_op("moetrain::all_to_all_rows", mutates_args=())
def all_to_all_rows(rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
    """The first `send_sizes[0]` rows go to rank 0, the next `send_sizes[1]` to rank 1, ...; the result holds
    `recv_sizes[0]` rows from rank 0, then those from rank 1, ... Differentiable."""
    received = rows.new_empty(sum(recv_sizes), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), recv_sizes, send_sizes, group=_group(group_name))
    return received


@all_to_all_rows.register_fake
def _(rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
    return rows.new_empty(sum(recv_sizes), *rows.shape[1:])


def _save_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.recv_sizes, ctx.send_sizes, ctx.group_name = inputs


def _exchange_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return all_to_all_rows(grad, ctx.send_sizes, ctx.recv_sizes, ctx.group_name), None, None, None


all_to_all_rows.register_autograd(_exchange_back, setup_context=_save_sizes)

COMMUNICATION_OPS = (torch.ops.moetrain.exchange_counts.default, torch.ops.moetrain.all_to_all_rows.default)
"""What selective activation checkpointing keeps, so that recomputation sends nothing."""
