"""Lines and stacked areas over time, as SVG."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from monitoring.dashboards.drawing.answers import Series
from monitoring.dashboards.drawing.axes import GRID, LEGEND_ROW, LETTER, Area, Panel, events, label, time_axis
from monitoring.dashboards.drawing.values import COLORS, PALETTE, Look, look_of, ticks, with_unit


def timeseries(panel: Panel, series: Sequence[Series], area: Area) -> str:
    """Lines or stacked areas, with one vertical axis a unit and marks for events."""
    looks = [look_of(panel, one.name) for one in series]
    shades = [
        COLORS[look.color["fixedColor"]] if look.color.get("mode") == "fixed" else PALETTE[place % len(PALETTE)]
        for place, look in enumerate(looks)
    ]
    stacked = any(look.custom.get("stacking", {}).get("mode") == "normal" for look in looks)
    drawn = _stack(series) if stacked else [[(None, value) for value in one.values] for one in series]
    beside = panel["options"]["legend"]["placement"] == "right"
    legend, used = _legend(series, looks, shades, area, beside)
    inner = Area(area.width * (0.68 if beside else 1), area.height - (0 if beside else used), area.times, area.marks)
    on_right = [look.custom.get("axisPlacement") == "right" for look in looks]
    scales = {}
    for side in (False, True):
        members = [place for place, right in enumerate(on_right) if right == side]
        if members:
            edges = [edge for place in members for pair in drawn[place] for edge in pair if edge is not None]
            scales[side] = _scale(looks[members[0]], edges, inner.height)
    left = (
        max(28.0, max((len(word) for word, _ in scales[False].labels), default=3) * LETTER + 10)
        if False in scales
        else 8
    )
    right = max((len(word) for word, _ in scales[True].labels), default=3) * LETTER + 16 if True in scales else 10
    parts = [_axes(scales, inner, left, right), events(inner, left, right)]
    for place in reversed(range(len(series))) if stacked else range(len(series)):
        scale = scales[on_right[place]]
        parts.append(_line(drawn[place], looks[place], shades[place], scale, inner, left, right))
    image = f'<svg width="{inner.width:.0f}" height="{inner.height:.0f}">{"".join(parts)}</svg>'
    return f'<div class="{"beside" if beside else "below"}">{image}{legend}</div>'


@dataclass(frozen=True)
class Scale:
    """A vertical axis: its ends, and the words along it with their values."""

    low: float
    high: float
    height: float
    labels: Sequence[tuple[str, float]]

    def y(self, value: float) -> float:
        """Pixel of a value; 18 below are the time axis'."""
        return 6 + (self.high - value) / (self.high - self.low) * (self.height - 24)


def _scale(look: Look, edges: Sequence[float], height: float) -> Scale:
    finite = [edge for edge in edges if math.isfinite(edge)] or [0.0]
    low, high = min(finite), max(finite)
    if (soft := look.custom.get("axisSoftMin")) is not None:
        low = min(low, soft)
    low = look.low if look.low is not None else low
    high = look.high if look.high is not None else high
    if high <= low:
        low, high = low - abs(low) * 0.1, high + (abs(high) * 0.1 or 1)
    elif look.high is None:
        high += (high - low) * 0.05
    if look.unit == "bytes":  # round numbers of GiB, not of bytes
        power = 1024.0 ** max(0, math.floor(math.log(max(abs(high), 1), 1024)))
        marks = [mark * power for mark in ticks(low / power, high / power, max(2, int(height / 40)))]
    else:
        marks = ticks(low, high, max(2, int(height / 40)))
    words = tick_words(look.unit, marks)
    return Scale(low, high, height, list(zip(words, marks, strict=True)))


def tick_words(unit: str, marks: Sequence[float]) -> list[str]:
    """With as many decimals as tell the ticks apart and leave nothing out."""
    exact = [_bare(with_unit(mark, unit, 4)) for mark in marks]
    for decimals in range(4):
        words = [with_unit(mark, unit, decimals) for mark in marks]
        if [_bare(word) for word in words] == exact:
            return words
    return exact


def _bare(word: str) -> str:
    """A number with its unit, without zeros at the end of its decimals."""
    return re.sub(r"(\.\d*?)0+(?=\D|$)", lambda match: match[1].rstrip("."), word)


def _stack(series: Sequence[Series]) -> list[list[tuple[float | None, float | None]]]:
    """Lower and upper edge of each series at each time, the first at the bottom."""
    floor = [0.0] * (len(series[0].values) if series else 0)
    edges = []
    for one in series:
        pairs: list[tuple[float | None, float | None]] = [
            (None, None) if v is None or not math.isfinite(v) else (f, f + v)
            for f, v in zip(floor, one.values, strict=True)
        ]
        floor = [f if top is None else top for f, (_, top) in zip(floor, pairs, strict=True)]
        edges.append(pairs)
    return edges


def _axes(scales: Mapping[bool, Scale], area: Area, left: float, right: float) -> str:
    parts = []
    for side, scale in scales.items():
        for word, value in scale.labels:
            y = scale.y(value)
            if not side or len(scales) == 1:
                parts.append(f'<line x1="{left}" x2="{area.width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
            x, anchor = (area.width - right + 6, "start") if side else (left - 6, "end")
            parts.append(label(x, y + 4, word, anchor))
    return "".join(parts) + time_axis(area, left, right)


def _line(
    pairs: Sequence[tuple[float | None, float | None]],
    look: Look,
    shade: str,
    scale: Scale,
    area: Area,
    left: float,
    right: float,
) -> str:
    """One series; it is broken where values are missing."""
    pieces: list[list[tuple[float, float, float]]] = [[]]
    for at, (floor, top) in zip(area.times, pairs, strict=True):
        if top is None or not math.isfinite(top):
            pieces.append([])
        else:
            base = scale.low if floor is None else floor
            pieces[-1].append((area.x(at, left, right), scale.y(top), scale.y(base)))
    dash = ' stroke-dasharray="8 6"' if look.custom.get("lineStyle", {}).get("fill") == "dash" else ""
    width, opacity = look.custom.get("lineWidth", 1), look.custom.get("fillOpacity", 0) / 100
    parts = []
    for piece in filter(None, pieces):
        if look.custom.get("lineInterpolation") == "stepAfter":
            held = [(after[0], *before[1:]) for before, after in itertools.pairwise(piece)]
            piece = [point for pair in zip(piece, held, strict=False) for point in pair] + piece[-1:]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in piece)
        back = " ".join(f"{x:.1f},{base:.1f}" for x, _, base in reversed(piece))
        if opacity:
            parts.append(f'<polygon points="{line} {back}" fill="{shade}" opacity="{opacity}"/>')
        if width:
            parts.append(f'<polyline points="{line}" fill="none" stroke="{shade}" stroke-width="1.4"{dash}/>')
        if len(piece) == 1:
            parts.append(f'<circle cx="{piece[0][0]:.1f}" cy="{piece[0][1]:.1f}" r="2.5" fill="{shade}"/>')
    return "".join(parts)


def _legend(
    series: Sequence[Series], looks: Sequence[Look], shades: Sequence[str], area: Area, beside: bool
) -> tuple[str, float]:
    """Legend and the height that it takes below the picture."""
    del looks
    items = [
        f'<span class="key"><i style="background:{shade}"></i>{escape(one.name)}</span>'
        for one, shade in zip(series, shades, strict=True)
    ]
    if beside:
        room = int(area.height // LEGEND_ROW)
        return f'<div class="legend right" style="width:{area.width * 0.31:.0f}px">{"".join(items[:room])}</div>', 0
    rows = math.ceil(sum(len(one.name) * LETTER + 30 for one in series) / area.width)
    used = LEGEND_ROW * min(rows, 3) + 2
    return f'<div class="legend" style="height:{used}px">{"".join(items)}</div>', used
