"""How often a run was started, and when first: a small file in its folder.

metrics.jsonl cannot tell: it begins anew where there is no checkpoint to go on from, and a start that fails before its
first record leaves nothing in it.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

FILE_NAME = "starts.json"

logger = logging.getLogger(__name__)


class Starts(NamedTuple):
    """Of a run that is not done yet, this start included."""

    number: int
    first: float
    """Unix time."""


def count_start(folder: Path, now: float, goes_on: bool = True) -> Starts:
    """Add a start at the Unix time `now`. A folder that takes no file is a warning.

    Args:
        goes_on: with the run that is in the folder; otherwise this is the first start of a new one.
    """
    before = _read(folder / FILE_NAME) if goes_on else None
    starts = Starts(1, now) if before is None else Starts(before.number + 1, before.first)
    _write(folder / FILE_NAME, starts)
    return starts


def uncount_start(folder: Path, starts: Starts) -> None:
    """Take back the newest start, which `count_start` has returned."""
    if starts.number > 1:
        _write(folder / FILE_NAME, starts._replace(number=starts.number - 1))
    else:
        forget_starts(folder)


def forget_starts(folder: Path) -> None:
    """The run is done: the next start in its folder is a first one."""
    try:
        (folder / FILE_NAME).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed, the next start will count as a restart: %s", folder, error.strerror)


def _write(path: Path, starts: Starts) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(starts._asdict()) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s cannot be written, so this start will not count: %s", path, error.strerror)


def _read(path: Path) -> Starts | None:
    """None for a file that is not there or cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Starts(int(found["number"]), float(found["first"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
