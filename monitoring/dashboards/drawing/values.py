"""Values as Grafana writes and colours them: units, decimals, thresholds, value mappings, palettes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLORS = {
    "green": "#73bf69",
    "red": "#f2495c",
    "orange": "#ff9830",
    "yellow": "#fade2a",
    "blue": "#5794f2",
    "purple": "#b877d9",
    "text": "#ccccdc",
}
"""Grafana's names in its dark theme."""
PALETTE = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0", "#37872d", "#fade2a")
"""Its classic palette, in order."""
SCHEMES = {
    "Oranges": ("#fff5eb", "#fee6ce", "#fdd0a2", "#fdae6b", "#fd8d3c", "#f16913", "#d94801", "#a63603", "#7f2704"),
    "Blues": ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b"),
    "Greens": ("#f7fcf5", "#e5f5e0", "#c7e9c0", "#a1d99b", "#74c476", "#41ab5d", "#238b45", "#006d2c", "#00441b"),
}
"""ColorBrewer's, light to dark; Grafana turns them around in its dark theme."""
_SI = ("", "k", "M", "G", "T", "P")
_SHORT = ("", " K", " Mil", " Bil", " Tri", " Quadr")
_IEC = (" B", " KiB", " MiB", " GiB", " TiB", " PiB")
_TIMES = ((60, 1, " s"), (3600, 60, " mins"), (86400, 3600, " hours"), (math.inf, 86400, " days"))
_SMALL_TIMES = ((1e-6, 1e9, " ns"), (1e-3, 1e6, " \N{MICRO SIGN}s"), (1, 1e3, " ms"))


@dataclass(frozen=True)
class Look:
    """How a field's values are shown: a panel's defaults with the overrides that match the field."""

    unit: str
    decimals: int | None
    steps: Sequence[Mapping[str, Any]]
    mappings: Sequence[Mapping[str, Any]]
    color: Mapping[str, Any]
    custom: Mapping[str, Any]
    low: float | None
    high: float | None

    def text(self, value: float | str | None) -> str:
        """The value in words."""
        if mapped := self._mapped(value):
            return str(mapped["text"])
        return "" if value is None else value if isinstance(value, str) else with_unit(value, self.unit, self.decimals)

    def shade(self, value: float | str | None) -> str:
        """Its colour by mapping or threshold."""
        if mapped := self._mapped(value):
            return COLORS[mapped["color"]]
        shade = self.steps[0]["color"] if self.steps else "text"
        if isinstance(value, float):
            for step in self.steps[1:]:
                shade = step["color"] if value >= step["value"] else shade
        return COLORS[shade]

    def _mapped(self, value: float | str | None) -> Mapping[str, Any] | None:
        key = f"{value:g}" if isinstance(value, float) else str(value)
        found = (mapping["options"].get(key) for mapping in self.mappings)
        return next((result for result in found if result), None)


def look_of(panel: Mapping[str, Any], name: str) -> Look:
    """The look of a field of a panel, by the field's name."""
    config = panel["fieldConfig"]
    defaults = config["defaults"]
    settings: dict[str, Any] = {
        "unit": defaults.get("unit", "none"),
        "decimals": defaults.get("decimals"),
        "thresholds": defaults.get("thresholds", {"steps": []}),
        "mappings": defaults.get("mappings", []),
        "color": defaults.get("color", {}),
        "min": defaults.get("min"),
        "max": defaults.get("max"),
    }
    custom = dict(defaults.get("custom", {}))
    for override in config.get("overrides", []):
        if _matches(override["matcher"], name):
            for item in override["properties"]:
                inside = item["id"].startswith("custom.")
                (custom if inside else settings)[item["id"].removeprefix("custom.")] = item["value"]
    decimals = settings["decimals"]
    return Look(
        settings["unit"],
        None if decimals is None else int(decimals),
        settings["thresholds"]["steps"],
        settings["mappings"],
        settings["color"],
        custom,
        settings["min"],
        settings["max"],
    )


def _matches(matcher: Mapping[str, Any], name: str) -> bool:
    if matcher["id"] == "byName":
        return bool(matcher["options"] == name)
    assert matcher["id"] == "byRegexp", matcher
    return re.search(matcher["options"].strip("/"), name) is not None


def with_unit(value: float, unit: str, decimals: int | None = None) -> str:
    """A number with its unit, scaled as Grafana scales it.

    Raises:
        ValueError: the unit is not known here.
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "-\N{INFINITY}"
    if unit not in UNITS:
        raise ValueError(f"unit {unit}; known are {', '.join(UNITS)}")
    return UNITS[unit](value, decimals)


def fixed(value: float, decimals: int | None) -> str:
    """The two digits that matter, or all of an integer, if nothing else is asked for."""
    if decimals is None:
        decimals = max(0, 1 - math.floor(math.log10(abs(value)))) if value % 1 else 0
    return f"{value:.{decimals}f}"


def _scaled(value: float, decimals: int | None, names: Sequence[str], base: float) -> str:
    place = 0
    while abs(value) >= base and place < len(names) - 1:
        value, place = value / base, place + 1
    return fixed(value, decimals) + names[place]


def _seconds(value: float, decimals: int | None) -> str:
    size = abs(value)
    for limit, factor, name in _SMALL_TIMES:
        if 0 < size < limit:
            return fixed(value * factor, decimals) + name
    divisor, name = next((divisor, name) for limit, divisor, name in _TIMES if size < limit)
    return fixed(value / divisor, decimals) + name


UNITS = {
    "none": fixed,
    "sci": lambda value, decimals: f"{value:.{2 if decimals is None else decimals}e}",
    "short": lambda value, decimals: _scaled(value, decimals, _SHORT, 1000),
    "percentunit": lambda value, decimals: fixed(value * 100, decimals) + "%",
    "s": _seconds,
    "bytes": lambda value, decimals: _scaled(value, decimals, _IEC, 1024),
    "Bps": lambda value, decimals: _scaled(value, decimals, [f" {p}B/s" for p in _SI], 1000),
    "watt": lambda value, decimals: _scaled(value, decimals, [f" {p}W" for p in _SI], 1000),
    "hertz": lambda value, decimals: _scaled(value, decimals, [f" {p}Hz" for p in _SI], 1000),
    "celsius": lambda value, decimals: fixed(value, decimals) + " \N{DEGREE SIGN}C",
}


def scheme_color(scheme: str, share: float) -> tuple[int, int, int]:
    """Red, green, blue of a place between 0 (low) and 1 (high) of a scheme in the dark theme."""
    stops = SCHEMES[scheme][::-1]
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    low, high = (tuple(int(stop[i : i + 2], 16) for i in (1, 3, 5)) for stop in stops[left : left + 2])
    red, green, blue = (round(a + (b - a) * (place - left)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values that cover low ... high with about `most` steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]
