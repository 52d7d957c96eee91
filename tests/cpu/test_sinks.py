"""TensorBoard and Weights & Biases get a run's scalars, read back by their own libraries."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moetrain import mesh
from moetrain.config import MetricsConfig, RunConfig
from moetrain.dry_run import dry_run
from moetrain.metrics import EvalRecord, LayerLoads, Metrics, StepRecord
from moetrain.metrics import sinks as module
from moetrain.metrics.sinks import Sinks, check_sinks, step_scalars
from moetrain.trainer import train
from tests.runs import tiny_config, write_text

needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="no tensorboard here")
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="no wandb here")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine imports TensorBoard, or starts the process of Weights & Biases, in many seconds."""
    monkeypatch.setattr(module, "CLOSE_SECONDS", 120.0)
    monkeypatch.setattr(module, "INIT_SECONDS", 120.0)


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step, loss=math.nan if step == 2 else 8.0 / step, grad_norm=1.5, lr=1e-3, tokens=10,
        tokens_per_second=100.0, step_seconds=0.1, memory_bytes=2**30, expert_load_max_over_mean=2.0, idle_experts=0,
        layers=LayerLoads([1.25, 2.0], [0.5, 0.5], [0, 0], [0.9, 0.9]),
    )  # fmt: skip


def run(folder: Path, names: list[str], first: int = 1, last: int = 6, rank: int = 0, **config: Any) -> None:
    out = Metrics(
        MetricsConfig(sinks=names, run_name="mine", **config), folder, rank, 10,
        info={"world_size": 2, "data": {"sources": [{"path": "a"}]}}, console=Console(file=io.StringIO()),
    )  # fmt: skip
    if first > 1:
        out.resume(first - 1)
    for step in range(first, last + 1):
        out.step(record(step))
    out.eval(EvalRecord(step=last, loss=2.5, tokens=10))
    out.close()


def tensorboard_scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@needs_tensorboard
def test_tensorboard_has_the_run(tmp_path: Path) -> None:
    run(tmp_path, ["tensorboard"])
    found = tensorboard_scalars(tmp_path)
    assert sorted(found["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert found["train/loss"][4] == 2.0 and math.isnan(found["train/loss"][2])
    assert found["busiest_expert/1"] == dict.fromkeys(range(1, 7), 2.0)
    assert found["validation/loss"] == {6: 2.5}
    assert set(found["phase_seconds/forward_backward"]) == set(range(1, 7))


@needs_tensorboard
def test_tensorboard_hides_what_a_restart_repeats(tmp_path: Path) -> None:
    run(tmp_path, ["tensorboard"], last=6)
    run(tmp_path, ["tensorboard"], first=4, last=5)
    assert sorted(tensorboard_scalars(tmp_path)["train/loss"]) == [1, 2, 3, 4, 5]


@needs_tensorboard
def test_only_every_so_many_steps(tmp_path: Path) -> None:
    run(tmp_path, ["tensorboard"], log_every=3)
    assert sorted(tensorboard_scalars(tmp_path)["train/loss"]) == [3, 6]


@needs_tensorboard
def test_rank_0_alone(tmp_path: Path) -> None:
    run(tmp_path, ["tensorboard"], rank=1)
    assert not (tmp_path / "tensorboard").exists()


def wandb_records(file: Path) -> list[Any]:
    """What a run's file of Weights & Biases holds: LevelDB's log format behind 7 bytes, one protobuf a record."""
    from wandb.proto import wandb_internal_pb2

    raw, found, piece = file.read_bytes(), [], b""
    position = 7
    while position + 7 <= len(raw):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", raw, position + 4)
        if position + 7 + length > len(raw):
            break  # it is being written
        piece += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return found


@needs_wandb
def test_wandb_keeps_the_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    run(tmp_path, ["wandb"])
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 120  # its own process closes the file, a moment after the run has ended
    while not any(r.WhichOneof("record_type") == "exit" for r in wandb_records(file)) and time.monotonic() < deadline:
        time.sleep(0.1)
    records = wandb_records(file)
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and losses[4] == 2.0
    assert [row["validation/loss"] for row in rows if "validation/loss" in row] == [2.5]
    (about,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (about.display_name, about.project) == ("mine", "moetrain")
    assert about.run_id == (tmp_path / "wandb-run-id").read_text()


@needs_wandb
def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    run(tmp_path, ["wandb"], last=2)
    first = (tmp_path / "wandb-run-id").read_text()
    run(tmp_path, ["wandb"], first=3, last=4)
    assert (tmp_path / "wandb-run-id").read_text() == first
    run(tmp_path, ["wandb"], last=1)
    assert (tmp_path / "wandb-run-id").read_text() != first


def test_scalars_of_a_record() -> None:
    fields = {
        "step": 3, "loss": math.inf, "idle_experts": None, "flag": True, "text": "x",
        "phase_seconds": {"other": 1}, "layers": {"max_over_mean": [2.0, None]}, "slow_ranks": [{"rank": 1}],
    }  # fmt: skip
    assert step_scalars(fields) == {"train/loss": math.inf, "phase_seconds/other": 1.0, "busiest_expert/0": 2.0}
    assert step_scalars({"step": 1}) == {}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_library_that_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PACKAGES, name, "no_such_package")
    with pytest.raises(ValueError, match=rf"metrics.sinks names {name}.*pip install 'moetrain\[{name}\]'"):
        run(tmp_path, [name])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_nobody_to_log_in_as(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PACKAGES, "wandb", "json")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(module, "_wandb_key", lambda: False)
    with pytest.raises(ValueError, match="WANDB_API_KEY"):
        check_sinks(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_sinks(["wandb"])


def test_names_are_checked_with_the_configuration() -> None:
    assert RunConfig.model_fields["metrics"].default.sinks == []
    with pytest.raises(ValueError, match="'tensorboard' or 'wandb'"):
        MetricsConfig.model_validate({"sinks": ["tensorbord"]})


def test_none_by_default(tmp_path: Path) -> None:
    run(tmp_path, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "starts.json"]
    Sinks([], tmp_path).close()


def test_a_dry_run_and_every_rank_find_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written, downloaded or waited for, on a rank that has no sinks of its own too."""
    write_text(tmp_path)
    config = tiny_config(tmp_path, metrics={"sinks": ["tensorboard"]})
    monkeypatch.setitem(module.PACKAGES, "tensorboard", "no_such_package")
    for start in (dry_run, train):
        with pytest.raises(ValueError, match=r"metrics\.sinks names tensorboard"):
            start(config)
    monkeypatch.setattr(mesh, "rank", lambda: 1)
    with pytest.raises(ValueError, match=r"metrics\.sinks names tensorboard"):
        train(config)
    assert not (tmp_path / "out").exists() and not (tmp_path / "start").exists()
    password = {"prometheus_port": 0, "username": "u", "password_file": str(tmp_path / "none")}
    with pytest.raises(ValueError, match=r"metrics.password_file=.*none cannot be read"):
        dry_run(tiny_config(tmp_path, metrics=password))


def test_a_dry_run_says_where_metrics_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path)
    dry_run(tiny_config(tmp_path))
    dry_run(tiny_config(tmp_path, metrics={"prometheus_port": 9640}))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ok metrics")]
    assert said == [
        "ok metrics metrics.jsonl",
        "ok metrics metrics.jsonl, Prometheus on 127.0.0.1, port 9640 and the next",
    ]
