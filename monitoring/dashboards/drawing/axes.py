"""What pictures over time share: their area, axes, marks for events and labels."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from monitoring.dashboards.drawing.values import COLORS

Panel = Mapping[str, Any]
Mark = tuple[float, float, str]
"""An event on the time axis: start, end (Unix seconds), colour."""
GRID = "#2c3035"
MUTED = "#8e8e9a"
FONT = 11
LETTER = 6.9
"""Mean width of a character at `FONT`, pixels."""
LEGEND_ROW = 17


@dataclass(frozen=True)
class Area:
    """Where a panel's contents go: size in pixels, times of the grid, and what happened."""

    width: float
    height: float
    times: Sequence[float]
    marks: Sequence[Mark] = ()

    def x(self, at: float, left: float, right: float) -> float:
        """Pixel of a time between two margins."""
        start, end = self.times[0], self.times[-1]
        return left + (at - start) / (end - start) * (self.width - left - right)


def time_axis(area: Area, left: float, right: float) -> str:
    """Hours and minutes (UTC) below a picture."""
    steps = (60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
    start, end = area.times[0], area.times[-1]
    most = max(2, (area.width - left - right) / 90)
    step = next((step for step in steps if (end - start) / step <= most), steps[-1])
    marks = range(math.ceil(start / step) * step, int(end) + 1, step)
    texts = []
    for at in marks:
        x = area.x(at, left, right)
        anchor = "middle" if x < area.width - 5 * LETTER / 2 else "end"  # one at the edge would be cut off
        texts.append(label(min(x, area.width), area.height - 3, time.strftime("%H:%M", time.gmtime(at)), anchor))
    return "".join(texts)


def label(x: float, y: float, text: str, anchor: str, shade: str = MUTED) -> str:
    """One text of an SVG."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{shade}">{escape(text)}</text>'


def events(area: Area, left: float, right: float, tint: bool = True) -> str:
    """Marks for what happened: a line at its start and, with `tint`, colour for as long as it lasted."""
    parts, bottom = [], area.height - 18
    for start, end, shade in merged(area.marks) if tint else []:
        x, until = area.x(start, left, right), area.x(min(end, area.times[-1]), left, right)
        if until - x > 2:
            size = f'width="{until - x:.1f}" height="{bottom - 6:.1f}"'
            parts.append(f'<rect x="{x:.1f}" y="6" {size} fill="{COLORS[shade]}" opacity="0.08"/>')
    for start, _, shade in area.marks:
        x = area.x(start, left, right)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{bottom}" stroke="{COLORS[shade]}" '
            f'stroke-dasharray="4 3" opacity="0.6"/>'
            f'<path d="M{x - 4:.1f} {bottom + 4} h8 l-4 -5 z" fill="{COLORS[shade]}"/>'
        )
    return "".join(parts)


def merged(marks: Sequence[Mark]) -> list[Mark]:
    """Marks of one colour that overlap as one."""
    regions: list[Mark] = []
    for start, end, shade in sorted(marks, key=lambda mark: (mark[2], mark[0])):
        if regions and regions[-1][2] == shade and start <= regions[-1][1]:
            regions[-1] = (regions[-1][0], max(end, regions[-1][1]), shade)
        else:
            regions.append((start, end, shade))
    return regions
