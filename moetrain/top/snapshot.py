"""What is known of a run at one moment, wherever it comes from, and what is wrong with it.

Thresholds are those of the alert rules (monitoring/rules), so that a terminal and an alert say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from moetrain.metrics import bytes_text
from moetrain.report.text import duration, share

STALL_STEPS, STALL_FLOOR_SECONDS = 10, 120.0
"""A step that takes so many times the usual time, and at least so long, is a stall."""
BELOW_PLAN = 0.8
SLOW_RANK, SLOW_SHARE_OF_STEP = 1.1, 0.03
"""Own computation over the median rank's, and the least lead as a share of the step."""
FULL = 0.95
OVERLOADED = 8.0
REDOS_OF_STEPS = 0.05
LATE_SECONDS = 300.0
"""Beyond two intervals between checkpoints."""


@dataclass
class Rank:
    """A rank and its own computation in a step."""

    rank: str
    seconds: float
    node: str = ""

    def __str__(self) -> str:
        return f"{self.rank} ({self.node})" if self.node else self.rank


@dataclass
class Snapshot:
    """NaN stands for what is not known."""

    run: str
    now: float
    """Unix time."""
    state: str = "waiting"
    """`waiting`, `setup`, `train`, `evaluate`, `checkpoint`, `done`, or why it ended."""
    ended: bool = False
    step: int = 0
    total_steps: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the newest steps, oldest first."""
    validation_loss: float = math.nan
    grad_norm: float = math.nan
    lr: float = math.nan
    speeds: list[float] = field(default_factory=list)
    """Tokens per second and GPU, oldest first."""
    speed: float = math.nan
    """Tokens per second and GPU now, without the noise of single steps."""
    expected_speed: float = math.nan
    mfu: float = math.nan
    step_seconds: float = math.nan
    left_seconds: float = math.nan
    last_step_time: float = math.nan
    """Unix time."""
    memory: float = math.nan
    """Bytes of the fullest rank that is known: peak."""
    memory_reserved: float = math.nan
    memory_total: float = math.nan
    memory_rank: str = "0"
    balance: float = math.nan
    """Busiest expert over the mean, worst layer."""
    balance_layer: str = ""
    idle_experts: float = math.nan
    ranks: int = 0
    ranks_up: int = 0
    slow_ranks: list[Rank] = field(default_factory=list)
    """Slowest first."""
    median_rank_seconds: float = math.nan
    phases: dict[str, float] = field(default_factory=dict)
    """Share of each in the newest time."""
    checkpoint_time: float = math.nan
    """Unix time of the newest training checkpoint."""
    checkpoint_step: float = math.nan
    checkpoint_interval: float = math.nan
    """Seconds expected between two."""
    restarts: int = 0
    nonfinite: bool = False
    """The newest step, or the one that ended the run."""
    redos_share: float = math.nan
    """Steps that ran again for lack of room, of the newest."""
    checkpoint_failed: bool = False
    """The newest attempt."""
    events: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    """Firing ones, by name."""
    trouble: str = ""
    """Why what is shown may be old."""

    @property
    def of_plan(self) -> float:
        return self.speed / self.expected_speed if self.expected_speed > 0 else math.nan

    @property
    def memory_share(self) -> float:
        return self.memory / self.memory_total if self.memory_total > 0 else math.nan

    @property
    def silence(self) -> float:
        """Seconds since the last step."""
        return self.now - self.last_step_time


def warnings(shot: Snapshot) -> list[str]:
    """What somebody should look at, worst first."""
    return list(_warnings(shot))


def _warnings(shot: Snapshot) -> Iterator[str]:
    if shot.trouble:
        yield shot.trouble
    if shot.alerts:
        yield "alerts firing: " + ", ".join(shot.alerts)
    if shot.nonfinite:
        yield "loss or gradient norm is not finite"
    limit = max(STALL_STEPS * _or(shot.step_seconds, 0.0), STALL_FLOOR_SECONDS)
    if not shot.ended and shot.state == "train" and shot.silence > limit:
        yield f"no step for {duration(shot.silence)}"
    if 0 < shot.ranks_up < shot.ranks:
        yield f"{shot.ranks - shot.ranks_up} of {shot.ranks} ranks do not answer"
    if shot.of_plan < BELOW_PLAN:
        yield f"{share(shot.of_plan)} of the planned speed"
    for slow in shot.slow_ranks[:1]:
        lead, middle = slow.seconds - shot.median_rank_seconds, shot.median_rank_seconds
        if slow.seconds > SLOW_RANK * middle and lead > SLOW_SHARE_OF_STEP * shot.step_seconds:
            yield f"rank {slow} computes {share(lead / middle)} longer than the median"
    if shot.memory_share > FULL:
        yield f"rank {shot.memory_rank} has {bytes_text(shot.memory_total - shot.memory)} of memory left"
    if shot.balance > OVERLOADED:
        yield f"busiest expert has {shot.balance:.1f} times the mean load"
    if shot.idle_experts > 0:
        yield f"{shot.idle_experts:.0f} experts without a token"
    if shot.redos_share > REDOS_OF_STEPS:
        yield f"{share(shot.redos_share)} of the steps ran again for lack of room in the exchange"
    if shot.checkpoint_failed:
        yield "the newest checkpoint could not be written"
    age = shot.now - _or(shot.checkpoint_time, shot.now)
    if not shot.ended and age > 2 * _or(shot.checkpoint_interval, math.inf) + LATE_SECONDS:
        yield f"the newest checkpoint is {duration(age)} old"


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value
