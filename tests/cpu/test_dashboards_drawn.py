"""Dashboards drawn without a Grafana: values, variables and tables as Grafana has them."""

from __future__ import annotations

import math
import re
import zlib
from base64 import b64decode
from typing import Any

import pytest

from monitoring.dashboards.drawing import graph, heat, tiles
from monitoring.dashboards.drawing.answers import Frame, Prometheus, Series, View, choose, escaped, transform
from monitoring.dashboards.drawing.axes import Area, merged, time_axis
from monitoring.dashboards.drawing.values import COLORS, fixed, look_of, scheme_color, ticks, with_unit

AREA = Area(600, 300, [0.0, 60.0, 120.0, 180.0])


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "words"),
    [
        (0.0, "none", None, "0"),
        (1740.0, "none", None, "1740"),
        (1.2345, "none", None, "1.2"),
        (0.012345, "none", None, "0.012"),
        (1.2345, "none", 3, "1.234"),
        (33_012.0, "short", None, "33 K"),
        (999.0, "short", None, "999"),
        (1_056_000.0, "short", 1, "1.1 Mil"),
        (0.6563, "percentunit", 1, "65.6%"),
        (2e-5, "sci", None, "2.00e-05"),
        (0.78, "s", None, "780 ms"),
        (59.0, "s", None, "59 s"),
        (90.0, "s", None, "1.5 mins"),
        (82_800.0, "s", None, "23 hours"),
        (90e9, "bytes", None, "84 GiB"),
        (9e10, "Bps", None, "90 GB/s"),
        (19_500.0, "watt", 1, "19.5 kW"),
        (1.98e9, "hertz", 2, "1.98 GHz"),
        (82.0, "celsius", 0, "82 \N{DEGREE SIGN}C"),
        (math.nan, "s", None, "NaN"),
        (math.inf, "none", None, "\N{INFINITY}"),
    ],
)
def test_values_are_written_as_in_grafana(value: float, unit: str, decimals: int | None, words: str) -> None:
    assert with_unit(value, unit, decimals) == words


def test_an_unknown_unit_is_an_error() -> None:
    with pytest.raises(ValueError, match="unit furlong; known are none, sci, short"):
        with_unit(1.0, "furlong")


def test_two_digits_matter() -> None:
    for exponent in range(-6, 6):
        value = 3.14159 * 10.0**exponent
        assert float(fixed(value, None)) == pytest.approx(value, rel=0.03)


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0, 1), (0.95, 1.2), (1580, 1980), (0, 3.7e10), (-3, 8)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 7 and low <= found[0] + 1e-9 and found[-1] <= high * (1 + 1e-9)
        step = found[1] - found[0]
        assert f"{step:e}"[0] in "125" and found == pytest.approx([found[0] + i * step for i in range(len(found))])
    assert graph.tick_words("none", [2.0, 2.25, 2.5]) == ["2.00", "2.25", "2.50"]
    assert graph.tick_words("s", [0, 2, 4]) == ["0 s", "2 s", "4 s"]


def test_the_last_hour_is_not_cut_off() -> None:
    texts = time_axis(Area(600, 300, [0.0, 1800.0, 3600.0]), 40, 0)
    assert re.search(r'x="600.0"[^>]*text-anchor="end"[^>]*>01:00<', texts)
    assert re.search(r'text-anchor="middle"[^>]*>00:30<', texts)


def panel_of(**defaults: Any) -> dict[str, Any]:
    return {"fieldConfig": {"defaults": defaults, "overrides": []}, "options": {}, "targets": [{}]}


def test_thresholds_mappings_and_overrides_decide_the_look() -> None:
    steps = [{"value": None, "color": "red"}, {"value": 0.8, "color": "orange"}, {"value": 0.9, "color": "green"}]
    panel = panel_of(unit="percentunit", thresholds={"steps": steps}, noValue="nothing")
    look = look_of(panel, "any")
    shades = [look.shade(value) for value in (0.1, 0.8, 0.89, 0.9, 5.0)]
    assert shades == [COLORS[name] for name in ("red", "orange", "orange", "green", "green")]
    mapped = {"type": "value", "options": {"2": {"text": "train", "color": "blue"}}}
    override = {"matcher": {"id": "byName", "options": "state"}, "properties": [{"id": "mappings", "value": [mapped]}]}
    panel["fieldConfig"]["overrides"] = [override]
    assert look_of(panel, "state").text(2.0) == "train" and look_of(panel, "state").shade(2.0) == COLORS["blue"]
    assert look_of(panel, "other").text(2.0) == "200%"


def test_dark_schemes_run_from_dark_to_light() -> None:
    brightness = [sum(scheme_color("Oranges", share / 20)) for share in range(21)]
    assert brightness == sorted(brightness) and brightness[0] < 200 < 700 < brightness[-1]
    assert scheme_color("Blues", -3) == scheme_color("Blues", 0) and scheme_color("Blues", 7) == scheme_color(
        "Blues", 1
    )


# --- variables and tables ---------------------------------------------------------------------------------------------


class Labels(Prometheus):
    """Answers `label_values` only."""

    def __init__(self, **values: list[str]) -> None:
        self.values = values
        self.asked: list[str] = []

    def label_values(self, label: str, selector: str, start: float, end: float) -> list[str]:
        self.asked.append(selector)
        return self.values[label]


def variable(name: str, query: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": "query", "query": query, **more}


def test_variables_depend_on_each_other_and_all_is_a_list() -> None:
    model = {
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource"},
                variable("run", "label_values(step, run)", sort=2),
                variable("node", 'label_values(step{run="$run"}, node)', sort=7, includeAll=True),
                variable("rank", 'label_values(step{node=~"$node"}, rank)', sort=7, includeAll=True, allValue=".*"),
            ]
        }
    }
    server = Labels(run=["a", "c", "b"], node=["n.10", "n.9"], rank=["0", "1"])
    found = choose(model, server, 0, 60)
    assert found == {"datasource": "prometheus", "run": "c", "node": r"(n\\.9|n\\.10)", "rank": ".*"}
    assert server.asked == ["step", 'step{run="c"}', r'step{node=~"(n\\.9|n\\.10)"}']
    assert choose(model, server, 0, 60, run="a")["run"] == "a"
    server.values["run"] = []
    with pytest.raises(ValueError, match=r"\$run: label_values\(step, run\) has no answer"):
        choose(model, server, 0, 60)


def test_names_are_escaped_for_a_pattern_in_a_text() -> None:
    assert escaped("h200-01.cluster") == r"h200-01\\.cluster" and escaped("a+b") == r"a\\+b"


def test_built_in_variables() -> None:
    view = View(Labels(), 1000, 4600, 15, {"run": "a"})
    assert view.fill("rate(x{run='$run'}[$__rate_interval]) + $__from ${run:regex} [$__range]") == (
        "rate(x{run='a'}[60s]) + 1000000 a [3600s]"
    )
    with pytest.raises(ValueError, match=r"\$layer in"):
        view.fill("$layer")
    assert len(view.times) == 241 and view.times[-1] == 4600


def test_tables_are_merged_by_what_they_share() -> None:
    first = Frame({"run": ["a", "b"], "model": ["m", "n"], "Value #A": [1.0, 1.0]})
    second = Frame({"run": ["b"], "Value #B": [7.0]})
    steps = [
        {"id": "merge", "options": {}},
        {"id": "filterFieldsByName", "options": {"include": {"names": ["run", "Value #B"]}}},
        {"id": "organize", "options": {"indexByName": {"Value #B": 0, "run": 1}, "renameByName": {"run": "Run"}}},
    ]
    assert transform([first, Frame(), second], steps).columns == {"Value #B": [None, 7.0], "Run": ["a", "b"]}
    assert transform([Frame({"Value": []})], []).columns == {"Value": []}
    with pytest.raises(ValueError, match="transformation pivot; known are merge"):
        transform([first], [{"id": "pivot", "options": {}}])


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_gaps_break_lines_and_are_not_zero() -> None:
    panel = panel_of(unit="none", custom={"lineWidth": 1}, color={"mode": "palette-classic"})
    panel["options"] = {"legend": {"placement": "bottom"}}
    markup = graph.timeseries(panel, [Series("a", {}, [1.0, None, math.nan, 2.0])], AREA)
    assert markup.count("<circle") == 2 and markup.count("<polyline") == 2  # two single points
    assert "nan" not in markup


def test_stacks_add_up() -> None:
    series = [Series("a", {}, [0.25, 0.5]), Series("b", {}, [0.75, None])]
    assert graph._stack(series) == [[(0.0, 0.25), (0.0, 0.5)], [(0.25, 1.0), (None, None)]]


def test_buckets_are_counted_apart() -> None:
    assert heat._buckets([[1.0, None], [3.0, 2.0], [3.0, 5.0]]) == [[1.0, None], [2.0, 2.0], [0.0, 3.0]]


def test_rows_of_a_heatmap_are_sorted_as_numbers() -> None:
    panel = panel_of()
    panel["options"] = {"cellValues": {}, "yAxis": {}, "color": {"scheme": "Oranges", "min": 0, "max": 1}}
    series = [Series(name, {}, [value] * 4) for name, value in (("10", 1.0), ("9", 0.0), ("2", 0.5))]
    markup = heat.heatmap(panel, series, AREA)
    words = re.findall(r'text-anchor="end" fill="[^"]+">(\d+)<', markup)
    assert words[:3] == ["2", "9", "10"]
    picture = b64decode(re.search(r"base64,([^\"]+)", markup)[1])
    rows = zlib.decompress(picture[picture.index(b"IDAT") + 4 : -16])
    top = [tuple(rows[row * 17 + 1 : row * 17 + 4]) for row in range(3)]  # 10 is on top
    assert top == [scheme_color("Oranges", 1), scheme_color("Oranges", 0), scheme_color("Oranges", 0.5)]


def test_marks_that_overlap_are_one() -> None:
    assert merged([(0, 10, "red"), (20, 30, "red"), (5, 12, "red"), (0, 5, "blue")]) == [
        (0, 5, "blue"),
        (0, 12, "red"),
        (20, 30, "red"),
    ]


def test_states_become_stretches_and_emptiness_has_words() -> None:
    assert tiles._pieces([1.0, 1.0, None, 1.0, 2.0]) == [(0, 2, 1.0), (3, 4, 1.0), (4, 5, 2.0)]
    assert tiles.last([1.0, None, math.nan]) == 1.0 and tiles.last([None]) is None
    assert "No step &lt;yet&gt;" in tiles.nothing(panel_of(noValue="No step <yet>"), AREA)
