"""Heatmaps over time, as SVG around a small PNG, and maps of squares."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

from monitoring.dashboards.drawing.answers import Frame, Series
from monitoring.dashboards.drawing.axes import LETTER, MUTED, Area, Panel, events, label, time_axis
from monitoring.dashboards.drawing.tiles import nothing
from monitoring.dashboards.drawing.values import Look, look_of, scheme_color, ticks


def heatmap(panel: Panel, series: Sequence[Series], area: Area) -> str:
    """Rows of colour over time. Rows named by numbers are sorted by them, as Grafana does."""
    options = panel["options"]
    unit, row_unit = options["cellValues"], options["yAxis"].get("unit", "none")
    if all(_number(one.name) is not None for one in series):
        series = sorted(series, key=lambda one: _number(one.name) or 0.0)
    rows = [one.values for one in series]
    if panel["targets"][0].get("format") == "heatmap":
        rows = _buckets(rows)
    hidden = options.get("filterValues", {}).get("le", -math.inf)
    cells = [[v if v is not None and math.isfinite(v) and v > hidden else None for v in row] for row in rows]
    values = [value for row in cells for value in row if value is not None]
    if not values:
        return nothing(panel, area)
    low, high = options["color"].get("min", min(values)), options["color"].get("max", max(values))
    span = high - low or 1
    scheme = options["color"]["scheme"]
    pixels = [
        [None if value is None else scheme_color(scheme, (value - low) / span) for value in row]
        for row in reversed(cells)
    ]
    row_look = Look(row_unit, None, (), (), {}, {}, None, None)
    names = [row_look.text(number) if (number := _number(one.name)) is not None else one.name for one in series]
    left, right, bar = max(map(len, names)) * LETTER + 26, 10.0, 34.0
    height = area.height - bar
    inner = Area(area.width, height, area.times, area.marks)
    row_height = (height - 24) / len(rows)
    every = math.ceil(14 / row_height)
    parts = [
        f'<image x="{left}" y="6" width="{area.width - left - right:.1f}" height="{height - 24:.1f}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" href="{png(pixels)}"/>'
    ]
    edge = 1.0 if panel["targets"][0].get("format") == "heatmap" else 0.5  # `le` is a bucket's upper end
    for place, name in enumerate(names):
        if place % every == 0:
            parts.append(label(left - 6, 6 + (len(rows) - place - edge) * row_height + 4, name, "end"))
    title = options["yAxis"].get("axisLabel", "")
    middle = (height - 18) / 2
    parts.append(
        f'<text transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle" fill="{MUTED}">'
        f"{escape(title)}</text>"
    )
    parts += [time_axis(inner, left, right), events(inner, left, right, tint=False)]
    cell_look = Look(unit.get("unit", "none"), unit.get("decimals"), (), (), {}, {}, None, None)
    parts.append(_color_bar(scheme, cell_look, low, high, left, area.height))
    return f'<svg width="{area.width:.0f}" height="{area.height:.0f}">{"".join(parts)}</svg>'


def _buckets(rows: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Cumulative buckets to the count of each."""
    below: Sequence[float | None] = [0.0] * len(rows[0])
    apart = []
    for row in rows:
        apart.append([None if a is None else max(0.0, a - (b or 0.0)) for a, b in zip(row, below, strict=True)])
        below = row
    return apart


def _color_bar(scheme: str, look: Look, low: float, high: float, left: float, height: float) -> str:
    stops = "".join(
        f'<stop offset="{place / 8}" stop-color="rgb{scheme_color(scheme, place / 8)}"/>' for place in range(9)
    )
    return (
        f'<defs><linearGradient id="{scheme}">{stops}</linearGradient></defs>'
        f'<rect x="{left}" y="{height - 24}" width="160" height="8" fill="url(#{scheme})"/>'
        + label(left, height - 4, look.text(low), "start")
        + label(left + 160, height - 4, look.text(high), "end")
    )


def png(rows: Sequence[Sequence[tuple[int, int, int] | None]]) -> str:
    """Pixels as a data URL; None is transparent."""
    lines = b"".join(b"\0" + b"".join(bytes((*p, 255)) if p else b"\0\0\0\0" for p in row) for row in rows)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 6, 0, 0, 0)
    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(image).decode()


def xychart(panel: Panel, frame: Frame, area: Area) -> str:
    """Squares at pairs of two columns, coloured by a third."""
    (series,) = panel["options"]["series"]
    across, down, of = (series[axis]["matcher"]["options"] for axis in ("x", "y", "color"))
    xs, ys = ([cell for cell in frame.columns[name] if isinstance(cell, float)] for name in (across, down))
    look, left, bottom = look_of(panel, of), 40.0, 34.0
    width = (area.width - left - 10) / (max(xs) - min(xs) + 1)
    height = (area.height - bottom - 4) / (max(ys) - min(ys) + 1)
    size = panel["fieldConfig"]["defaults"]["custom"]["pointSize"]["fixed"]
    parts = []
    for x, y, value in zip(xs, ys, frame.columns[of], strict=True):
        middle = left + (x - min(xs) + 0.5) * width, area.height - bottom - (y - min(ys) + 0.5) * height
        parts.append(
            f'<rect x="{middle[0] - size / 2:.1f}" y="{middle[1] - size / 2:.1f}" width="{size}" height="{size}" '
            f'fill="{look.shade(value)}"/>'
        )
    for x in ticks(min(xs), max(xs), 16):
        parts.append(label(left + (x - min(xs) + 0.5) * width, area.height - 20, f"{x:g}", "middle"))
    for y in ticks(min(ys), max(ys), 8):
        parts.append(label(left - 8, area.height - bottom - (y - min(ys) + 0.5) * height + 4, f"{y:g}", "end"))
    parts.append(label(area.width / 2, area.height - 4, across, "middle"))
    parts.append(label(4, 12, down, "start"))
    return f'<svg width="{area.width:.0f}" height="{area.height:.0f}">{"".join(parts)}</svg>'


def _number(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None
