"""Panels of words and bars, as HTML: stat, table, bar gauge, state timeline, and the empty one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from monitoring.dashboards.drawing.answers import Cell, Frame, Series, natural
from monitoring.dashboards.drawing.axes import LEGEND_ROW, LETTER, Area, Panel, events, label, time_axis
from monitoring.dashboards.drawing.values import Look, look_of

TABLE_ROW = 36
"""Pixels, of Grafana's smallest rows."""


def nothing(panel: Panel, area: Area) -> str:
    """The panel's words for an empty answer."""
    words = panel["fieldConfig"]["defaults"].get("noValue", "No data")
    return f'<div class="empty" style="height:{area.height:.0f}px">{escape(words)}</div>'


def stat(panel: Panel, series: Sequence[Series], area: Area) -> str:
    """The last value of each series in big type, its course behind it."""
    options, tiles = panel["options"], []
    width = area.width / max(1, len(series))
    for one in series:
        look, value = look_of(panel, one.name), last(one.values)
        text, shade = look.text(value), look.shade(value)
        with_name = options["textMode"] == "value_and_name"
        size = min(38, width / (0.75 * max(len(text), 3)), area.height * 0.45)
        spark = sparkline(one.values, shade, width, area.height * 0.38) if options["graphMode"] == "area" else ""
        name = f'<div class="name">{escape(one.name)}</div>' if with_name else ""
        body = f'{spark}{name}<div style="color:{shade};font-size:{size:.0f}px">{escape(text)}</div>'
        kind = "tile over" if spark else "tile"
        tiles.append(f'<div class="{kind}" style="height:{area.height:.0f}px">{body}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def sparkline(values: Sequence[float | None], shade: str, width: float, height: float) -> str:
    """The course of a value, without axes."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    span = high - low or 1
    points = [
        (place / (len(values) - 1) * width, height - 2 - (value - low) / span * (height - 4))
        for place, value in enumerate(values)
        if value is not None and math.isfinite(value)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    area = f"{points[0][0]:.1f},{height:.0f} {line} {points[-1][0]:.1f},{height:.0f}"
    return (
        f'<svg class="spark" width="{width:.0f}" height="{height:.0f}">'
        f'<polygon points="{area}" fill="{shade}" opacity="0.15"/>'
        f'<polyline points="{line}" fill="none" stroke="{shade}" opacity="0.6"/></svg>'
    )


def table(panel: Panel, frame: Frame, area: Area) -> str:
    """Rows with a header, sorted as the panel says, as many as there is room for."""
    order = list(range(len(frame)))
    for by in panel["options"].get("sortBy", []):
        key = frame.columns.get(by["displayName"]) or [None] * len(frame)
        known = {row: cell for row, cell in enumerate(key) if isinstance(cell, float) and not math.isnan(cell)}
        order = sorted(known, key=known.__getitem__, reverse=by["desc"]) + [row for row in order if row not in known]
    looks = {name: look_of(panel, name) for name in frame.columns}
    head = "".join(_head(name, column, looks[name]) for name, column in frame.columns.items())
    body = "".join(
        "<tr>" + "".join(_cell(column[row], looks[name]) for name, column in frame.columns.items()) + "</tr>"
        for row in order[: max(1, int(area.height // TABLE_ROW) - 1)]
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _head(name: str, column: Sequence[Cell], look: Look) -> str:
    width = f"width:{look.custom['width']}px;" if "width" in look.custom else ""
    return f'<th style="{width}{_align(column)}">{escape(name)}</th>'


def _align(column: Sequence[Cell]) -> str:
    """Numbers stand to the right, with their head."""
    return "text-align:right" if any(isinstance(cell, float) for cell in column) else ""


def _cell(value: Cell, look: Look) -> str:
    colored = look.custom.get("cellOptions", {}).get("type") == "color-text"
    style = _align([value]) + (f";color:{look.shade(value)}" if colored else "")
    return f'<td style="{style}">{escape(look.text(value))}</td>'


def bargauge(panel: Panel, series: Sequence[Series], area: Area) -> str:
    """One horizontal bar a series."""
    widest = max(len(one.name) for one in series) * 7 + 16
    height = min(30, area.height / len(series))
    parts = []
    for one in series:
        look, value = look_of(panel, one.name), last(one.values)
        low = look.low or 0.0
        most = max((v for other in series if (v := last(other.values)) is not None), default=1.0)
        high = look.high if look.high is not None else max(most, low + 1e-9)
        share = 0.0 if value is None else min(max((value - low) / (high - low), 0.0), 1.0)
        shade = look.shade(value)
        parts.append(
            f'<div class="bar" style="height:{height:.0f}px"><span style="width:{widest}px">{escape(one.name)}</span>'
            f'<b><i style="width:{share:.1%};background:{shade}"></i></b>'
            f'<em style="color:{shade}">{escape(look.text(value))}</em></div>'
        )
    return "".join(parts)


def state_timeline(panel: Panel, series: Sequence[Series], area: Area) -> str:
    """One band a series; neighbours of one value are one piece."""
    series = sorted(series, key=lambda one: natural(one.name))
    left, right = max(len(one.name) for one in series) * LETTER + 14, 10.0
    height = (area.height - 18 - LEGEND_ROW - 6) / len(series)
    inner = Area(area.width, area.height - LEGEND_ROW, area.times, area.marks)
    parts, seen = [], {}
    for place, one in enumerate(series):
        y = 6 + place * height
        look = look_of(panel, one.name)
        parts.append(label(left - 6, y + height / 2 + 4, one.name, "end") if height > 9 or place % 2 == 0 else "")
        for start, end, value in _pieces(one.values):
            x, until = (inner.x(area.times[at], left, right) for at in (start, min(end, len(area.times) - 1)))
            seen[look.text(value)] = look.shade(value)
            parts.append(
                f'<rect x="{x:.1f}" y="{y + height * 0.08:.1f}" width="{until - x:.1f}" height="{height * 0.84:.1f}" '
                f'fill="{look.shade(value)}" opacity="0.8"/>'
            )
    keys = "".join(
        f'<span class="key"><i style="background:{shade}"></i>{escape(t)}</span>' for t, shade in seen.items()
    )
    parts += [time_axis(inner, left, right), events(inner, left, right, tint=False)]
    image = f'<svg width="{area.width:.0f}" height="{inner.height:.0f}">{"".join(parts)}</svg>'
    return f'<div class="below">{image}<div class="legend">{keys}</div></div>'


def _pieces(values: Sequence[float | None]) -> list[tuple[int, int, float]]:
    """First place, place after the last, and value of every stretch of one value; gaps are left out."""
    pieces: list[tuple[int, int, float]] = []
    for place, value in enumerate(values):
        if value is None:
            continue
        if pieces and pieces[-1][1] == place and pieces[-1][2] == value:
            pieces[-1] = (pieces[-1][0], place + 1, value)
        else:
            pieces.append((place, place + 1, value))
    return pieces


def last(values: Sequence[float | None]) -> float | None:
    """The last value that is a number; Grafana's `lastNotNull`."""
    return next((value for value in reversed(values) if value is not None and not math.isnan(value)), None)
