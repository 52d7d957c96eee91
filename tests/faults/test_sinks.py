"""Sinks that hang, fail or are flooded: training goes on, at the same speed, and ends."""

from __future__ import annotations

import io
import logging
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from moetrain.config import MetricsConfig
from moetrain.metrics import Metrics, StepRecord, read_records
from moetrain.metrics import sinks as module

STEPS = 300
CALL_SECONDS = 0.001
"""Most steps hand over in less; it is some tens of microseconds."""


class Fake:
    """A sink that does as a test tells it."""

    calls: ClassVar[list[str]] = []
    hang = threading.Event()
    fail_at: str = ""
    hang_at: str = ""

    def __init__(self, output_dir: Path) -> None:
        pass

    def start(self, about: Mapping[str, Any]) -> None:
        self._call("start")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._call("log")

    def close(self) -> None:
        self._call("close")

    def _call(self, name: str) -> None:
        Fake.calls.append(name)
        if name == Fake.hang_at:
            Fake.hang.wait()
        if name == Fake.fail_at:
            raise RuntimeError("the server is gone")


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Fake.calls, Fake.hang, Fake.fail_at, Fake.hang_at = [], threading.Event(), "", ""
    monkeypatch.setitem(module.PACKAGES, "tensorboard", "json")
    monkeypatch.setattr(module, "TensorBoard", Fake)
    monkeypatch.setattr(module, "BACKLOG", 50)
    yield
    Fake.hang.set()
    for thread in threading.enumerate():
        if thread.name == "moetrain-records":  # it would make its calls in the next test
            thread.join()


def run(folder: Path) -> tuple[float, float]:
    """Seconds of the median hand-over, and of the end."""
    out = Metrics(MetricsConfig(sinks=["tensorboard"]), folder, 0, STEPS, console=Console(file=io.StringIO()))
    seconds = []
    for step in range(1, STEPS + 1):
        begin = time.perf_counter()
        out.step(
            StepRecord(
                step=step, loss=1.0, grad_norm=1.0, lr=1e-3, tokens=1, tokens_per_second=1.0, step_seconds=0.1,
                memory_bytes=1,
            )
        )  # fmt: skip
        seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    out.close()
    assert len([r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "step"]) == STEPS
    return statistics.median(seconds), time.perf_counter() - begin


def test_one_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKLOG", 1000)
    run(tmp_path)
    assert Fake.calls == ["start"] + ["log"] * STEPS + ["close"]


@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_one_that_hangs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    Fake.hang_at = where
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.5)
    with caplog.at_level(logging.WARNING):
        usual, end = run(tmp_path)
    assert usual < CALL_SECONDS
    assert end < 5
    (warning,) = [r.getMessage() for r in caplog.records]
    if where != "close":
        lost = int(warning.split()[-3])
        assert "tensorboard lacks records" in warning and STEPS - 60 <= lost <= STEPS


@pytest.mark.parametrize("where", ["start", "log"])
def test_one_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str) -> None:
    Fake.fail_at = where
    with caplog.at_level(logging.WARNING):
        usual, _ = run(tmp_path)
    assert usual < CALL_SECONDS
    assert Fake.calls == {"start": ["start"], "log": ["start", "log"]}[where]
    told = [r.getMessage() for r in caplog.records]
    assert told[0] == "tensorboard is left out from here on: RuntimeError: the server is gone"
