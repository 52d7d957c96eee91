"""What a dashboard's queries answer: variables filled in as Grafana does, then asked of a Prometheus.

Only what these dashboards use is here; a transformation or variable that is not known is an error, never skipped.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Labels = Mapping[str, str]
Cell = str | float | None
SHORTEST_RATE_SECONDS = 60
"""$__rate_interval of a source scraped every 15 seconds: four scrapes."""


@dataclass(frozen=True)
class Series:
    """One line: a value, or None, at each time of the grid."""

    name: str
    labels: Labels
    values: list[float | None]


@dataclass
class Frame:
    """A table: columns by name, all of one length."""

    columns: dict[str, list[Cell]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


class Prometheus:
    """The few questions a dashboard asks of Prometheus' HTTP API.

    Raises:
        ValueError: Prometheus rejects the query; with its reason.
        OSError: it does not answer.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def instant(self, expr: str, at: float) -> list[dict[str, Any]]:
        """Series with `metric` and `value`."""
        return list(self._get("query", query=expr, time=f"{at:.3f}")["result"])

    def over(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Series with `metric` and `values`."""
        span = {"start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:.3f}"}
        return list(self._get("query_range", query=expr, **span)["result"])

    def label_values(self, label: str, selector: str, start: float, end: float) -> list[str]:
        """Values of a label among the series of the time range."""
        path = f"label/{urllib.parse.quote(label)}/values"
        return list(self._get(path, **{"match[]": selector, "start": f"{start:.3f}", "end": f"{end:.3f}"}))

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            reason = json.load(error).get("error", error.reason)
            raise ValueError(f"{parameters.get('query', path)}: {reason}") from error


@dataclass(frozen=True)
class View:
    """A time range and the values of variables, as chosen at the top of a dashboard.

    Args:
        start, end: Unix seconds.
        step: seconds between two points.
    """

    prometheus: Prometheus
    start: float
    end: float
    step: float
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def times(self) -> list[float]:
        """The grid of every range query."""
        return [self.start + i * self.step for i in range(int((self.end - self.start) / self.step + 1e-6) + 1)]

    def fill(self, text: str) -> str:
        """`text` with variables replaced.

        Raises:
            ValueError: a variable has no value.
        """
        known = {
            **self.variables,
            "__rate_interval": f"{max(SHORTEST_RATE_SECONDS, round(self.step) + 15)}s",
            "__interval": f"{max(1, round(self.step))}s",
            "__range": f"{round(self.end - self.start)}s",
            "__from": f"{self.start * 1000:.0f}",
        }

        def replaced(match: re.Match[str]) -> str:
            name = match[1] or match[2]
            if name not in known:
                raise ValueError(f"${name} in {text!r} has no value; known are {', '.join(known)}")
            return known[name]

        return re.sub(r"\$(?:(\w+)|\{(\w+)(?::\w+)?\})", replaced, text)

    def series(self, target: Mapping[str, Any]) -> list[Series]:
        """Answers of a query that is drawn, on the grid; an instant query has its value at the last time alone."""
        expr, times = self.fill(target["expr"]), self.times
        found = []
        if target.get("instant"):
            for answer in self.prometheus.instant(expr, self.end):
                values = [None] * (len(times) - 1) + [float(answer["value"][1])]
                found.append(Series(series_name(target, answer["metric"]), answer["metric"], values))
            return found
        for answer in self.prometheus.over(expr, self.start, self.end, self.step):
            at = {round((time - self.start) / self.step): float(value) for time, value in answer["values"]}
            name = series_name(target, answer["metric"])
            found.append(Series(name, answer["metric"], [at.get(place) for place in range(len(times))]))
        return found

    def frame(self, target: Mapping[str, Any], alone: bool) -> Frame:
        """Answer of a query in table format: labels, then `Value`, or `Value #A` beside other queries."""
        answers = self.prometheus.instant(self.fill(target["expr"]), self.end)
        labels = sorted({label for answer in answers for label in answer["metric"]})
        frame = Frame({label: [answer["metric"].get(label) for answer in answers] for label in labels})
        values: list[Cell] = [float(answer["value"][1]) for answer in answers]
        frame.columns["Value" if alone else f"Value #{target['refId']}"] = values
        return frame

    def events(self, annotation: Mapping[str, Any]) -> list[tuple[float, float]]:
        """Start and end of what an annotation marks; points closer than a step are one event."""
        regions: list[tuple[float, float]] = []
        for answer in self.prometheus.over(self.fill(annotation["expr"]), self.start, self.end, self.step):
            regions += self._regions(answer["values"], bool(annotation.get("useValueForTime")))
        return [region for region in regions if self.start <= region[0] <= self.end]

    def _regions(self, values: Sequence[tuple[float, str]], own_time: bool) -> list[tuple[float, float]]:
        regions: list[tuple[float, float]] = []
        for at, text in values:
            time = float(text) / 1000 if own_time else at
            if not own_time and not float(text) > 0:
                continue
            if regions and time <= regions[-1][1] + self.step:
                regions[-1] = (regions[-1][0], time)
            else:
                regions.append((time, time))
        return regions


def choose(model: Mapping[str, Any], prometheus: Prometheus, start: float, end: float, **chosen: str) -> dict[str, str]:
    """Values for a dashboard's variables: those chosen, else All, else the first in the variable's order.

    Raises:
        ValueError: a variable has no value to choose.
    """
    values: dict[str, str] = {}
    for variable in model["templating"]["list"]:
        name = variable["name"]
        if variable["type"] == "datasource":
            values[name] = "prometheus"
            continue
        options = options_of(variable, View(prometheus, start, end, 60, values))
        if name in chosen:
            values[name] = chosen[name]
        elif not options:
            raise ValueError(f"${name}: {variable['query']} has no answer")
        elif variable.get("includeAll"):
            values[name] = variable.get("allValue") or "(" + "|".join(map(escaped, options)) + ")"
        else:
            values[name] = options[0]
    return values


def options_of(variable: Mapping[str, Any], view: View) -> list[str]:
    """What a query variable offers, in its order (Grafana's numbers for it: 1 to 8, even ones are descending)."""
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", view.fill(variable["query"]))
    assert match, variable["query"]
    options = view.prometheus.label_values(match[2], match[1], view.start, view.end)
    numeric = variable.get("sort") in (3, 4, 7, 8)
    return sorted(options, key=natural if numeric else str, reverse=variable.get("sort") in (2, 4, 6, 8))


def escaped(option: str) -> str:
    """One of several values inside a regular expression inside a PromQL string."""
    return re.sub(r"[\\^$*+?.()|{}\[\]']", lambda match: "\\\\" + match[0], option)


def natural(text: str) -> list[Any]:
    """Sort key that reads numbers inside a text as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def series_name(target: Mapping[str, Any], labels: Labels) -> str:
    """The legend: its template filled in, or all labels as Prometheus writes them."""
    if legend := target.get("legendFormat"):
        return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), legend)
    inner = ", ".join(f'{name}="{text}"' for name, text in labels.items() if name != "__name__")
    return f"{labels.get('__name__', '')}{{{inner}}}" if inner else labels.get("__name__", "Value")


def transform(frames: Sequence[Frame], steps: Sequence[Mapping[str, Any]]) -> Frame:
    """One frame after a panel's transformations.

    Raises:
        ValueError: a transformation that is not known here.
    """
    frames = list(frames)
    for step in steps:
        if step["id"] not in TRANSFORMATIONS:
            raise ValueError(f"transformation {step['id']}; known are {', '.join(TRANSFORMATIONS)}")
        frames = TRANSFORMATIONS[step["id"]](frames, step["options"])
    assert len(frames) == 1, f"{len(frames)} tables in one panel: merge them"
    return frames[0]


def _merge(frames: list[Frame], options: Mapping[str, Any]) -> list[Frame]:
    """Rows that agree in the columns all frames have become one row."""
    del options
    present = [frame for frame in frames if len(frame)]
    if not present:
        return [Frame()]
    keys = [name for name in present[0].columns if all(name in frame.columns for frame in present)]
    rows: dict[tuple[Cell, ...], dict[str, Cell]] = {}
    for frame in present:
        for place in range(len(frame)):
            row = {name: column[place] for name, column in frame.columns.items()}
            rows.setdefault(tuple(row[key] for key in keys), {}).update(row)
    names = list(dict.fromkeys(name for frame in present for name in frame.columns))
    return [Frame({name: [row.get(name) for row in rows.values()] for name in names})]


def _filter(frames: list[Frame], options: Mapping[str, Any]) -> list[Frame]:
    wanted = set(options["include"]["names"])
    return [Frame({name: column for name, column in f.columns.items() if name in wanted}) for f in frames]


def _organize(frames: list[Frame], options: Mapping[str, Any]) -> list[Frame]:
    place, name = options["indexByName"], options["renameByName"]
    ordered = [sorted(frame.columns.items(), key=lambda item: place.get(item[0], len(place))) for frame in frames]
    return [Frame({name.get(key, key): column for key, column in columns}) for columns in ordered]


def _convert(frames: list[Frame], options: Mapping[str, Any]) -> list[Frame]:
    for frame in frames:
        for conversion in options["conversions"]:
            column = frame.columns.get(conversion["targetField"])
            if column is not None:
                column[:] = [None if cell is None else float(cell) for cell in column]
    return frames


TRANSFORMATIONS = {
    "merge": _merge,
    "filterFieldsByName": _filter,
    "organize": _organize,
    "convertFieldType": _convert,
}
