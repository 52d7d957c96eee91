"""What is written of a run, and how it is read again."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE_NAME = "metrics.jsonl"
PHASES = ("data_wait", "forward_backward", "collective_wait", "optimizer", "evaluate", "checkpoint", "other")
"""What the time of a rank is spent on; they are disjoint and add up to it."""
SLOW_RANKS = 3
"""Ranks that a record names."""


class Memory(NamedTuple):
    """Bytes of a rank's GPU; on a CPU the greatest resident set so far, and the machine's memory as `total`."""

    allocated: int
    reserved: int
    peak: int
    """Most that was allocated since the record before; on a CPU, since the start."""
    total: int


@dataclass(frozen=True)
class LayerLoads:
    """Balance of each layer with experts over a step, all ranks; equally long lists."""

    max_over_mean: list[float]
    """Busiest expert's tokens over the mean; 1 is perfect."""
    min_over_mean: list[float]
    """Least busy expert's."""
    idle_experts: list[int]
    """Experts without a token."""
    entropy: list[float]
    """Of the load over experts, as a share of its maximum ln E; 1 is perfect."""


@dataclass
class StepRecord:
    """One optimizer step, over all ranks except where it says rank. Not frozen: that would cost more than all else that
    is done with it on the training thread."""

    step: int
    """Counts from 1."""
    loss: float
    """Mean over the label tokens of the step, in nats."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    tokens: int
    """Label tokens of the step, all ranks."""
    tokens_per_second: float
    """All ranks; all tokens, padding of unpacked rows excluded."""
    step_seconds: float
    memory_bytes: int
    """This rank: `Memory.peak`."""
    expert_load_max_over_mean: float | None = None
    """Busiest expert's tokens over the mean, worst layer; 1 is perfect. None for a dense model."""
    idle_experts: int | None = None
    """Experts without a token in this step, summed over layers."""
    load_entropy: float | None = None
    """Entropy of the load over experts as a share of its maximum, worst layer; 1 is perfect."""
    seen_tokens: int = 0
    """Tokens that went through the model, all ranks."""
    layers: LayerLoads | None = None
    rank_tokens: int = 0
    """This rank: tokens that went through the model."""
    rank_label_tokens: int = 0
    """This rank."""
    memory: Memory | None = None
    """This rank."""
    redos: int = 0
    """Times that the passes were run again because rows did not fit."""
    rank_seconds: Sequence[float] | None = None
    """Own computation of every rank in the step before this one."""
    expert_tokens_LE: NDArray[np.float64] | None = field(default=None, compare=False)
    """Tokens of each layer's experts, all ranks, where they were asked for."""

    def fields(self) -> dict[str, Any]:
        """The record in metrics.jsonl, without the time by phase."""
        names = (*_SCALARS, *(("expert_load_max_over_mean", "idle_experts", "load_entropy")))
        out: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.seen_tokens:
            out["seen_tokens"] = self.seen_tokens
        if self.memory is not None:
            out |= {f"memory_{name}_bytes": getattr(self.memory, name) for name in ("allocated", "reserved", "total")}
        if self.layers is not None:
            out["layers"] = {name: _short(values) for name, values in vars(self.layers).items()}
        if self.redos:
            out["redos"] = self.redos
        if self.rank_seconds is not None:
            order = sorted(range(len(self.rank_seconds)), key=self.rank_seconds.__getitem__)
            slowest = order[: -SLOW_RANKS - 1 : -1]
            out["slow_ranks"] = [{"rank": r, "seconds": round(self.rank_seconds[r], 4)} for r in slowest]
            out["median_rank_seconds"] = round(statistics.median(self.rank_seconds), 4)
        return out


_SCALARS = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "memory_bytes")


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation."""

    step: int
    """Optimizer steps done; 0 is before training."""
    loss: float
    """Mean over the validation tokens, in nats."""
    tokens: int
    """Label tokens, all ranks."""


@dataclass(frozen=True)
class Expectation:
    """What a run is held against; NaN is not known."""

    tokens_per_second_per_gpu: float = math.nan
    """Of the plan."""
    flops_per_token: float = math.nan
    """Forward, loss and backward, without recomputation."""
    peak_flops: float = math.nan
    """Dense bf16 operations a second of one GPU, by its datasheet."""


def line_of(kind: str, time: float, record: Mapping[str, Any]) -> bytes:
    """A line of metrics.jsonl. What is not finite becomes null: JSON has no NaN."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps({"kind": kind, "time": round(time, 3), **finite}, allow_nan=False).encode() + b"\n"


def iter_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl in file order. A torn line, which a killed process may leave, is skipped."""
    with Path(path).open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "kind" in record:
                yield record


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All of `iter_records`."""
    return list(iter_records(path))


def bytes_text(count: float) -> str:
    """`812 MiB`, `39.7 GiB`."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def _short(values: list[Any]) -> list[Any]:
    """Four digits are enough for a load, and make half the file."""
    return [round(value, 4) if isinstance(value, float) and math.isfinite(value) else value for value in values]
