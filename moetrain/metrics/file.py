"""metrics.jsonl: the run by its steps. Each step is in the file once, however often the run resumed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.metrics.records import iter_records, line_of

BACKLOG = 20_000
"""Lines that are kept while the disk takes none."""
RETRY_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass
class History:
    """What a file tells of the run that it continues."""

    starts: int = 0
    """Processes that have written to it."""
    first_start: float | None = None
    """Unix time."""
    productive_seconds: float = 0.0
    """In steps whose work was kept."""
    eval_steps: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> History:
        history = cls()
        for record in records:
            if record["kind"] == "run":
                history.starts += 1
                history.first_start = history.first_start or record.get("time")
            elif record["kind"] == "step":
                history.productive_seconds += record.get("step_seconds") or 0.0
            elif record["kind"] == "eval":
                history.eval_steps.add(record["step"])
        return history


def read_history(path: Path, step: int) -> History:
    """Of a run that continues after `step`."""
    return History.of(_until(path, step)) if path.exists() else History()


class RunFile:
    """Appends records, each line whole. While the disk takes none they wait here, with one warning, and are written
    when it takes them again; training never notices.

    Args:
        start_step: continue after it: later steps in the file are dropped, as they will be made again. 0 starts a new
            file, and one that holds steps is kept under another name.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path, self._start_step = path, start_step
        self._lines: deque[bytes] = deque(maxlen=BACKLOG)
        self._lost = 0
        self._descriptor: int | None = None
        self._size = 0
        self._retry_at = 0.0

    def write(self, kind: str, record: Mapping[str, Any], now: float) -> None:
        """Add a record that was made at the Unix time `now`."""
        self._lost += len(self._lines) == BACKLOG
        self._lines.append(line_of(kind, now, record))
        if time.monotonic() >= self._retry_at:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._lines or self._lost:
            logger.warning("%s lacks %d records", self._path, len(self._lines) + self._lost)
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _flush(self) -> None:
        try:
            if self._descriptor is None:
                _continue_file(self._path, self._start_step)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                self._size = os.fstat(self._descriptor).st_size
            while self._lines:
                self._append(self._descriptor, self._lines[0])
                self._lines.popleft()
        except OSError as error:
            if not self._retry_at:
                logger.warning("%s cannot be written, training goes on: %s", self._path, error.strerror)
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return
        if self._retry_at:
            logger.warning("%s is written again", self._path)
        self._retry_at = 0.0

    def _append(self, descriptor: int, line: bytes) -> None:
        """Write a line, or nothing of it: a full disk takes half a line first."""
        try:
            written = os.write(descriptor, line)
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError:
            os.ftruncate(descriptor, self._size)
            raise
        self._size += len(line)


def _continue_file(path: Path, start_step: int) -> None:
    """Make the file ready to append to after `start_step`."""
    if not path.exists():
        return
    if start_step == 0:
        if any(record["kind"] == "step" for record in iter_records(path)):
            os.replace(path, _unused_name(path))
        else:
            path.unlink()
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in _until(path, start_step))
    os.replace(temporary, path)


def _until(path: Path, step: int) -> Iterable[dict[str, Any]]:
    return (record for record in iter_records(path) if record.get("step", 0) <= step)


def _unused_name(path: Path) -> Path:
    """`metrics.1.jsonl`, or the next number that is free."""
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate
