"""Curves of any length drawn with few points: extremes are kept, gaps stay gaps, and scales have round marks.

Shape suffixes: S steps, B buckets (neighbouring steps that share one place of the picture), L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BUCKETS = 400
"""Places along a curve: finer than the pixels of a phone, and 800 points of text a curve on a page."""
SPREAD_FOR_LOG = 20.0
"""Largest over median value from which a scale is logarithmic: one spike would flatten all the rest."""


@dataclass(frozen=True)
class Bucket:
    """Neighbouring steps."""

    first: int
    last: int
    """Steps, both included."""
    low: float
    mean: float
    high: float
    """Over the finite values; NaN where there is none."""


@dataclass(frozen=True)
class Scale:
    """From values to places between 0 and 1."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def envelope(x_S: FloatArray, y_S: FloatArray, buckets: int = BUCKETS) -> list[list[tuple[float, float]]]:
    """Polylines through the finite values, broken where one is missing.

    Up to two points a bucket all values are drawn. Beyond that, each bucket gives its lowest and its highest value,
    in the order in which they came, and the line breaks where a whole bucket has none.
    """
    finite_S = np.isfinite(y_S)
    if len(x_S) > 2 * buckets:
        picked: list[int] = []
        gaps: set[int] = set()
        for steps in np.array_split(np.arange(len(x_S)), buckets):
            known = steps[finite_S[steps]]
            if not len(known):
                gaps.add(len(picked))
                continue
            picked += sorted({int(known[np.argmin(y_S[known])]), int(known[np.argmax(y_S[known])])})
        breaks = gaps
        order = np.array(picked, dtype=np.int64)
    else:
        order = np.flatnonzero(finite_S)
        breaks = {int(i) + 1 for i in np.flatnonzero(np.diff(order) > 1)}
    lines: list[list[tuple[float, float]]] = []
    for number, i in enumerate(order):
        if number == 0 or number in breaks:
            lines.append([])
        lines[-1].append((float(x_S[i]), float(y_S[i])))
    return lines


def bucketed(x_S: IntArray, y_S: FloatArray, buckets: int) -> list[Bucket]:
    """At most `buckets` buckets of equally many steps."""
    found = []
    for steps in np.array_split(np.arange(len(x_S)), min(buckets, len(x_S)) or 1):
        if not len(steps):
            continue
        known = y_S[steps][np.isfinite(y_S[steps])]
        low, mean, high = (known.min(), known.mean(), known.max()) if len(known) else (math.nan,) * 3
        found.append(Bucket(int(x_S[steps[0]]), int(x_S[steps[-1]]), float(low), float(mean), float(high)))
    return found


def worst(values_SL: NDArray[np.float32], buckets: int) -> NDArray[np.float32]:
    """Largest value of each layer in each bucket, NaN where it has none: [L, B]."""
    columns = []
    for part_SL in np.array_split(values_SL, min(buckets, len(values_SL)) or 1):
        known_SL = np.where(np.isfinite(part_SL), part_SL, -np.inf)
        top_L = known_SL.max(axis=0, initial=-np.inf)
        columns.append(np.where(np.isfinite(top_L), top_L, np.nan))
    return np.stack(columns, axis=1).astype(np.float32)


def smooth(y_S: FloatArray) -> FloatArray:
    """Mean over a centred window of a twenty-fifth of the run; values that are no numbers are passed over. It never
    looks back further at the start than ahead, and so does not lag behind a loss that falls."""
    reach = max(2, len(y_S) // 50)
    known_S = np.isfinite(y_S)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known_S, y_S, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known_S)])
    i = np.arange(len(y_S))
    near = np.minimum(reach, i)
    begin, end = i - near, np.minimum(i + near + 1, len(y_S))
    count = counts[end] - counts[begin]
    return np.where(count > 0, (sums[end] - sums[begin]) / np.maximum(count, 1), np.nan)


def scale_for(values: FloatArray, zero: bool = False, log: bool | None = None) -> Scale:
    """A scale that holds all finite values.

    Args:
        zero: start at 0, so that heights compare; not where the scale is logarithmic.
        log: None takes a logarithm where all values are positive and the largest is far above the median.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return Scale(0.0, 1.0)
    low, high = float(known.min()), float(known.max())
    if log is None:
        log = low > 0 and high > SPREAD_FOR_LOG * float(np.median(known))
    if log and low > 0:
        return Scale(low / 1.1, high * 1.1, log=True)
    low = min(0.0, low) if zero else low
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(low if zero and low == 0 else low - room, high + room)


def ticks(scale: Scale, about: int = 5) -> list[float]:
    """Round values within a scale, about as many as asked for."""
    if scale.log:
        first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
        skip = max(1, (last - first) // about)
        marks = [10.0**power for power in range(first, last + 1, skip)]
        if sum(scale.low <= mark <= scale.high for mark in marks) < 3:
            marks = [base * 10.0**power for power in range(first, last + 1) for base in (1, 2, 5)]
        return [mark for mark in marks if scale.low <= mark <= scale.high]
    rough = (scale.high - scale.low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(base * power for base in (1, 2, 2.5, 5, 10) if base * power >= rough * 0.999)
    first = math.ceil(scale.low / gap - 1e-9)
    last = math.floor(scale.high / gap + 1e-9)
    return [0.0 if i == 0 else i * gap for i in range(first, last + 1)]
