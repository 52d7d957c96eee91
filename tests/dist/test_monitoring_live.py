"""A real run under a real Prometheus: what it exports is found, recorded, and missed when it crashes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring import stack
from tests.monitors import needs_prometheus, query, value, webhook
from tests.runs import tiny_run, write_text

pytestmark = [needs_prometheus, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SPEED = 10.0


def start(folder: Path) -> subprocess.Popen[bytes]:
    """A run on one rank that takes longer than the test."""
    raw = tiny_run(folder, train={"steps": 100_000}, metrics={"prometheus_port": 0, "log_every": 1000})
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    with (folder / "run.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "moetrain", "train", str(folder / "run.yaml")], cwd=ROOT, stdout=log, stderr=log
        )


def test_a_run_is_watched_missed_after_a_crash_and_not_after_its_end(tmp_path: Path) -> None:
    write_text(tmp_path)
    ports = dict.fromkeys(stack.PORTS, 0)
    with webhook() as told:
        options = stack.Options(tmp_path / "data", tmp_path, (), ports, told.url, SPEED, scrape_seconds=1.0)
        with stack.running(options) as started:
            url = started.urls["prometheus"]

            def until(condition: Callable[[], Any], seconds: float = 90) -> None:
                deadline = time.monotonic() + seconds
                while not condition():
                    assert time.monotonic() < deadline, (tmp_path / "run.log").read_text()[-2000:]
                    started.look()
                    time.sleep(0.3)

            def alerts(status: str) -> set[str]:
                return {alert["labels"]["alertname"] for alert in told.alerts if alert["status"] == status}

            run = start(tmp_path)
            try:
                until(lambda: (value(url, "run:moetrain_tokens_per_second:sum") or 0) > 0)
                until(lambda: (value(url, "sum(run:moetrain_phase:share)") or 0) == pytest.approx(1))
                until(lambda: value(url, "count(rank:moetrain_own_compute_seconds_per_step:mean)") == 1)
                until(lambda: (value(url, "run:moetrain_goodput:ratio") or 0) > 0)
                assert value(url, "count(moetrain_run_info)") == 1
                run.kill()
                run.wait()
                until(lambda: "AllTargetsGone" in alerts("firing"))
            finally:
                run.kill()
            run = start(tmp_path)
            try:
                until(lambda: "AllTargetsGone" in alerts("resolved"))
                until(lambda: (value(url, "run:moetrain_tokens_per_second:sum") or 0) > 0)
                seen = len(told.alerts)
                run.send_signal(signal.SIGTERM)
                until(lambda: run.poll() is not None)
                until(lambda: not query(url, "up{job='moetrain'}"))
                time.sleep(8)
                assert "AllTargetsGone" not in {alert["labels"]["alertname"] for alert in told.alerts[seen:]}
            finally:
                run.kill()
