"""`--local`: a small copy of a run, on this machine, through submitit's local executor."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import submitit

from launch import local, ultra_550b
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
    assert main(ultra_550b.RUN, ["--local", "data.train=[{path: text.jsonl}]", "train.steps=2", "optim.warmup_steps=0"]) == 0
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


def rank_1_tells(config_file: str, ranks: int, port: int) -> int:
    if submitit.JobEnvironment().global_rank == 1:
        print("error: mend this")
        return 2
    time.sleep(600)
    return 0


def test_a_rank_that_others_wait_for_ends_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "train_rank", rank_1_tells)
    begin = time.monotonic()
    assert main(ultra_550b.RUN, ["--local", "data.train=[{path: text.jsonl}]"]) == 2
    assert time.monotonic() - begin < 60 and "error: mend this" in capsys.readouterr().err


def test_an_output_directory_that_is_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").write_text("precious")
    assert main(ultra_550b.RUN, ["--local", "output_dir=out"]) == 2
    assert "error: output_dir out cannot be written" in capsys.readouterr().err
