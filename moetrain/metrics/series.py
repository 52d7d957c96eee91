"""What Prometheus sees of a rank. Names follow prometheus.io: base units, `_total` for counters, ratios from 0 to 1.

The training thread adds to plain numbers and publishes a copy by one assignment; the endpoint's thread turns the copy
into samples. Nothing is locked. Every series is there from the start, so that no first increase is lost.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from moetrain.metrics.records import PHASES, LayerLoads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREFIX = "moetrain_"
STEP_SECONDS_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60, 300)
STATES = ("setup", "train", "evaluate", "checkpoint", "done")
MEMORY_KINDS = ("allocated", "reserved", "peak")
WINDOW_SECONDS = 60.0
"""Longer than the time between two scrapes."""

COUNTERS = {
    "tokens": "Tokens of this rank that went through the model",
    "label_tokens": "Tokens of this rank that carried loss",
    "model_flops": "Operations of forward, loss and backward on this rank, recomputation not counted",
    "nonfinite_steps": "Steps whose loss or gradient norm was not finite; the same on all ranks",
    "overflow_redos": "Times that a step ran again because an expert's rows did not fit; the same on all ranks",
}
RUN_COUNTERS = {
    "checkpoint_saves": "Training checkpoints that were written",
    "checkpoint_failures": "Training checkpoints that could not be written",
    "checkpoint_seconds": "Seconds spent on training checkpoints",
    "productive_seconds": "Seconds in steps whose work was kept, those before a restart included",
}
GAUGES = {
    "last_step_seconds": "Duration of the newest step",
    "last_step_timestamp_seconds": "Unix time at the end of the newest step",
    "step": "Optimizer steps done",
    "steps_planned": "Optimizer steps of the whole run",
    "gpu_memory_total_bytes": "Memory of the GPU; without one, of the machine",
    "gpu_peak_flops": "Dense bf16 operations a second of the GPU, by its datasheet",
}
RUN_GAUGES = {
    "loss": "Training loss of the newest step, nats a token",
    "validation_loss": "Loss of the newest evaluation, nats a token",
    "gradient_norm": "Global gradient norm of the newest step, before clipping",
    "learning_rate": "Learning rate of the newest step",
    "expected_tokens_per_second_per_gpu": "Throughput of the plan",
    "restarts": "Times that the run was started again, since its first start or since it was done",
    "start_timestamp_seconds": "Unix time of the run's first start",
    "resumed_step": "Step that this start went on from",
    "last_checkpoint_timestamp_seconds": "Unix time of the newest training checkpoint",
    "last_checkpoint_step": "Step of the newest training checkpoint",
    "checkpoint_interval_seconds": "Time between training checkpoints, at the mean step time",
}
LAYER_GAUGES = {
    "expert_load_max_over_mean": ("max_over_mean", "Busiest expert's tokens over the mean, by layer"),
    "expert_load_min_over_mean": ("min_over_mean", "Least busy expert's tokens over the mean, by layer"),
    "idle_experts": ("idle_experts", "Experts without a token in the newest step, by layer"),
    "expert_load_entropy_ratio": ("entropy", "Entropy of the load over its maximum, by layer"),
}


class RecentMost:
    """The largest value of the last one to two WINDOW_SECONDS, so that a scrape misses no step's."""

    def __init__(self) -> None:
        self._begun, self._most, self._before = -math.inf, -math.inf, -math.inf

    def of(self, value: float, now: float) -> float:
        """Take a value at the time `now`, in seconds; the largest of late."""
        if now - self._begun >= WINDOW_SECONDS:
            self._before = self._most if now - self._begun < 2 * WINDOW_SECONDS else -math.inf
            self._begun, self._most = now, -math.inf
        self._most = max(self._most, value)
        return max(self._most, self._before)


class _Shown(NamedTuple):
    """One moment of a rank, never written to again."""

    values: dict[str, float]
    phases: dict[str, float]
    buckets: list[int]
    step_seconds: float
    state: str
    memory: tuple[float, float, float]
    loads: LayerLoads | None
    experts_LE: NDArray[np.float64] | None


class Series(Collector):
    """The numbers of one rank.

    Args:
        whole_run: also those of the run, which one rank tells.
    """

    def __init__(self, whole_run: bool) -> None:
        self._whole_run = whole_run
        self._counters = COUNTERS | (RUN_COUNTERS if whole_run else {})
        self._gauges = GAUGES | (RUN_GAUGES if whole_run else {})
        self._values = dict.fromkeys(self._counters, 0.0) | dict.fromkeys(self._gauges, math.nan)
        self._buckets = [0] * (len(STEP_SECONDS_BUCKETS) + 1)
        self._step_seconds = 0.0
        self._infos: dict[str, dict[str, str]] = {}
        self.layers: dict[str, int] = {}
        """Names of the layers with experts, and how many they have."""
        self.memory: tuple[float, float, float] = (math.nan,) * 3
        """Bytes by `MEMORY_KINDS`."""
        self.loads: LayerLoads | None = None
        self.experts_LE: NDArray[np.float64] | None = None
        """Tokens of each layer's experts since the start; None where nobody asked."""
        self.publish("setup", dict.fromkeys(PHASES, 0.0))

    def set(self, **gauges: float) -> None:
        self._values.update(gauges)

    def add(self, **counters: float) -> None:
        for name, amount in counters.items():
            self._values[name] += amount

    def observe_step(self, seconds: float) -> None:
        self._buckets[bisect_left(STEP_SECONDS_BUCKETS, seconds)] += 1
        self._step_seconds += seconds

    @property
    def mean_step_seconds(self) -> float:
        steps = sum(self._buckets)
        return self._step_seconds / steps if steps else math.nan

    def inform(self, name: str, labels: Mapping[str, Any]) -> None:
        """Facts that never change, as labels of `moetrain_<name>_info`."""
        self._infos = {**self._infos, name: {key: str(value) for key, value in labels.items()}}

    def publish(self, state: str, phases: Mapping[str, float]) -> None:
        """Show the numbers as they are now.

        Args:
            state: one of `STATES`, what the rank does.
            phases: seconds of each phase.
        """
        self._shown = _Shown(
            dict(self._values), dict(phases), list(self._buckets), self._step_seconds, state, self.memory, self.loads,
            self.experts_LE,
        )  # fmt: skip

    def page(self) -> bytes:
        """The text of `/metrics`."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        shown = self._shown
        for name, text in self._counters.items():
            yield CounterMetricFamily(PREFIX + name, text, value=shown.values[name])
        for name, text in self._gauges.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=shown.values[name])
        yield _by("phase_seconds", "Time of this rank, by what it was spent on", "phase", shown.phases, counter=True)
        states = {state: float(state == shown.state) for state in STATES}
        yield _by("phase", "What the rank does now: 1 for one of the phases", "phase", states)
        memory = dict(zip(MEMORY_KINDS, shown.memory, strict=True))
        yield _by("gpu_memory_bytes", "Memory of the GPU; without one, resident set of the process", "kind", memory)
        yield _histogram(shown.buckets, shown.step_seconds)
        for name, labels in self._infos.items():
            yield InfoMetricFamily(PREFIX + name, f"What is known of the {name}", labels)
        if self._whole_run:
            yield from self._balance(shown)

    def _balance(self, shown: _Shown) -> Iterator[Metric]:
        for name, (column, text) in LAYER_GAUGES.items():
            values = getattr(shown.loads, column) if shown.loads else [math.nan] * len(self.layers)
            yield _by(name, text, "layer", dict(zip(self.layers, values, strict=True)))
        if shown.experts_LE is not None:
            tokens = CounterMetricFamily(
                PREFIX + "expert_tokens", "Tokens of each expert, all ranks", labels=("layer", "expert")
            )
            for (layer, experts), row in zip(self.layers.items(), shown.experts_LE.tolist(), strict=True):
                for expert, count in enumerate(row[:experts]):
                    tokens.add_metric((layer, str(expert)), count)
            yield tokens


def _by(name: str, text: str, label: str, values: Mapping[str, float], counter: bool = False) -> Metric:
    family = (CounterMetricFamily if counter else GaugeMetricFamily)(PREFIX + name, text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _histogram(buckets: list[int], total: float) -> Metric:
    cumulative, count = [], 0
    for bound, steps in zip((*STEP_SECONDS_BUCKETS, math.inf), buckets, strict=True):
        count += steps
        cumulative.append(("+Inf" if bound == math.inf else str(float(bound)), count))
    return HistogramMetricFamily(PREFIX + "step_duration_seconds", "Duration of steps", cumulative, total)
