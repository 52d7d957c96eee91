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

from moetrain import cli, launcher
from moetrain.bench import profile
from moetrain.bench.commands import PARTS, WITHOUT_GPU, name_part
from moetrain.bench.rows import ON_CPU
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


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, not a rank, and neither ranks nor a part may be started."""

    def start(*_: object) -> int:
        raise AssertionError("work has begun")

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launcher, "run_local", start)
    monkeypatch.setattr(cli, "run_bench", start)


@pytest.mark.parametrize(
    ("words", "what", "instead"),
    [
        ("qwen3-30b-a3b --processes 1 --layers 8 --profile", "qwen3-30b-a3b is timed on a GPU", "tiny"),
        ("gpt-oss-20b --processes 2", "gpt-oss-20b is timed on a GPU", "tiny"),
        ("layer", "qwen3-30b-a3b is timed on a GPU", "layer tiny"),
        ("dispatch --processes 2", "the exchange is timed on two GPUs or more", "layer tiny"),
        ("dispatch tiny", "the exchange is timed on two GPUs or more", "layer tiny"),
    ],
)
def test_what_needs_a_gpu_is_refused_before_any_work(
    words: str, what: str, instead: str, no_start: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *words.split()]) == 2
    assert f"error: {what}, and torch sees none; `moetrain bench {instead} --proc" in capsys.readouterr().err


def test_tiny_models_start_anywhere_and_all_models_on_a_gpu(no_start: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ("tiny-gpt-oss", "layer tiny", "optimizer", *WITHOUT_GPU.values()):
        with pytest.raises(AssertionError, match="work has begun"):
            cli.main(["bench", *words.split()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words in ("qwen3-30b-a3b", "layer", "dispatch"):
        with pytest.raises(AssertionError, match="work has begun"):
            cli.main(["bench", *words.split(), "--processes", "2"])


def test_a_misspelt_part_gets_the_nearest_name(no_start: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "layr"]) == 2
    printed = capsys.readouterr().err
    assert "unknown model or part 'layr'; did you mean layer?" in printed
    assert "The models are qwen3-30b-a3b, " in printed
    assert "the parts are kernels, attention, dispatch, layer, optimizer\n" in printed


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
    assert torch.cuda.is_available() or f"\n{ON_CPU}\nwrote " in result.stdout
    report = json.loads((tmp_path / "tiny-1x1x64-learned.json").read_text(encoding="utf-8"))
    native, ours = report["systems"]["transformers"], report["systems"]["moetrain"]
    assert report["command"].startswith("moetrain bench tiny --seq-len 64")
    assert report["ratio"]["tps"] == pytest.approx(ours["tps_per_gpu"] / native["tps_per_gpu"])
    assert ours["loss"] == pytest.approx(native["loss"], abs=3e-3)
    assert len(ours["step_ms"]) == 2 and ours["environment"]["versions"]["torch"] == torch.__version__
    assert ours["profile"]["steps"] == 2 and ours["profile"]["span_ms"] > 0
    assert native["profile"] is None
    assert profile.read_trace(tmp_path / "tiny-1x1x64-learned.trace.json.gz")
