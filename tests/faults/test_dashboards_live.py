"""Dashboards on a run that really trains, through the Prometheus that `make monitor` starts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from monitoring import stack
from monitoring.dashboards import DASHBOARDS, JSON
from monitoring.dashboards.drawing.answers import Prometheus, View, choose
from monitoring.dashboards.render import page
from tests.monitors import needs_prometheus, value
from tests.runs import tiny_run, write_text

pytestmark = needs_prometheus
STEPS_SEEN = 30
UNKNOWN_ON_A_CPU = ("moetrain_expected_tokens_per_second_per_gpu", "run:moetrain_mfu:ratio")
NOW_AND_THEN = ("Firing alerts", "Idle experts by layer, most first")
"""Empty when all is well."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prometheus that watches a run of one rank."""
    folder = tmp_path_factory.mktemp("live")
    write_text(folder)
    raw = tiny_run(
        folder / "runs",
        metrics={"prometheus_port": 0, "expert_matrix": True},
        train={"steps": 100_000, "eval_rows": 4, "eval_every": 10},
        checkpoint={"every": 15},
        data={"train": [{"path": str(folder / "text.jsonl")}], "seq_len": 32, "batch_size": 2},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    options = stack.Options(folder / "data", folder / "runs", ports=dict.fromkeys(stack.PORTS, 0), scrape_seconds=0.5)
    command = [sys.executable, "-m", "moetrain", "train", str(folder / "run.yaml")]
    with (
        (folder / "log").open("wb") as log,
        stack.process(command, log, {"OMP_NUM_THREADS": "1"}) as run,
        stack.running(options) as monitors,
    ):
        wait_for_steps(monitors, run, folder / "log", monitors.urls["prometheus"])
        yield monitors.urls["prometheus"]


def wait_for_steps(monitors: stack.Stack, run: subprocess.Popen[bytes], log: Path, url: str) -> None:
    deadline = time.monotonic() + 240
    recorded = ("run:moetrain_phase:share", "rank:moetrain_own_compute_seconds_per_step:mean")
    while (value(url, "max(moetrain_step)") or 0) < STEPS_SEEN or any(
        value(url, f"max({series} >= 0)") is None for series in recorded
    ):
        assert run.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        monitors.look()
        time.sleep(0.5)


@pytest.mark.parametrize("name", sorted(DASHBOARDS.keys() - {"hardware-and-fabric"}))
def test_every_panel_knows_a_live_run(live: str, name: str) -> None:
    end = time.time()
    server, start = Prometheus(live), end - 60
    model = json.loads((JSON / f"{name}.json").read_text(encoding="utf-8"))
    view = View(server, start, end, 1.0, choose(model, server, start, end))
    assert view.variables["run"] in ("out", ".+")
    for panel in model["panels"]:
        for target in panel.get("targets", []):
            found = server.instant(view.fill(target["expr"]), end)
            known = any(math.isfinite(float(answer["value"][1])) for answer in found)
            expected = not any(series in target["expr"] for series in UNKNOWN_ON_A_CPU)
            assert known is expected or panel["title"] in NOW_AND_THEN, (panel["title"], target["expr"], found)


def test_all_are_drawn(live: str) -> None:
    end = time.time()
    variables = {"datasource": "p", "run": "out", "node": ".*", "rank": ".*", "layer": "0"}
    for name in DASHBOARDS:
        model = json.loads((JSON / f"{name}.json").read_text(encoding="utf-8"))
        html = page(model, View(Prometheus(live), end - 60, end, 1.0, variables))
        assert ("No dcgm-exporter on these nodes" in html) is (name == "hardware-and-fabric")
