"""Grafana dashboards as code: `python -m monitoring.dashboards` writes the JSON that Grafana is provisioned with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from monitoring.dashboards import all_runs, experts, glance, hardware, ranks

JSON = Path(__file__).with_name("json")
DASHBOARDS: dict[str, Callable[[], dict[str, Any]]] = {
    "run-at-a-glance": glance.dashboard,
    "ranks-and-stragglers": ranks.dashboard,
    "experts-and-balance": experts.dashboard,
    "hardware-and-fabric": hardware.dashboard,
    "all-runs": all_runs.dashboard,
}
"""File name without suffix -> what builds it."""
