"""A memory of what dispatch and combine received, for selective activation checkpointing.

Torch's own selective checkpointing matches every operator of the recomputation with the forward's by position, which
the hooks of nested FSDP2 groups break. Only communication is to be kept here, so only communication keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map_only

Received = TypeVar("Received")


class _Tape:
    """What the exchanges of one checkpointed region received, in order.

    It holds no autograd history: the history holds the tape, and would never be freed without a backward.
    """

    def __init__(self) -> None:
        self.received: list[Any] = []
        self.position = 0
        self.replays = False

    def next(self, exchange: Callable[[], Any]) -> Any:
        if not self.replays:
            received = exchange()
            self.received.append(_detached(received))
            return received
        self.position += 1
        return _detached(self.received[self.position - 1])


def _detached(received: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, received)


_tape: ContextVar[_Tape | None] = ContextVar("tape", default=None)


def receive(exchange: Callable[[], Received]) -> Received:
    """What `exchange` returns; in a recomputation, what it returned in the forward, without calling it."""
    tape = _tape.get()
    return exchange() if tape is None else tape.next(exchange)


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
