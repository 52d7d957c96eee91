"""Where a rank's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moetrain.metrics.records import PHASES


class PhaseClock:
    """Charges every moment since its start to exactly one phase: the innermost that is entered, else `other`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._now = now
        self._current, self._since = "other", now()
        self._read = dict(self.seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, time belongs to `name`."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def read(self) -> dict[str, float]:
        """Seconds of each phase until now."""
        self._switch(self._current)
        self._read = dict(self.seconds)
        return self._read

    def move(self, seconds: float, source: str, target: str) -> float:
        """Seconds of `source` that were found to be `target`'s; how many were moved. Not more than came since the last
        `read`: who has read a phase sees it only grow."""
        self._switch(self._current)
        moved = min(max(seconds, 0.0), self.seconds[source] - self._read[source])
        self.seconds[source] -= moved
        self.seconds[target] += moved
        return moved

    def _switch(self, name: str) -> str:
        """Charge what has passed, and go on in phase `name`; the phase before it."""
        assert name in self.seconds, name
        now = self._now()
        self.seconds[self._current] += now - self._since
        before, self._current, self._since = self._current, name, now
        return before
