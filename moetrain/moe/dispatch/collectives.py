"""All-to-all with autograd, and a memory of what it received for selective activation checkpointing.

Torch's own selective checkpointing matches every operator of the recomputation with the forward's by position, which
the hooks of nested FSDP2 groups break. Only communication is to be kept here, so only communication keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


class _Tape:
    """What the exchanges of one checkpointed region received, in order."""

    def __init__(self) -> None:
        self.received: list[Tensor] = []
        self.position = 0
        self.replays = False

    def next(self, exchange: Callable[[], Tensor]) -> Tensor:
        if not self.replays:
            self.received.append(exchange())
            return self.received[-1]
        self.position += 1
        return self.received[self.position - 1]


_tape: ContextVar[_Tape | None] = ContextVar("tape", default=None)


def keep_received() -> tuple[Any, Any]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`: the recomputation takes what the forward received and sends
    nothing."""
    tape = _Tape()
    return _Running(tape, replays=False), _Running(tape, replays=True)


class _Running:
    """Context in which a tape records or replays; a backward with `retain_graph` enters it once more."""

    def __init__(self, tape: _Tape, replays: bool) -> None:
        self.tape, self.replays = tape, replays

    def __enter__(self) -> None:
        self.tape.position, self.tape.replays = 0, self.replays
        self.token = _tape.set(self.tape)

    def __exit__(self, *_: object) -> None:
        _tape.reset(self.token)


def exchange_counts(counts: Tensor, group_name: str) -> Tensor:
    """Row r of `counts` [ranks, n] goes to rank r; row r of the result came from rank r."""

    def exchange() -> Tensor:
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts.contiguous(), group=_group(group_name))
        return received

    return _receive(exchange)


def all_to_all_rows(rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
    """The first `send_sizes[0]` rows go to rank 0, the next `send_sizes[1]` to rank 1, ...; the result holds
    `recv_sizes[0]` rows from rank 0, then those from rank 1, ... Differentiable."""
    received: Tensor = _AllToAllRows.apply(rows, recv_sizes, send_sizes, group_name)
    return received


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
        ctx.sizes = (send_sizes, recv_sizes, group_name)
        return _receive(lambda: _exchange_rows(rows, recv_sizes, send_sizes, group_name))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange_rows(grads[0], *ctx.sizes), None, None, None


def _exchange_rows(rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
    received = rows.new_empty(sum(recv_sizes), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), recv_sizes, send_sizes, group=_group(group_name))
    return received


def _receive(exchange: Callable[[], Tensor]) -> Tensor:
    tape = _tape.get()
    return exchange() if tape is None else tape.next(exchange)


def _group(name: str) -> dist.ProcessGroup:
    # a group by its name: modules that hold groups cannot be copied
    return _resolve_process_group(name)  # type: ignore[arg-type]
