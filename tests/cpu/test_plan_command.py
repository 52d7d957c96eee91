"""`moetrain plan` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moetrain.plan.shapes as shapes
import moetrain.plan.simulate as simulation
from moetrain.cli import main
from moetrain.plan.command import run_config
from moetrain.plan.constants import GPUS
from moetrain.plan.layout import Layout

QUICK = ["data.seq_len=128", 'train.compile="off"']
YAML = """
output_dir: runs/mine
model: {path: tiny}
data: {train: [{path: "python:stdlib"}], seq_len: 128}
train: {steps: 10, compile: "off"}
parallel: {ep_size: 4, dp_replicate_size: 2}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(YAML, encoding="utf-8")
    return str(file)


def test_json_holds_the_layouts(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--nodes", "2", "--gpu", "h200", "--top", "3", "--json", "--batch", "1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and len(plan["layouts"]) == 3 and not plan["changes"]
    assert plan["machine"] == {
        **{"nodes": 2, "gpus_per_node": 8, "gpu": "h200"},
        **{"storage_gb_s": 2.0, "restart_seconds": 300.0},
    }
    for layout in [*plan["layouts"], plan["own"]]:
        assert sum(layout["memory"].values()) == pytest.approx(layout["memory_needed"], rel=1e-6)
        assert sum(layout["seconds"].values()) == pytest.approx(layout["step_seconds"])
        assert layout["memory_needed"] < GPUS["h200"].memory_bytes
    assert plan["own"]["ep"] == 4 and 0.9 < plan["goodput"]["goodput"] < 1


@pytest.mark.parametrize("name", ["qwen3-30b-a3", "./nowhere", "a/b/c", "../a/b"])
def test_what_can_be_no_hub_id_is_not_asked_for(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(shapes, "load_model_config")
    assert main(["plan", "--model", name]) == 2
    error = capsys.readouterr().err
    assert f"{name}: no such directory" in error and "Known without one: deepseek-v3" in error
    assert ("did you mean qwen3-30b-a3b?" in error) == name.startswith("qwen3")


def test_tables_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    picture = tmp_path / "plan.png"
    words = ["plan", "--model", "tiny", *QUICK, "--gpu", "h200", "--batch", "1", "--plot", str(picture)]
    assert main([*words, "--checkpointing", "none"]) == 0
    text = capsys.readouterr().out
    for expected in ("tokens/s", "yours", "activations", "needed", "of h200", "attention", "a checkpoint:", "goodput"):
        assert expected in text, expected
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_a_run_that_does_not_fit_is_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    wide = "model.create={config: {model_type: qwen3_moe, num_hidden_layers: 8, hidden_size: 8192, num_experts: 64, "
    create = f"{wide} moe_intermediate_size: 8192}}}}"
    words = ["plan", "--model", "none", create, *QUICK, "--ep", "8", "--batch", "1", "--checkpointing", "full"]
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "No layout fits" in text and "optim.states: bf16_stochastic" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tiny", "--gpu", "v100"], "unknown GPU 'v100'; valid: h100-80gb, h200, b200"),
        (["--model", "tiny", "--nodes", "2", "--ep", "3"], "no layout of 16 ranks has --ep 3"),
        (["--model", "tiny", "--nodes", "2", "--ep", "8", "--simulate", "1"], "--replicas can be 2"),
        (["--model", "tiny", "--batch", "two"], "--batch takes a number or auto, not 'two'"),
        (["--model", "tiny", "--nodes", "0"], "--nodes must be at least 1"),
        (["--model", "qwen4-1t"], "Known without one: deepseek-v3"),
        (["--model", "tiny", "--states", "fp64"], "optim.states"),
        (["--model", "tiny", "optim.sates=fp32"], "did you mean 'states'?"),
        ([], "takes a run's YAML file or --model"),
        (["missing.yaml"], "no configuration file at missing.yaml"),
        (["--model", "tiny", "--simulate", "8"], "the ranks of 1 x 8 are 0 to 7"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_overrides_and_options_meet_in_one_run(config: str) -> None:
    run = run_config(config, None, ["optim.lr=2e-5"], seq_len=256, states="8bit")
    assert (run.data.seq_len, run.optim.states, run.optim.lr, run.parallel.ep_size) == (256, "8bit", 2e-5, 4)
    named = run_config("train.grad_accum=4", "qwen3-30b-a3b", ["data.batch_size=2"], None, None)
    assert (named.model.path, named.train.grad_accum, named.data.batch_size) == ("qwen3-30b-a3b", 4, 2)


SMALL = "{model_type: qwen3_moe, hidden_size: 64, num_hidden_layers: 2, moe_intermediate_size: 32, head_dim: 16, "


def test_a_static_dispatcher_runs_alone_too(capsys: pytest.CaptureFixture[str]) -> None:
    create = f"model.create={{vocab_size: 512, config: {SMALL} num_attention_heads: 4, num_experts: 16}}}}"
    words = ["plan", "--model", "none", create, "--ep", "8", "--simulate", "7", "--steps", "1", "--json"]
    assert main([*words, "data.seq_len=32", "model.dispatch=allgather", "--checkpointing", "full"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rank"], found["world"], found["experts_of_a_layer"]) == (7, 8, [2])
    assert found["passes"].startswith("eager: CUDA graphs need a GPU")
    assert found["step_seconds"] > 0 and found["planned_seconds"] > 0
    assert not torch.distributed.is_initialized()


def test_a_rank_too_large_for_this_machine_is_refused(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("moetrain.plan.simulate.os.sysconf", sizes.__getitem__)
    words = ["--model", "tiny", *QUICK, "--simulate", "1", "data.seq_len=1024", "data.batch_size=4"]
    assert main(["plan", *words]) == 2
    text = " ".join(capfd.readouterr().err.split())
    assert "and this machine, which has no GPU, has 0.0 free; take a larger --ep" in text


def test_the_peak_counts_what_a_capture_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay hands out nothing, so the count begins before the first step."""
    order: list[str] = []

    def noting(what: str, result: Any = None) -> Any:
        def note(*_: Any) -> Any:
            order.append(what)
            return result

        return note

    parts = SimpleNamespace(passes=SimpleNamespace(status="captured", close=lambda: None))
    time = SimpleNamespace(seconds=1.0, flops=1e12, parts=dict.fromkeys(simulation.COMMUNICATION, 0.0))
    for owner, name, value in (
        (simulation, "_build", lambda config, layout: torch.nn.Linear(2, 2)),
        (simulation, "step_parts", noting("model", parts)),
        (simulation, "_run_steps", noting("steps", 0.5)),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_name", lambda: "a GPU"),
        (torch.cuda, "reset_peak_memory_stats", noting("count")),
        (torch.cuda, "max_memory_allocated", lambda: 3 * 2**30),
    ):
        monkeypatch.setattr(owner, name, value)
    config = run_config(None, "tiny", [], None, None)
    planned: Any = SimpleNamespace(memory=SimpleNamespace(allocated=2**30), time=time)
    found = simulation._measure(config, Layout(1, 8, 8), planned, 2)
    assert order == ["model", "count", "steps"]
    assert (found["peak_gib"], found["planned_gib"], found["tflops"]) == (3.0, 1.0, 2.0)


def test_one_rank_of_128_runs_alone() -> None:
    words = ["plan", "--model", "none", "--nodes", "16", "--ep", "8", "--simulate", "37", "--steps", "2", "--json"]
    create = f"model.create={{vocab_size: 512, config: {SMALL} num_attention_heads: 4, num_experts: 128}}}}"
    code = [sys.executable, "-m", "moetrain", *words, create, "data.seq_len=64"]
    result = subprocess.run(code, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["rank"], found["world"], found["device"]) == (37, 128, "cpu")
    assert found["experts_of_a_layer"] == [16], "of 128, on each rank of a group of 8"
    # and of its copies over 16 ranks each holds one
    dense = found["local_parameters"] - 2 * (64 * 64 + 64 * 32)
    whole = 2 * 512 * 64  # embeddings and head; the rest of the dense weights is smaller
    assert whole / 128 <= dense < 2 * whole / 128 + 2_000
    assert found["planned_gib"] > 0 and found["step_seconds"] > 0 and found["tflops"] > 0
