"""Planted faults reach whom they concern, each as exactly one alert, and clear; a healthy cluster is silent."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitoring import stack
from monitoring.demo.faults import ALERT_OF, Fault
from monitoring.demo.run import TOKENS, Run, Shape
from monitoring.demo.server import Demo
from tests.monitors import Told, needs_prometheus, query, value, webhook

pytestmark = [needs_prometheus, pytest.mark.slow]
SPEED, SCRAPE_SECONDS = 60.0, 1.0
BEGIN, END, CLEAR = 40.0, 92.0, 225.0
"""Seconds; the longest alert takes half an hour to come, and two hours to go."""
HEALTHY = {"healthy": 12.0, "healthy-slow": 300.0}
"""Seconds of a step."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """All that was sent while each fault was in a run of its own for three minutes, 60 times faster than real."""
    folder = tmp_path_factory.mktemp("told")
    runs = [
        Run(Shape(name, 2, 2, step_seconds=12.0, layers=4, experts=32), [fault], time.time(), SPEED, seed=place)
        for place, name in enumerate(ALERT_OF)
        for fault in [Fault(name, 0.0 if name == "below-plan" else BEGIN, END)]
    ]
    runs += [Run(Shape(name, 2, 2, step, 4, 32), [], time.time(), SPEED) for name, step in HEALTHY.items()]
    ports = dict.fromkeys(stack.PORTS, 0)
    with webhook() as told:
        options = stack.Options(
            folder / "data", folder / "runs", (folder / "discovery",), ports, told.url, SPEED, SCRAPE_SECONDS
        )
        demo = Demo(runs, folder / "discovery")
        try:
            with stack.running(options) as started:
                while demo.seconds < CLEAR:
                    time.sleep(0.5)
                    started.look()
                skip_if_starved(started.urls["prometheus"])
                firing = query(started.urls["prometheus"], 'ALERTS{alertstate="firing"}')
                assert firing == [], firing
        finally:
            demo.close()
        yield told


def skip_if_starved(prometheus: str) -> None:
    """A second is all that a scrape has here; where even healthy ranks miss it, the machine does too much else."""
    slow = query(prometheus, f'max_over_time(scrape_duration_seconds{{run=~"{"|".join(HEALTHY)}"}}[4m]) > 0.8')
    if slow and os.getloadavg()[1] > 3 * (os.cpu_count() or 1):
        pytest.skip(f"scrapes of healthy ranks took too long, with a load of {os.getloadavg()[1]:.0f}")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ALERT_OF)
def test_a_fault_raises_its_alert_alone_and_clears(told: Told, fault: str) -> None:
    found = told.about(fault)
    assert {alert["labels"]["alertname"] for alert in found} == {ALERT_OF[fault]}
    last = {alert["fingerprint"]: alert["status"] for alert in found}
    assert set(last.values()) == {"resolved"}
    firing = [alert for alert in found if alert["status"] == "firing"]
    assert firing, "nothing was sent when it came"
    for alert in firing:
        assert set(alert["annotations"]) == {"summary", "cause", "command"}
        assert not any(mark in text for text in alert["annotations"].values() for mark in ("{{", "no value", "<"))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("run", HEALTHY)
def test_a_healthy_run_is_silent(told: Told, run: str) -> None:
    assert told.about(run) == []


def test_nothing_is_about_nobody(told: Told) -> None:
    known = [alert for name in (*ALERT_OF, *HEALTHY) for alert in told.about(name)]
    assert len(known) == len(told.alerts)


@pytest.mark.timeout(200)
def test_128_ranks_as_they_are(tmp_path: Path) -> None:
    """Real time constants: everything is answered, nothing fires, and Prometheus has little to do."""
    with webhook() as told:
        options = stack.Options(tmp_path / "data", tmp_path, ports=dict.fromkeys(stack.PORTS, 0), webhook=told.url)
        demo = Demo([Run(Shape("demo"), [], time.time())], tmp_path / "demo" / "discovery")
        try:
            with stack.running(options) as started:
                end = time.monotonic() + 95  # a minute after setup, which the speed of the last minute counts
                while time.monotonic() < end:
                    time.sleep(1)
                    started.look()
                url = started.urls["prometheus"]
                assert value(url, 'count(up{job="moetrain"} == 1)') == 128
                assert value(url, 'count(up{job=~"dcgm|node"} == 1)') == 32
                assert value(url, "run:moetrain_tokens_per_second:sum") == pytest.approx(128 * TOKENS / 4, rel=0.05)
                assert value(url, "run:moetrain_mfu:ratio") == pytest.approx(TOKENS / 4 * 2.1e10 / 989e12, rel=0.05)
                assert value(url, "sum(run:moetrain_phase:share)") == pytest.approx(1)
                assert value(url, "count(rank:moetrain_own_compute_seconds_per_step:mean)") == 128
                assert query(url, "ALERTS") == []
                assert value(url, "sum(prometheus_rule_group_last_duration_seconds)") < 1
                assert value(url, "sum(increase(prometheus_rule_evaluation_failures_total[1m]))") == 0
        finally:
            demo.close()
    assert told.alerts == []
