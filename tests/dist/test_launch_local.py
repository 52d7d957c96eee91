"""`--local`: a small copy of a run, on this machine, through submitit's local executor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import ultra_550b
from launch.submit import main
from moetrain.config import load_config
from tests.runs import write_text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", "")
    write_text(tmp_path)
    return tmp_path


def test_a_small_copy_of_ultra_trains_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ultra_550b.RUN, ["--local", "data.train=[{path: text.jsonl}]", "train.steps=2"]) == 0
    out = folder / "runs" / "local" / "ultra_550b"
    printed = capsys.readouterr().out
    assert "ultra_550b, a small copy on 2 ranks" in printed and "NemotronHForCausalLM" in printed
    config = load_config(out / "config.yaml")
    assert config.parallel.ep_size == 2 and config.optim.states == "bf16_stochastic"
    assert config.model.activation_checkpointing == "full" and config.train.steps == 2
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]


def test_what_is_wrong_with_the_run_is_told_and_coded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ultra_550b.RUN, ["--local", "optim.lrr=1"]) == 2
    assert "did you mean 'lr'" in capsys.readouterr().err
    assert main(ultra_550b.RUN, ["--local", "data.train=[{path: text.jsonl, text_key: nothing}]"]) == 2
    assert "nothing" in capsys.readouterr().out
