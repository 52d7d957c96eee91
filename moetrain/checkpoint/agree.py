"""What the ranks of a run tell each other around files: every call here is collective, a no-op with one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """The value of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def share(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def together() -> Iterator[None]:
    """When the body raises on one rank, every rank raises, instead of waiting for it in the next collective.

    The body may hold no collective that a failing rank would miss. Other ranks raise ValueError or OSError as the
    failing one did, RuntimeError for anything else, with its rank and message.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    kind = next((k for k in (ValueError, OSError) if isinstance(error, k)), RuntimeError)
    failures = gather(None if error is None else (kind, str(error)))
    if error is not None:
        raise error
    for failed_rank, failure in enumerate(failures):
        if failure is not None:
            raise failure[0](f"rank {failed_rank}: {failure[1]}")
