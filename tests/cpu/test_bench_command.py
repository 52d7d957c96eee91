"""`moetrain bench` as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain import cli
from moetrain.bench import profile
from moetrain.bench.commands import PARTS, name_part
from moetrain.bench.shapes import find_shape

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", [part for part in PARTS if part != "model"])
def test_help_of_a_part(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", part, "--help"])
    assert end.value.code == 0
    assert f"examples:\n  moetrain bench {part}" in re.sub(r"torchrun .*-m ", "", capsys.readouterr().out)


def test_help_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "qwen3-30b-a3b", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: moetrain bench [-h]") and "--activation-checkpointing" in text


@pytest.mark.parametrize("words", [["bench"], ["bench", "tiny", "--steps", "0"], ["bench", "tiny", "--gate", "best"]])
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2 and "usage: moetrain bench" in capsys.readouterr().err


def test_a_models_name_stands_where_a_part_may() -> None:
    assert name_part(["bench", "tiny", "--steps", "3"]) == ["bench", "model", "tiny", "--steps", "3"]
    assert name_part(["bench", "layer", "tiny"]) == ["bench", "layer", "tiny"]
    assert name_part(["bench", "--help"]) == ["bench", "--help"]
    assert name_part(["train", "tiny"]) == ["train", "tiny"]
    assert find_shape("tiny")["num_experts"] == 8


def test_one_process_end_to_end(tmp_path: Path) -> None:
    command = ["bench", "tiny", "--seq-len", "64", "--warmup", "3", "--steps", "2", "--against", "transformers"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-m", "moetrain", *command, "--processes", "1", "--profile", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "x the tokens per second of transformers" in result.stdout
    report = json.loads((tmp_path / "tiny-1x1x64-learned.json").read_text(encoding="utf-8"))
    native, ours = report["systems"]["transformers"], report["systems"]["moetrain"]
    assert report["command"].startswith("moetrain bench tiny --seq-len 64")
    assert report["ratio"]["tps"] == pytest.approx(ours["tps_per_gpu"] / native["tps_per_gpu"])
    assert ours["loss"] == pytest.approx(native["loss"], abs=3e-3)
    assert len(ours["step_ms"]) == 2 and ours["environment"]["versions"]["torch"] == torch.__version__
    assert ours["profile"]["steps"] == 2 and ours["profile"]["span_ms"] > 0
    assert native["profile"] is None
    assert profile.read_trace(tmp_path / "tiny-1x1x64-learned.trace.json.gz")
