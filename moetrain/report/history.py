"""What a run's folder holds, as columns over its steps. Files of earlier versions have fewer of them.

Shape suffixes: S steps, V evaluations, L layers with experts.
"""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.metrics import FILE_NAME, iter_records
from moetrain.report.curves import FloatArray, IntArray
from moetrain.report.settings import CONFIG_FILE

Record = dict[str, Any]

SCALARS = (
    *("time", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds"),
    *("memory_bytes", "memory_reserved_bytes", "memory_total_bytes"),
    *("expert_load_max_over_mean", "idle_experts", "load_entropy"),
)
"""Numbers of a step record that are columns; one that a record lacks is NaN."""
ENDS = ("stop", "nonfinite", "done")
"""Events that end a run."""


@dataclass(frozen=True)
class History:
    """One run."""

    folder: Path
    name: str
    about: Record
    """The newest `run` record."""
    starts: list[Record]
    """All `run` records: one each time a process began to write."""
    steps_S: IntArray
    columns: dict[str, FloatArray]
    """[S] each, by `SCALARS`."""
    phases: dict[str, FloatArray]
    """Seconds of each phase of a step, [S] each, computation first; empty where none were recorded."""
    layers: list[str]
    """Names."""
    balance_SL: np.ndarray[Any, np.dtype[np.float32]]
    """Busiest expert's load over the mean, NaN where unknown."""
    idle_SL: np.ndarray[Any, np.dtype[np.float32]]
    """Experts without a token."""
    slow_ranks: list[tuple[int, int, float]]
    """Rank, steps in which it was the slowest by own computation, and its mean lead over the median rank there, as a
    share of the median; most often first."""
    eval_steps_V: IntArray
    eval_losses_V: FloatArray
    events: list[Record]
    config: str
    """The configuration's text, empty where there is none."""

    def __getitem__(self, column: str) -> FloatArray:
        return self.columns[column]

    @property
    def ranks(self) -> int:
        """GPUs, or processes on CPUs; 1 where the file does not say."""
        ranks = self.about.get("world_size")
        return ranks if isinstance(ranks, int) and ranks > 0 else 1

    @property
    def total_steps(self) -> int | None:
        total = self.about.get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def expected_tps(self) -> float:
        """Tokens per second and GPU that were planned; NaN where none were."""
        return number_of(self.about.get("expected_tokens_per_second_per_gpu"))

    @property
    def mfu(self) -> float:
        """Model FLOP/s of the median step over the GPU's peak; NaN where either is unknown."""
        flops, peak = (number_of(self.about.get(name)) for name in ("flops_per_token", "peak_flops"))
        speeds = self["tokens_per_second"][np.isfinite(self["tokens_per_second"])]
        return float(np.median(speeds)) / self.ranks * flops / peak if len(speeds) and peak > 0 else math.nan

    @property
    def vocab_size(self) -> int | None:
        size = self.about.get("vocab_size") or _exported_vocab_size(self.folder)
        return size if isinstance(size, int) and size > 1 else None


def read_history(folder: str | Path) -> History:
    """Read `metrics.jsonl`, `config.yaml` and the exported model's vocabulary. A step that is there twice counts once,
    as it was written last; lines that are torn or are no records are passed over.

    Raises:
        ValueError: there is no metrics.jsonl, or it holds neither a step nor an evaluation.
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"no {FILE_NAME} in {folder}: name the output_dir of a run")
    columns = _Columns()
    for record in iter_records(path):
        columns.add(record)
    if not columns.rows and not columns.evals:
        raise ValueError(f"{path} holds no step yet")
    config = folder / CONFIG_FILE
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return columns.history(folder, text)


class _Columns:
    """Takes records in the order of the file."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}  # of each step, the newest
        self.added = 0
        self.scalars = {name: array("d") for name in SCALARS}
        self.phases: dict[str, array[float]] = {}
        self.balance: list[array[float]] = []
        self.idle: list[array[float]] = []
        self.leads: dict[int, list[float]] = {}  # by rank
        self.evals: dict[int, float] = {}
        self.starts: list[Record] = []
        self.events: list[Record] = []

    def add(self, record: Record) -> None:
        kind, step = record["kind"], record.get("step")
        if kind == "run":
            self.starts.append(record)
        elif kind == "event":
            self.events.append(record)
        elif not isinstance(step, int):
            return
        elif kind == "eval":
            self.evals[step] = number_of(record.get("loss"))
        elif kind == "step":
            self._add_step(step, record)

    def _add_step(self, step: int, record: Record) -> None:
        self.rows[step] = self.added
        for name, column in self.scalars.items():
            column.append(number_of(record.get(name)))
        for name, seconds in phases_of(record).items():
            # a phase that appears late was not there before
            self.phases.setdefault(name, array("d", [0.0]) * self.added).append(seconds)
        for column in self.phases.values():
            column.extend([0.0] * (self.added + 1 - len(column)))
        layers = record.get("layers")
        for name, rows in (("max_over_mean", self.balance), ("idle_experts", self.idle)):
            values = layers.get(name) if isinstance(layers, dict) else None
            rows.append(array("f", [number_of(value) for value in values] if isinstance(values, list) else []))
        slowest, middle = slowest_rank(record), number_of(record.get("median_rank_seconds"))
        if slowest is not None and middle > 0:
            self.leads.setdefault(slowest[0], []).append(slowest[1] / middle - 1)
        self.added += 1

    def history(self, folder: Path, config: str) -> History:
        steps = sorted(self.rows)
        rows = np.array([self.rows[step] for step in steps], dtype=np.int64)
        about = self.starts[-1] if self.starts else {}
        known = about.get("layers")
        count = max((len(values) for values in self.balance), default=0)
        names = [str(name) for name in known] if isinstance(known, list) and len(known) == count else []
        names = names or [str(layer) for layer in range(count)]
        slow_ranks = [(rank, len(leads), sum(leads) / len(leads)) for rank, leads in self.leads.items()]
        slow_ranks.sort(key=lambda found: -found[1])
        return History(
            folder=folder,
            name=str(about.get("run") or folder.resolve().name),
            about=about,
            starts=self.starts,
            steps_S=np.array(steps, dtype=np.int64),
            columns={name: np.array(column)[rows] for name, column in self.scalars.items()},
            phases={name: np.array(self.phases[name])[rows] for name in sorted(self.phases, key=_phase_order)},
            layers=names,
            balance_SL=_by_layer(self.balance, rows, len(names)),
            idle_SL=_by_layer(self.idle, rows, len(names)),
            slow_ranks=slow_ranks,
            eval_steps_V=np.array(sorted(self.evals), dtype=np.int64),
            eval_losses_V=np.array([self.evals[step] for step in sorted(self.evals)]),
            events=self.events,
            config=config,
        )


def phases_of(record: Record) -> dict[str, float]:
    """Seconds by phase of a step record."""
    return _numbers(record.get("phase_seconds"))


def _phase_order(name: str) -> int:
    order = ("forward_backward", "optimizer", "collective_wait", "data_wait", "evaluate", "checkpoint")
    return order.index(name) if name in order else len(order)


def slowest_rank(record: Record) -> tuple[int, float] | None:
    """The slowest rank of a step record and its seconds of own computation."""
    ranks = record.get("slow_ranks")
    first = ranks[0] if isinstance(ranks, list) and ranks else None
    if not isinstance(first, dict) or not isinstance(first.get("rank"), int):
        return None
    return first["rank"], number_of(first.get("seconds"))


def _by_layer(values: list[array[float]], rows: IntArray, layers: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[S, L]; a step with another number of layers tells nothing."""
    table = np.full((len(rows), layers), np.nan, dtype=np.float32)
    for i, row in enumerate(rows):
        if len(values[row]) == layers:
            table[i] = values[row]
    return table


def _numbers(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        return {}
    return {str(name): number for name, inner in value.items() if math.isfinite(number := number_of(inner))}


def number_of(value: object) -> float:
    """A number of a record; NaN for null, which stands for what is not finite, and for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _exported_vocab_size(folder: Path) -> int | None:
    """From the exported model's configuration, where there is one."""
    config = folder / "model" / "config.json"
    if not config.is_file():
        return None
    try:
        raw = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return None
    text_config = raw.get("text_config") or {}
    size = raw.get("vocab_size") or text_config.get("vocab_size")
    return int(size) if size else None
