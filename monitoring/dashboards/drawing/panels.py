"""Which function draws which panel type."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from monitoring.dashboards.drawing.answers import Frame, Series
from monitoring.dashboards.drawing.axes import Area, Panel
from monitoring.dashboards.drawing.graph import timeseries
from monitoring.dashboards.drawing.heat import heatmap, xychart
from monitoring.dashboards.drawing.tiles import bargauge, stat, state_timeline, table

DRAWN: dict[str, Callable[[Panel, Sequence[Series], Area], str]] = {
    "stat": stat,
    "timeseries": timeseries,
    "heatmap": heatmap,
    "bargauge": bargauge,
    "state-timeline": state_timeline,
}
"""Panel type -> function of its series."""
OF_FRAMES: dict[str, Callable[[Panel, Frame, Area], str]] = {"table": table, "xychart": xychart}
"""Panel type -> function of its table."""
