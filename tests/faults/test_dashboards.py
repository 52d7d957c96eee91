"""Every query of every dashboard, asked of a real Prometheus: a run with planted faults, a healthy one, and none."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from monitoring.dashboards import DASHBOARDS, JSON
from monitoring.dashboards.drawing.answers import Frame, Prometheus, Series, View, choose, options_of, transform
from monitoring.dashboards.history import EVERY, now, prometheus
from monitoring.dashboards.render import main, page
from monitoring.demo.faults import Fault
from monitoring.demo.run import Run, Shape
from tests.monitors import needs_prometheus

pytestmark = needs_prometheus
MINUTES = 40
MODELS = {name: json.loads((JSON / f"{name}.json").read_text(encoding="utf-8")) for name in DASHBOARDS}
PANELS = [(name, panel) for name, model in MODELS.items() for panel in model["panels"] if panel["type"] != "row"]
FAULTS = (
    Fault("restart-loop", 240, 250),
    Fault("straggler", 600),
    Fault("dead-expert", 900),
    Fault("xid", 900),
    Fault("rank-down", 1500, 1600),
)


@dataclass(frozen=True)
class Watched:
    """Two runs and the Prometheus that knows them."""

    url: str
    faulty: Run
    healthy: Run
    end: float

    def view(self, name: str, **chosen: str) -> View:
        """A dashboard's variables chosen, over the whole time."""
        server, start = Prometheus(self.url), self.end - MINUTES * 60
        return View(server, start, self.end, EVERY, choose(MODELS[name], server, start, self.end, **chosen))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    begin = now() - MINUTES * 60
    faulty = Run(Shape("faulty", nodes=2, gpus=4, layers=4, experts=8), FAULTS, begin)
    healthy = Run(Shape("healthy", nodes=2, gpus=1, layers=2, experts=8), (), begin)
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus([faulty, healthy], begin, MINUTES * 60, folder) as url:
        yield Watched(url, faulty, healthy, begin + MINUTES * 60)


def of_panel(view: View, panel: dict[str, Any]) -> list[Series]:
    """What each query answers; a table's values as series."""
    found = []
    for target in panel["targets"]:
        if target.get("format") == "table":
            frame = view.frame(target, alone=True)
            found.append(Series(target["refId"], {}, list(frame.columns["Value"])))
            assert len(frame), target["expr"]
        else:
            answers = view.series(target)
            assert answers, target["expr"]
            found += answers
    return found


def titled(name: str, title: str) -> dict[str, Any]:
    (panel,) = [panel for panel in MODELS[name]["panels"] if panel["title"] == title]
    return panel


def framed(view: View, panel: dict[str, Any]) -> Frame:
    targets = panel["targets"]
    return transform([view.frame(target, alone=len(targets) == 1) for target in targets], panel["transformations"])


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=lambda part: part if isinstance(part, str) else part["title"])
def test_every_query_has_an_answer(watched: Watched, name: str, panel: dict[str, Any]) -> None:
    view = watched.view(name, **({"run": "faulty"} if name != "all-runs" else {}))
    for answer in of_panel(view, panel):
        assert any(value is not None and math.isfinite(value) for value in answer.values), (panel["title"], answer.name)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_variable_and_annotation_has_an_answer(watched: Watched, name: str) -> None:
    view = watched.view(name, **({"run": "faulty"} if name != "all-runs" else {}))
    for variable in MODELS[name]["templating"]["list"]:
        if variable["type"] == "query":
            options = options_of(variable, view)
            expected = {"run": 2, "node": 2, "rank": 8, "layer": 4}[variable["name"]]
            assert len(options) == expected, (variable["name"], options)
    for annotation in MODELS[name]["annotations"]["list"]:
        assert view.events(annotation), annotation["name"]


def test_annotations_are_where_things_happened(watched: Watched) -> None:
    view = watched.view("run-at-a-glance", run="faulty")
    marks = {mark["name"]: view.events(mark) for mark in MODELS["run-at-a-glance"]["annotations"]["list"]}
    ((start, end),) = marks["Restarts"]
    assert 235 <= start - view.start <= 270 and end - start <= 60
    saved = watched.faulty.series[0]._values["last_checkpoint_timestamp_seconds"]
    assert marks["Checkpoints"][-1][0] == pytest.approx(saved, abs=0.01)  # its own time, not that of a scrape
    down = [start - view.start for start, _ in marks["Alerts"]]
    assert any(1525 <= start <= 1560 for start in down), down


def test_one_run_is_not_told_of_another(watched: Watched) -> None:
    names = [panel for name, panel in PANELS if name == "ranks-and-stragglers"]
    view = watched.view("ranks-and-stragglers", run="healthy")
    nodes = {
        answer.labels.get("node", "healthy-01")
        for panel in names
        for target in panel["targets"]
        if target.get("format") != "table"
        for answer in view.series(target)
    }
    assert nodes == {"healthy-01", "healthy-02"}
    (ranks,) = view.series(titled("run-at-a-glance", "Ranks")["targets"][0])
    assert ranks.values[-1] == 2


def test_one_run_is_not_told_of_the_hardware_of_another(watched: Watched) -> None:
    (mark,) = [mark for mark in MODELS["run-at-a-glance"]["annotations"]["list"] if mark["name"] == "Alerts"]
    told = {run: watched.view("run-at-a-glance", run=run).events(mark) for run in ("faulty", "healthy")}
    xid = [start for start, _ in told["faulty"] if 900 <= start - (watched.end - MINUTES * 60) < 960]
    assert xid and not told["healthy"]


def test_chosen_ranks_are_the_ones_shown(watched: Watched) -> None:
    view = watched.view("ranks-and-stragglers", run="faulty", rank="(1|3)")
    shown = view.series(titled("ranks-and-stragglers", "Own compute of each rank over the median")["targets"][0])
    assert {one.name for one in shown} == {"1", "3"}


def test_the_straggler_is_the_first_row_and_the_brightest_line(watched: Watched) -> None:
    view = watched.view("ranks-and-stragglers", run="faulty")
    panel = titled("ranks-and-stragglers", "Ten slowest ranks")
    frame = framed(view, panel)
    row = max(range(len(frame)), key=lambda place: float(frame.columns["Own compute"][place]))
    victim = watched.faulty.victim
    assert (frame.columns["Rank"][row], frame.columns["Node"][row]) == (str(victim), "faulty-02")
    assert frame.columns["GPU"][row] == str(victim % 4)
    assert frame.columns["Over median"][row] == pytest.approx(1.3, abs=0.03)
    assert list(frame.columns)[:2] == ["Rank", "Node"] and len(frame) == 8
    rows = view.series(titled("ranks-and-stragglers", "Own compute of each rank over the median")["targets"][0])
    assert max(rows, key=lambda one: float(one.values[-1])).name == str(victim)
    (count,) = view.series(titled("ranks-and-stragglers", "Stragglers")["targets"][0])
    assert count.values[-1] == 1


def test_a_dead_expert_is_starved_and_its_layer_idle(watched: Watched) -> None:
    view = watched.view("experts-and-balance", run="faulty", layer="2")
    frame = framed(view, titled("experts-and-balance", "Most starved experts"))
    assert [frame.columns[name][0] for name in ("Layer", "Expert", "Over mean")] == ["2", "3", 0.0]
    (idle,) = view.series(titled("experts-and-balance", "Idle experts by layer, most first")["targets"][0])
    assert idle.name == "layer 2" and idle.values[-1] == 1
    grid = framed(view, titled("experts-and-balance", "Tokens of each expert over its layer's mean"))
    assert len(grid) == 4 * 8 and sum(grid.columns["Value"]) == pytest.approx(4 * 8)
    over_time = view.series(titled("experts-and-balance", "Experts of layer $layer over time")["targets"][0])
    assert len(over_time) == 8 and {one.name: one.values[-1] for one in over_time}["3"] == 0


def test_shares_of_time_add_up(watched: Watched) -> None:
    view = watched.view("run-at-a-glance", run="faulty")
    shares = [view.series(target) for target in titled("run-at-a-glance", "Where the time goes")["targets"]]
    columns = list(zip(*(one.values for answers in shares for one in answers), strict=True))
    sums = [sum(column) for column in columns if None not in column]
    assert len(sums) > 100 and sums == pytest.approx([1.0] * len(sums))


def test_the_time_left_is_right_from_the_first_minutes_on(watched: Watched) -> None:
    """A rate over five minutes would say twice as much, two and a half minutes after the start."""
    server, start = Prometheus(watched.url), watched.end - MINUTES * 60
    chosen = choose(MODELS["run-at-a-glance"], server, start, start + 150, run="healthy")
    view = View(server, start, start + 150, EVERY, chosen)
    (left,) = view.series(titled("run-at-a-glance", "Time left")["targets"][0])
    assert left.values[-1] == pytest.approx(20_000 * watched.healthy.shape.step_seconds, rel=0.25)


def test_the_node_with_a_rank_that_is_down_is_red(watched: Watched) -> None:
    view = watched.view("ranks-and-stragglers", run="faulty")
    bands = {
        one.name: one.values for one in view.series(titled("ranks-and-stragglers", "What each node does")["targets"][0])
    }
    at = 1560 // EVERY
    assert bands["faulty-02"][at] == 0 and bands["faulty-01"][at] == 2
    assert bands["faulty-02"][-1] == 2


def test_a_run_that_is_gone_leaves_no_value_behind(watched: Watched) -> None:
    """Ten minutes after the last scrape: what is asked for now is empty, the curves stay."""
    start, end = watched.end - MINUTES * 60, watched.end + 600
    variables = watched.view("run-at-a-glance", run="faulty").variables
    view = View(Prometheus(watched.url), start, end, EVERY, variables)
    for title in ("State", "Step", "Since the last step", "Ranks", "Time left"):
        assert not view.series(titled("run-at-a-glance", title)["targets"][0]), title
    assert view.series(titled("run-at-a-glance", "Training and validation loss")["targets"][0])


def test_before_anything_runs_every_panel_says_so(tmp_path: Path) -> None:
    begin = now() - 60
    with prometheus([], begin, 60, tmp_path) as url:
        view = View(
            Prometheus(url),
            begin,
            begin + 60,
            EVERY,
            {"datasource": "p", "run": "x", "node": "x", "rank": "x", "layer": "0"},
        )
        for model in MODELS.values():
            html = page(model, view)
            for panel in model["panels"]:
                if panel["type"] != "row" and panel["title"] != "Alerts firing":
                    assert html.count(panel["fieldConfig"]["defaults"]["noValue"][:12].replace("'", "&#x27;")), panel[
                        "title"
                    ]


def test_pages_need_no_network_and_pictures_are_made(watched: Watched, tmp_path: Path) -> None:
    picture = ["--png"] if shutil.which("chromium") else []
    main(
        [
            "--prometheus",
            watched.url,
            "--run",
            "faulty",
            "--minutes",
            str(MINUTES),
            "--end",
            str(watched.end),
            "--out",
            str(tmp_path),
            *picture,
        ]
    )
    pages = sorted(tmp_path.glob("*.html"))
    assert [path.stem for path in pages] == sorted(DASHBOARDS)
    for path in pages:
        html = path.read_text(encoding="utf-8")
        assert "drawn by monitoring.dashboards.render, not by Grafana" in html
        assert not any(word in html for word in ("http://", "https://", "<script", "src=", ">nan<", ">NaN<"))
        if picture:
            png = path.with_suffix(".png").read_bytes()
            assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 1600
