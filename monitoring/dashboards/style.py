"""How values look: units aside, what colours and names they get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.dashboard import (
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)

from monitoring.dashboards.queries import PHASES

Steps = Sequence[tuple[float | None, str]]
"""Thresholds: (from this value on, colour); the first is (None, colour)."""
PLAIN: Steps = ((None, "text"),)
ANY_IS_BAD: Steps = ((None, "green"), (1, "red"))
TIMES = {
    "forward_backward": "green",
    "optimizer": "blue",
    "collective_wait": "orange",
    "data_wait": "red",
    "evaluate": "purple",
    "checkpoint": "yellow",
    "other": "text",
}
"""What a rank's time is spent on, its own work first."""
SEVERITIES = {"critical": "red", "warning": "orange", "info": "blue"}
"""Of alerts, with their colours."""


def phase_names() -> list[Any]:
    """Value mappings for `phase_code`."""
    names = {"0": ValueMappingResult(text="down", color="red", index=0)}
    for code, (phase, color) in enumerate(PHASES.items(), 1):
        names[str(code)] = ValueMappingResult(text=phase, color=color, index=code)
    return [ValueMap(options=names)]


def steps(of: Steps) -> DynamicConfigValue:
    """Override for thresholds."""
    settings = [{"value": start, "color": shade} for start, shade in of]
    return DynamicConfigValue(id_val="thresholds", value={"mode": "absolute", "steps": settings})


def thresholds(of: Steps) -> dashboard.ThresholdsConfig:
    """Absolute thresholds."""
    values = [Threshold(value=value, color=color) for value, color in of]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(values)


def color(mode: FieldColorModeId, fixed: str = "") -> dashboard.FieldColor:
    """How a series gets its colour."""
    made = dashboard.FieldColor().mode(mode)
    return made.fixed_color(fixed) if fixed else made


def value(name: str, setting: Any) -> DynamicConfigValue:
    """One property of an override."""
    return DynamicConfigValue(id_val=name, value=setting)


def dashed(fixed: str) -> list[DynamicConfigValue]:
    """Override for a line that is a limit or a plan and no measurement."""
    style = {"fill": "dash", "dash": [10, 10]}
    return [
        value("custom.lineStyle", style),
        value("custom.fillOpacity", 0),
        value("color", {"mode": "fixed", "fixedColor": fixed}),
    ]
