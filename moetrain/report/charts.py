"""Curves, stacked shares and a heatmap as figures of HTML and inline SVG.

The drawing stretches with the page while its strokes and words keep their size, so that one figure serves a phone and
a wide screen. What a curve shows is also said in words, and listed in a table, for those who cannot see it.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moetrain.report.curves import FloatArray, IntArray, Scale, envelope, scale_for, ticks, worst
from moetrain.report.markup import details, escape, slug, table
from moetrain.report.text import number, share, short

TABLE_ROWS = 12
SHARE_BUCKETS = 100
HEAT_BUCKETS = 160
MARKS_SHOWN = 60
_SIDE = 1000  # of the drawing's own square, before it is stretched


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    x: IntArray
    y: FloatArray
    slot: int
    """Of the colours."""
    kind: str = "line"
    """`line`, `faint` (behind its smoothed line) or `dots`."""
    spoken: bool = True
    """Said in words and listed; what another curve says already is not."""


@dataclass(frozen=True)
class Chart:
    """Curves over the steps."""

    title: str
    unit: str
    lines: list[Line]
    zero: bool = False
    """Start at 0, so that heights compare."""
    levels: list[tuple[float, str]] = field(default_factory=list)
    """Values that curves are held against."""
    restarts: list[int] = field(default_factory=list)
    wide: bool = False


def draw(chart: Chart) -> str:
    """The figure; empty where no curve has a value."""
    spoken = [line for line in chart.lines if line.spoken]
    lines = [line for line in chart.lines if np.isfinite(line.y).any()]
    if not lines:
        return ""
    name = slug(chart.title)  # of which a page has each once
    x = _x_scale([line.x for line in lines])
    levels = [level for level in chart.levels if np.isfinite(level[0])]
    heights = np.concatenate([line.y for line in lines] + [np.array([value for value, _ in levels])])
    y = scale_for(heights, zero=chart.zero)
    paths = [_path("gridline", [f"M0 {_y(y, mark)}H{_SIDE}"]) for mark in ticks(y)]
    paths += [_path("levelline", [f"M0 {_y(y, value)}H{_SIDE}"]) for value, _ in levels]
    restarts = [_x(x, step) for step in chart.restarts[-MARKS_SHOWN:] if x.low <= step <= x.high]
    paths += [_path("restart", [f"M{place} 0V{_SIDE}" for place in restarts])] if restarts else []
    paths += [_curve(line, x, y) for line in chart.lines]
    lost = [place for line in spoken for place in _lost(line, x)]
    paths += [_path("lost", [f"M{place} {_SIDE}h0" for place in lost])] if lost else []
    words = " ".join(reading(line) for line in spoken)
    words += " A logarithmic scale." if y.log else ""
    words += " Dotted uprights: the run was started again." if restarts else ""
    words += " Dots on the lower edge: steps without a finite value." if lost else ""
    labels = [_y_label(y, mark) for mark in ticks(y)] + _x_labels(x)
    labels += [
        f'<span class="level" style="bottom:{_percent(y, value)}">{escape(text)}</span>' for value, text in levels
    ]
    return _figure(
        name,
        chart.title,
        chart.unit,
        (_legend(lines) if len(lines) > 1 else "")
        + _svg(name, paths, labels)
        + f'<p class="reading" id="{name}-words">{escape(words)}</p>'
        + details(f"Values: {chart.title.lower()}", _value_table(chart.title, spoken)),
        "wide" if chart.wide else "",
    )


def shares(title: str, name: str, steps_S: IntArray, phases: dict[str, FloatArray]) -> str:
    """Share of each phase in the time, stacked to 100 %; empty without a phase. `name` is the figure's id."""
    if not phases or not len(steps_S):
        return ""
    seconds_PS = np.stack(list(phases.values()))
    parts = np.array_split(np.arange(len(steps_S)), min(SHARE_BUCKETS, len(steps_S)))
    sums_PB = np.stack([seconds_PS[:, part].sum(axis=1) for part in parts], axis=1)
    shares_PB = sums_PB / np.maximum(sums_PB.sum(axis=0), 1e-12)
    tops_PB = np.cumsum(shares_PB, axis=0)
    x = _x_scale([steps_S])
    edges = [0, *(_x(x, float(steps_S[part[0]])) for part in parts[1:]), _SIDE]
    paths, below_B = [], np.zeros(len(parts))
    for slot, top_B in enumerate(tops_PB):
        there = [f"H{edges[b]}V{_SIDE - round(_SIDE * top_B[b])}" for b in range(len(parts))]
        back = [f"H{edges[b + 1]}V{_SIDE - round(_SIDE * below_B[b])}" for b in reversed(range(len(parts)))]
        path = f"M{edges[0]} {_SIDE - round(_SIDE * below_B[0])}{''.join(there)}H{_SIDE}{''.join(back)}Z"
        paths.append(_path(f"area s{slot}", [path]))
        below_B = top_B
    labels = [_y_label(Scale(0, 1), mark, f"{100 * mark:.0f} %") for mark in (0, 0.25, 0.5, 0.75, 1)] + _x_labels(x)
    total = seconds_PS.sum(axis=1)
    words = "From below: " + ", ".join(
        f"{phase} {share(part)}" for phase, part in zip(phases, total / max(float(total.sum()), 1e-12), strict=True)
    )
    legend = "".join(
        f'<li><i class="swatch s{slot}"></i>{escape(phase)} {share(part)}</li>'
        for slot, (phase, part) in enumerate(zip(phases, total / max(float(total.sum()), 1e-12), strict=True))
    )
    return _figure(
        name,
        title,
        "share of the time, all steps of a column together",
        f'<ul class="legend">{legend}</ul>{_svg(name, paths, labels)}'
        f'<p class="reading unseen" id="{name}-words">{escape(words)}</p>',
        "wide",
    )


def heatmap(
    title: str, name: str, unit: str, steps_S: IntArray, layers: Sequence[str], values_SL: np.ndarray[Any, Any]
) -> str:
    """Layers from above, steps from left; the worst value of the steps that share a cell. Empty without a value."""
    if not np.isfinite(values_SL).any():
        return ""
    cells_LB = worst(values_SL, HEAT_BUCKETS)
    top = max(2.0, float(np.nanmax(cells_LB)))
    picture = _image(np.log(np.clip(cells_LB, 1.0, None)) / np.log(top))
    ramp = _image(np.linspace(0, 1, 128, dtype=np.float32)[None, :])
    x = _x_scale([steps_S])
    marks = sorted({0, len(layers) - 1, *(int(mark) for mark in ticks(Scale(0, max(len(layers) - 1, 1)), 6))})
    labels = [
        f'<span class="y" style="bottom:{100 - 100 * (mark + 0.5) / len(layers):.4g}%">{mark}</span>'
        for mark in marks
        if mark < len(layers) and (mark in (0, len(layers) - 1) or len(layers) - 1 - mark > len(layers) / 12)
    ]
    middle_L, most_L = np.nanmedian(values_SL, axis=0), np.nanmax(values_SL, axis=0)
    order = np.argsort(-np.nan_to_num(most_L))[:TABLE_ROWS]
    rows = [(layers[i], number(middle_L[i]), number(most_L[i])) for i in order]
    words = (
        f"Layer {layers[0]} is above. The worst cell has {number(top)}, in layer {layers[order[0]]}; "
        f"the median layer's median is {number(float(np.nanmedian(middle_L)))}."
    )
    height = min(30.0, max(6.0, 0.6 * len(layers)))
    return _figure(
        name,
        title,
        unit,
        f'<p class="ramp"><span>1</span><img alt="" src="{ramp}"><span>{number(top)}, logarithmic</span></p>'
        f'<div class="plot" style="height:{height:g}rem"><img src="{picture}" alt="{escape(words)}">'
        f"{''.join(labels + _x_labels(x))}</div><p class='axis'>step</p>"
        f'<p class="reading">{escape(words)}</p>'
        + details("Layers that were worst", table(("layer", "median", "worst"), rows, "Balance of the worst layers")),
        "wide heat",
    )


def reading(line: Line) -> str:
    """What a curve shows, in a sentence."""
    known = np.flatnonzero(np.isfinite(line.y))
    lost = len(line.y) - len(known)
    if not len(known):
        return f"{line.label}: no finite value."
    first, last = known[0], known[-1]
    low, high = known[np.argmin(line.y[known])], known[np.argmax(line.y[known])]
    words = f"{line.label}: {number(line.y[first])} at step {line.x[first]:,}"
    if len(known) > 1:
        words += (
            f", {number(line.y[last])} at step {line.x[last]:,}; lowest {number(line.y[low])} at step "
            f"{line.x[low]:,}, highest {number(line.y[high])} at step {line.x[high]:,}"
        )
    return words + (f"; {lost:,} without a finite value." if lost else ".")


def _value_table(title: str, lines: list[Line]) -> str:
    """Mean and extremes of each curve over a dozen spans of steps."""
    lines = [line for line in lines if len(line.x)]
    first, last = min(int(line.x.min()) for line in lines), max(int(line.x.max()) for line in lines)
    edges = np.unique(np.linspace(first, last + 1, TABLE_ROWS + 1).round().astype(np.int64))
    rows = []
    for begin, end in itertools.pairwise(edges):
        cells = [_cell(line.y[(line.x >= begin) & (line.x < end)]) for line in lines]
        if any(cells):
            rows.append((f"{begin:,}" if end - begin == 1 else f"{begin:,} to {end - 1:,}", *cells))
    head = ("steps", *(line.label for line in lines))
    return table(head, rows, f"{title}: mean of the steps, in brackets the lowest and the highest", label=True)


def _cell(values: FloatArray) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "not finite" if len(values) else ""
    if len(known) == 1:
        return number(float(known[0]))
    return f"{number(float(known.mean()))} ({number(float(known.min()))} to {number(float(known.max()))})"


def _curve(line: Line, x: Scale, y: Scale) -> str:
    if line.kind == "dots":
        known = np.isfinite(line.y)
        dots = [f"M{_x(x, a)} {_y(y, b)}h0" for a, b in zip(line.x[known], line.y[known], strict=True)]
        return _path(f"dots s{line.slot}", dots)
    pieces = envelope(line.x.astype(np.float64), line.y)
    drawn = ["M" + "L".join(f"{_x(x, a)} {_y(y, b)}" for a, b in piece) for piece in pieces if len(piece) > 1]
    alone = [f"M{_x(x, a)} {_y(y, b)}h0" for piece in pieces if len(piece) == 1 for a, b in piece]
    curve = _path(f"{line.kind} s{line.slot}", drawn) if drawn else ""
    return curve + (_path(f"dots s{line.slot}", alone) if alone and line.kind == "line" else "")


def _lost(line: Line, x: Scale) -> list[int]:
    """Places of the steps without a finite value; of a quantity that was never there, none."""
    lost = ~np.isfinite(line.y)
    return [] if lost.all() or line.kind == "dots" else sorted({_x(x, step) for step in line.x[lost]})


def _x_scale(steps: list[IntArray]) -> Scale:
    known = [part for part in steps if len(part)]
    first, last = min(int(part.min()) for part in known), max(int(part.max()) for part in known)
    return Scale(first, last) if last > first else Scale(first - 1, last + 1)


def _x(x: Scale, step: float) -> int:
    return round(_SIDE * x.place(step))


def _y(y: Scale, value: float) -> int:
    return _SIDE - round(_SIDE * y.place(value))


def _percent(scale: Scale, value: float) -> str:
    return f"{100 * scale.place(value):.4g}%"


def _y_label(y: Scale, mark: float, text: str | None = None) -> str:
    return f'<span class="y" style="bottom:{_percent(y, mark)}">{text or short(mark)}</span>'


def _x_labels(x: Scale) -> list[str]:
    labels = []
    for mark in ticks(x, 4):
        if mark == int(mark):
            place = x.place(mark)
            edge = " last" if place > 0.97 else ""
            labels.append(f'<span class="x{edge}" style="left:{100 * place:.4g}%">{short(mark)}</span>')
    return labels


def _path(classes: str, pieces: list[str]) -> str:
    return f'<path class="{classes}" d="{"".join(pieces)}"/>'


def _svg(name: str, paths: list[str], labels: list[str]) -> str:
    return (
        f'<div class="plot"><svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="{name}-title {name}-words">{"".join(paths)}</svg>{"".join(labels)}</div>'
        '<p class="axis">step</p>'
    )


def _legend(lines: list[Line]) -> str:
    rows = []
    for line in lines:
        drawn = "M18 6h0" if line.kind == "dots" else "M2 6H34"
        sample = (
            f'<svg viewBox="0 0 36 12" aria-hidden="true"><path class="{line.kind} s{line.slot}" d="{drawn}"/></svg>'
        )
        rows.append(f"<li>{sample}{escape(line.label)}</li>")
    return f'<ul class="legend">{"".join(rows)}</ul>'


def _figure(name: str, title: str, unit: str, inside: str, classes: str = "") -> str:
    return (
        f'<figure class="{classes}" aria-labelledby="{name}-title"><figcaption><h3 id="{name}-title">{escape(title)}'
        f"</h3><span>{escape(unit)}</span></figcaption>\n{inside}\n</figure>"
    )


def _image(values: np.ndarray[Any, Any]) -> str:
    """Values from 0 to 1 as a PNG in a data URI; what is no number is transparent."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    colors = colormaps["viridis"](np.nan_to_num(values), bytes=True)
    colors[..., 3] = np.where(np.isfinite(values), 255, 0)
    out = io.BytesIO()
    imsave(out, colors, format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
