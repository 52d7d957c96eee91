"""Work that nothing waits for soon, on a second stream: gradients of weights beside the exchange of the next layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_stream: torch.cuda.Stream | None = None
_running: list[Any] = []
"""Tensors that the second stream works on; kept, since their memory belongs to the first."""


@contextmanager
def work_aside(enabled: bool = True) -> Iterator[None]:
    """Inside, `aside` uses a second stream, which has joined again at the end."""
    global _stream
    before, _stream = _stream, torch.cuda.Stream() if enabled and torch.cuda.is_available() else None
    try:
        yield
    finally:
        join_aside()
        _stream = before


def run_now(work: Callable[..., Any], *tensors: Any) -> Any:
    """`work(*tensors)`, where `aside` may not be used."""
    return work(*tensors)


def aside(work: Callable[..., Any], *tensors: Any) -> Any:
    """`work(*tensors)`, inside `work_aside` on the second stream: its result may be used after `join_aside`. What was
    put aside before joins first, so that one piece of work at most is under way."""
    if _stream is None:
        return work(*tensors)
    join_aside()
    _stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_stream):
        result = work(*tensors)
    _running.extend(tensors)  # not the result: autograd copies a gradient that somebody else holds
    return result


def runs_aside() -> bool:
    """Whether work that is launched now goes to the second stream."""
    return _stream is not None and torch.cuda.current_stream() == _stream


def join_aside() -> None:
    """Let the current stream wait for what was put aside."""
    if _running and _stream is not None:
        torch.cuda.current_stream().wait_stream(_stream)
    _running.clear()
