"""Reports of runs that fail, and disks that do not take a report."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from moetrain import launcher
from moetrain.config import RunConfig
from moetrain.metrics import EvalRecord, Metrics
from moetrain.report import write as module

RANK_0 = {"RANK": "0", "WORLD_SIZE": "1"}


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}/out\nmodel: {{path: start}}\ntrain: {{steps: 1}}\ndata: {{train: [{{path: a.txt}}]}}\n"
    )
    return str(path)


def record_something(config: RunConfig) -> None:
    out = Metrics(config.metrics, config.output_dir, 0, config.train.steps)
    out.eval(EvalRecord(step=0, loss=2.0, tokens=8))
    out.close()


def test_a_run_that_fails_leaves_a_report(tmp_path: Path, config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: RunConfig) -> bool:
        record_something(config)
        raise FloatingPointError("step 1: the loss is nan")

    monkeypatch.setattr(launcher, "_train", train)
    with mock.patch.dict(os.environ, RANK_0), pytest.raises(FloatingPointError):
        launcher.launch(config_file)
    assert "validation loss" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_never_began_touches_no_report(
    tmp_path: Path, config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: RunConfig) -> bool:
        raise ValueError("no such data")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"kind": "eval", "step": 0, "loss": 1.0}\n')
    (tmp_path / "out" / "report.html").write_text("of the run before")
    monkeypatch.setattr(launcher, "_train", train)
    with mock.patch.dict(os.environ, RANK_0), pytest.raises(ValueError, match="no such data"):
        launcher.launch(config_file)
    assert (tmp_path / "out" / "report.html").read_text() == "of the run before"


def test_a_disk_that_takes_no_report_changes_nothing(
    tmp_path: Path, config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: RunConfig) -> bool:
        record_something(config)
        return True

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launcher, "_train", train)
    monkeypatch.setattr(module.os, "replace", full)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("of the run before")
    with mock.patch.dict(os.environ, RANK_0):
        assert launcher.launch(config_file) == 0
    assert "no report: [Errno 28] No space left on device" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").read_text() == "of the run before"
