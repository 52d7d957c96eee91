"""What a run keeps of its time: checkpoints, stops and restarts."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, expm1, sqrt
from typing import NamedTuple

from moetrain.plan import constants
from moetrain.plan.layout import Layout
from moetrain.plan.memory import Unit

WEEK_HOURS = 7 * 24


class Goodput(NamedTuple):
    checkpoint_bytes: int
    """Weights and optimizer states of the whole model, once."""
    export_bytes: int
    """Weights alone, in Hugging Face format."""
    write_seconds: float
    """Of a checkpoint; training waits meanwhile."""
    stops_per_week: float
    interval_seconds: float
    """Between checkpoints, the best by Young and Daly."""
    goodput: float
    """Share of the time that ends up in the trained model."""


def goodput_of(units: Sequence[Unit], layout: Layout, storage_gb_s: float, restart_seconds: float) -> Goodput:
    """Checkpoints and stops of a run under a layout.

    Args:
        storage_gb_s: written by each node to shared storage, and read from it.
    """
    elements = [(p, p.sizes(Layout(1, 1))[1]) for unit in units for p in unit.parameters]
    weights = sum(size * p.itemsize for p, size in elements)
    checkpoint = weights + round(sum(size * p.state_bytes for p, size in elements))
    write = checkpoint / (storage_gb_s * 1e9 * layout.nodes)
    mean_time = constants.GPU_HOURS_PER_STOP / layout.world * 3600
    interval = best_interval(write, mean_time)
    return Goodput(
        checkpoint_bytes=checkpoint,
        export_bytes=weights,
        write_seconds=write,
        stops_per_week=WEEK_HOURS * 3600 / mean_time,
        interval_seconds=interval,
        goodput=share_kept(interval, write, restart_seconds + write, mean_time),
    )


def best_interval(write: float, mean_time: float) -> float:
    """Seconds of work between checkpoints that lose the least: Young's sqrt(2 C M) (doi 10.1145/361147.361115) with
    Daly's next terms (doi 10.1016/j.future.2004.11.016, equation 37).

    Args:
        write: C, seconds to write a checkpoint.
        mean_time: M, mean seconds between stops.
    """
    if write >= 2 * mean_time:
        return mean_time
    ratio = write / (2 * mean_time)
    return sqrt(2 * write * mean_time) * (1 + sqrt(ratio) / 3 + ratio / 9) - write


def share_kept(interval: float, write: float, restart: float, mean_time: float) -> float:
    """Work over wall time with stops at random (Daly, equation 20): an interval and its checkpoint take
    M e^(R/M) (e^((interval + C)/M) - 1)."""
    return interval / (mean_time * exp(restart / mean_time) * expm1((interval + write) / mean_time))
