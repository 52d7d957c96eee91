"""Seconds of sections that the device goes through, without making the host wait for it.

On a GPU a section is two events on the current stream; they are read after the host has waited for the step anyway.
Inside a CUDA graph, where events tell no times, two kernels of one program add the GPU's own clock to a counter, which
comes to the host with the step's other numbers. On a CPU it is the host's own time.

A step of many layers has hundreds of exchanges, and each measurement costs the host some 15 microseconds, or the
device one. Of sections that are `many` alike a GPU measures a few, each of which counts for as many as it stands for.
Which ones, the golden ratio says: its multiples, without their whole parts, lie evenly in any stretch of them, so that
a step's few are spread over its layers, and the next step's are others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

EAGER, CAPTURED = 3, 24
"""Of the sections alike in a step, about how many are measured by events, and how many inside a CUDA graph, which
measures the same ones in each replay."""
GOLDEN = (5**0.5 - 1) / 2
_UNTIMED = nullcontext()

_active: DeviceTimes | None = None


class DeviceTimes:
    """Adds up the sections that pass while it is entered, by name.

    Attributes:
        counter: int64 [1] on the device, nanoseconds of `collective_wait` inside CUDA graphs since the start. It is not
            read here: hand a copy to `tell`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.host: dict[str, float] = {}
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._told = 0
        self._sections = self._before = 0
        """That are many alike: all, and all before this step."""
        self._eager = self._captured = 1
        """For how many of them one stands."""
        self._spans: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []
        if self.counter.is_cuda:
            _stamp(self.counter, 0)  # compiled and loaded now: a capture is no place for it

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Inside, `timed` sections of this process count, whatever thread they run on."""
        global _active
        before, _active = _active, self
        try:
            yield
        finally:
            _active = before

    @contextmanager
    def behind(self, name: str, device: torch.device) -> Iterator[None]:
        """A section that the host of a GPU runs ahead of; its time is there at a later `take`."""
        if device.type != "cuda":
            yield
            return
        with self.measured(), timed(name, device):
            yield

    def tell(self, nanoseconds: int) -> None:
        """What `counter` held when the device was through with the step's graphs."""
        self._add("collective_wait", (nanoseconds - self._told) / 1e9)
        self._told = nanoseconds

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call, of what the device has been through. No sync."""
        pending = []
        for span in self._spans:
            name, weight, begin, end = span
            if not end.query():
                pending.append(span)
                continue
            self._add(name, weight * begin.elapsed_time(end) / 1e3)
            self._spare += [begin, end]
        self._spans = pending
        if self.counter.is_cuda:
            number = self._sections - self._before
            self._eager, self._captured = max(1, number // EAGER), max(1, number // CAPTURED)
        self._before = self._sections
        seconds, self.host = self.host, {}
        return seconds

    def weight(self) -> int:
        """For how many sections the next of many alike counts; 0 for one that is not measured."""
        self._sections += 1
        if self._eager == 1:
            return 1
        place = self._sections * GOLDEN % 1.0
        if place * self._captured >= 1:
            return 0
        stride = self._captured if torch.cuda.is_current_stream_capturing() else self._eager
        return stride if place * stride < 1 else 0

    def mark(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add_span(self, name: str, weight: int, begin: torch.cuda.Event) -> None:
        self._spans.append((name, weight, begin, self.mark()))

    def _add(self, name: str, seconds: float) -> None:
        self.host[name] = self.host.get(name, 0.0) + seconds


def timed(name: str, device: torch.device, many: bool = False) -> AbstractContextManager[None]:
    """A section of `device`'s work. Costs nothing where nobody measures. Inside a CUDA graph only `collective_wait` can
    be measured.

    Args:
        many: one of many alike in a step, of which a sample is enough.
    """
    if _active is None or not (weight := _active.weight() if many else 1):
        return _UNTIMED
    return _section(_active, name, device, weight)


@contextmanager
def _section(times: DeviceTimes, name: str, device: torch.device, weight: int) -> Iterator[None]:
    if device.type == "cpu":
        begin = time.perf_counter()
        yield
        times._add(name, time.perf_counter() - begin)
    elif device.type != "cuda":
        yield
    elif torch.cuda.is_current_stream_capturing():
        assert name == "collective_wait", name
        _stamp(times.counter, -weight)
        yield
        _stamp(times.counter, weight)
    else:
        mark = times.mark()
        yield
        times.add_span(name, weight, mark)


def _stamp(counter: Tensor, weight: int) -> None:
    from moetrain.kernels.clock import stamp  # whose package needs this module

    stamp(counter, weight)
