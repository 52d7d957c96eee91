"""A thread for what may be slow: the console and the file. Whoever hands it work never waits."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

LIMIT = 20_000
"""Jobs that may wait, an hour of short steps; what comes beyond is dropped."""

logger = logging.getLogger(__name__)


class Background:
    """Runs jobs one after the other, in the order in which they came, on a thread of its own."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._limit = limit
        self.dropped = 0
        """Jobs that found no room."""
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="moetrain-records", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job run soon; it is dropped where too many wait."""
        if self._jobs.qsize() < self._limit:
            self._jobs.put(job)
        else:
            self.dropped += 1

    def close(self, seconds: float) -> bool:
        """Wait for the jobs that were handed in, but not longer than `seconds`; whether all of them ran."""
        self._jobs.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive() and not self.dropped

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # a terminal or a disk that fails must not end training, nor the later jobs
                if not self._failed:
                    logger.warning(
                        "a record of the run was lost, training goes on: %s: %s", type(error).__name__, error
                    )
                self._failed = True
