"""A run from its metrics.jsonl, which may not be there yet, grow, be cut short, or be replaced when the run resumes."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetrain.metrics import FILE_NAME
from moetrain.report.history import ENDS, Record, number_of, phases_of
from moetrain.report.summary import event_text
from moetrain.report.text import clock
from moetrain.top.snapshot import Rank, Snapshot

STEPS_KEPT = 2000
RECENT = 50
"""Steps over which rates and shares are taken."""
EVENTS_KEPT = 20
FINGERPRINT = 200
"""Bytes of a file's beginning that tell it from another: the first record has a time."""


class Follower:
    """Reads whole new lines of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._rest, self._head, self._inode = 0, b"", b"", 0

    def poll(self) -> tuple[bool, list[bytes]]:
        """Whether the file is another than before, so that what was read of it no longer counts, and its new lines."""
        try:
            with self._path.open("rb") as file:
                changed = self._changed(file)
                if changed:
                    self._forget()
                file.seek(self._offset)
                pieces = (self._rest + file.read()).split(b"\n")
                self._offset = file.tell()
                self._inode = os.fstat(file.fileno()).st_ino
                file.seek(0)
                self._head = file.read(min(FINGERPRINT, self._offset))
        except FileNotFoundError:
            changed = self._offset > 0
            self._forget()
            return changed, []
        self._rest = pieces.pop()
        return changed, pieces

    def _changed(self, file: Any) -> bool:
        stat = os.fstat(file.fileno())
        if stat.st_size < self._offset or (self._offset and stat.st_ino != self._inode):
            return True
        return bool(file.read(len(self._head)) != self._head)

    def _forget(self) -> None:
        self._offset, self._rest, self._head, self._inode = 0, b"", b"", 0


class FileSource:
    """Snapshots of the run in `folder`."""

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        self._folder = Path(folder)
        self._follower = Follower(self._folder / FILE_NAME)
        self._forget()

    def read(self) -> Snapshot:
        """What the file says now. Raises OSError where it cannot be read."""
        changed, lines = self._follower.poll()
        if changed:
            self._forget()
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                self._take(record)
        return self._snapshot()

    def _forget(self) -> None:
        self._about: Record = {}
        self._end: Record = {}
        """The event that ended the run, if nothing went on after it but its last checkpoint."""
        self._steps: deque[Record] = deque(maxlen=STEPS_KEPT)
        self._eval: Record = {}
        self._events: deque[Record] = deque(maxlen=EVENTS_KEPT)
        self._saved: list[Record] = []
        """The two newest checkpoints."""
        self._starts = 0

    def _take(self, record: Record) -> None:
        kind = record.get("kind")
        if kind == "run":
            self._about, self._starts = record, self._starts + 1
            # what a start repeats does not count twice
            start = record.get("start_step")
            while self._steps and isinstance(start, int) and self._steps[-1]["step"] > start:
                self._steps.pop()
        elif kind == "step" and isinstance(record.get("step"), int):
            self._steps.append(record)
        elif kind == "eval":
            self._eval = record
        elif kind == "event":
            self._events.append(record)
            if record.get("event") == "checkpoint":
                self._saved = [*self._saved[-1:], record]
            elif record.get("event") in ENDS:
                self._end = record
        if kind in ("run", "step"):
            self._end = {}

    def _snapshot(self) -> Snapshot:
        run = str(self._about.get("run") or self._folder.resolve().name)
        shot = Snapshot(run=run, now=time.time(), restarts=max(self._starts - 1, _int(self._about.get("restarts"))))
        shot.total_steps = _int(self._about.get("total_steps"))
        shot.ranks = max(_int(self._about.get("world_size")), 1)
        shot.events = [f"{clock(number_of(e.get('time')))} UTC  {event_text(e)}" for e in self._events]
        shot.validation_loss = number_of(self._eval.get("loss"))
        if self._about:
            shot.state = "setup"
        if self._steps:
            self._add_steps(shot)
        self._add_checkpoints(shot)
        self._add_end(shot)
        return shot

    def _add_steps(self, shot: Snapshot) -> None:
        steps, last = list(self._steps), self._steps[-1]
        recent = steps[-RECENT:]
        shot.state, shot.step, shot.last_step_time = "train", last["step"], number_of(last.get("time"))
        shot.losses = _column(steps, "loss")
        shot.speeds = [speed / shot.ranks for speed in _column(steps, "tokens_per_second")]
        shot.speed = _median(shot.speeds[-RECENT:])
        shot.expected_speed = number_of(self._about.get("expected_tokens_per_second_per_gpu"))
        flops, peak = (number_of(self._about.get(name)) for name in ("flops_per_token", "peak_flops"))
        shot.mfu = shot.speed * flops / peak
        shot.step_seconds = _median(_column(recent, "step_seconds"))
        shot.grad_norm, shot.lr = number_of(last.get("grad_norm")), number_of(last.get("lr"))
        shot.nonfinite = not (math.isfinite(shot.losses[-1]) and math.isfinite(shot.grad_norm))
        per_step = _seconds_per_step(recent)
        shot.left_seconds = max(shot.total_steps - shot.step, 0) * per_step
        shot.memory = max(_column(recent, "memory_bytes"), default=math.nan)
        shot.memory_reserved = number_of(last.get("memory_reserved_bytes"))
        shot.memory_total = number_of(last.get("memory_total_bytes"))
        self._add_balance(shot, recent)
        middle = [number_of(record.get("median_rank_seconds")) for record in recent]
        shot.median_rank_seconds = _median(middle)
        shot.slow_ranks = _slow_ranks(recent)
        sums: dict[str, float] = {}
        for record in recent:
            for phase, seconds in phases_of(record).items():
                sums[phase] = sums.get(phase, 0.0) + seconds
        whole = sum(sums.values())
        shot.phases = {phase: seconds / whole for phase, seconds in sums.items()} if whole > 0 else {}
        shot.redos_share = sum(1 for record in recent if record.get("redos")) / len(recent)

    def _add_balance(self, shot: Snapshot, recent: Sequence[Record]) -> None:
        shot.balance = _median(_column(recent, "expert_load_max_over_mean"))
        # an expert is idle that gets nothing for a while, not in one small step
        shot.idle_experts = min(_column(recent, "idle_experts"), default=math.nan)
        layers = recent[-1].get("layers")
        loads = layers.get("max_over_mean") if isinstance(layers, dict) else None
        if isinstance(loads, list) and loads:
            worst = max(range(len(loads)), key=lambda layer: number_of(loads[layer]))
            names = self._about.get("layers")
            named = isinstance(names, list) and len(names) == len(loads)
            shot.balance_layer = str(names[worst]) if isinstance(names, list) and named else str(worst)

    def _add_checkpoints(self, shot: Snapshot) -> None:
        if self._saved:
            shot.checkpoint_time = number_of(self._saved[-1].get("time"))
            shot.checkpoint_step = number_of(self._saved[-1].get("step"))
        if len(self._saved) == 2:
            between = number_of(self._saved[1].get("step")) - number_of(self._saved[0].get("step"))
            shot.checkpoint_interval = between * shot.step_seconds if between > 0 else math.nan
        tried = [e for e in self._events if str(e.get("event")).startswith("checkpoint")]
        shot.checkpoint_failed = bool(tried) and tried[-1].get("event") == "checkpoint_failed"

    def _add_end(self, shot: Snapshot) -> None:
        """A run is over with its last step, or with an event that ends it and that no start follows."""
        event = self._end.get("event")
        if event == "stop":
            signal = self._end.get("signal", "a signal")
            shot.state, shot.ended = f"stopped by {signal}, the same command goes on", True
        elif event == "nonfinite":
            shot.state, shot.ended, shot.nonfinite = "failed", True, True
        elif event == "done" or (shot.total_steps and shot.step >= shot.total_steps):
            shot.state, shot.ended = "done", True


def _column(records: Sequence[Record], name: str) -> list[float]:
    return [number_of(record.get(name)) for record in records]


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.median(known) if known else math.nan


def _seconds_per_step(recent: Sequence[Record]) -> float:
    """By the clock, so that evaluations and checkpoints count."""
    if len(recent) < 2:
        return number_of(recent[-1].get("step_seconds"))
    first, last = recent[0], recent[-1]
    steps = last["step"] - first["step"]
    return (number_of(last.get("time")) - number_of(first.get("time"))) / steps if steps > 0 else math.nan


def _slow_ranks(recent: Sequence[Record]) -> list[Rank]:
    """Ranks that a step names, with the median of their seconds over the steps that name them; a rank that is named
    in fewer than half of them was slow by chance."""
    seconds: dict[int, list[float]] = {}
    named = 0
    for record in recent:
        ranks = record.get("slow_ranks")
        ranks = ranks if isinstance(ranks, list) else []
        named += bool(ranks)
        for entry in ranks:
            if isinstance(entry, dict) and isinstance(entry.get("rank"), int):
                seconds.setdefault(entry["rank"], []).append(number_of(entry.get("seconds")))
    often = {rank: values for rank, values in seconds.items() if 2 * len(values) >= named}
    return sorted((Rank(str(rank), _median(values)) for rank, values in often.items()), key=lambda r: -r.seconds)


def _int(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
