"""Whole runs: they learn, and neither interruption nor the split into ranks and passes changes what they learn."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetrain.config import parse_config
from moetrain.metrics import read_records
from moetrain.trainer import train
from tests.ranks import run_ranks
from tests.runs import records, tiny_run, write_text


def run(rank: int, world_size: int, raw: dict[str, Any]) -> None:
    train(parse_config(raw))


def losses(folder: Path) -> list[float]:
    return [record["loss"] for _, record in sorted(records(folder).items())]


def norms(folder: Path) -> list[float]:
    return [record["grad_norm"] for _, record in sorted(records(folder).items())]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks with EP=2."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_text(folder)
    run_ranks(run, 2, tiny_run(folder, parallel={"ep_size": 2}, checkpoint={"every": 3}))
    return folder


def test_it_learns_and_exports(uninterrupted: Path) -> None:
    values = losses(uninterrupted)
    assert values[-1] < values[0] - 0.3
    evals = records(uninterrupted, "eval")
    assert evals[6]["loss"] < evals[0]["loss"] - 0.3
    exported = uninterrupted / "out" / "model"
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("def f", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() < values[0] - 0.3


@pytest.mark.parametrize(
    ("ranks", "sections"),
    [
        (2, {"parallel": {"ep_size": 1}}),
        (1, {"data": {"batch_size": 4}}),
        (1, {"train": {"grad_accum": 2}}),
        (2, {"parallel": {"ep_size": 2}, "data": {"batch_size": 1}, "train": {"grad_accum": 2}}),
        (4, {"parallel": {"ep_size": 2}, "data": {"batch_size": 1}}),
        (4, {"parallel": {"ep_size": 2, "dp_replicate_size": 2}, "data": {"batch_size": 1}}),
        (2, {"parallel": {"ep_size": 2}, "train": {"loss": "plain"}}),
        (2, {"parallel": {"ep_size": 2}, "model": {"activation_checkpointing": "selective"}}),
        (2, {"parallel": {"ep_size": 2}, "model": {"activation_checkpointing": "full", "experts": "eager"}}),
    ],
    ids=["fsdp2", "one", "one_accum2", "ep2_accum2", "ep2_efsdp2", "ep2_replicas2", "plain_loss", "selective", "full"],
)
def test_the_layout_does_not_change_the_losses(
    uninterrupted: Path, tmp_path: Path, ranks: int, sections: dict[str, Any]
) -> None:
    shutil.copy(uninterrupted / "text.jsonl", tmp_path)
    shutil.copytree(uninterrupted / "start", tmp_path / "start")
    run_ranks(run, ranks, tiny_run(tmp_path, **sections, checkpoint={"export": False}))
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=2e-4)
    assert norms(tmp_path) == pytest.approx(norms(uninterrupted), rel=2e-3)
    ours, theirs = records(tmp_path, "eval"), records(uninterrupted, "eval")
    assert ours[0]["tokens"] == theirs[0]["tokens"]
    assert ours[6]["loss"] == pytest.approx(theirs[6]["loss"], rel=2e-4)


def test_resume_repeats_the_uninterrupted_run_to_the_bit(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "out" / "model")
    run_ranks(run, 2, tiny_run(tmp_path, parallel={"ep_size": 2}, checkpoint={"every": 3}))
    assert losses(tmp_path) == losses(uninterrupted)
    assert norms(tmp_path) == norms(uninterrupted)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(uninterrupted / "out" / "model").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("states", ["master", "bf16_stochastic", "8bit"])
def test_bf16_optimizer_states_learn(uninterrupted: Path, tmp_path: Path, states: str) -> None:
    shutil.copy(uninterrupted / "text.jsonl", tmp_path)
    shutil.copytree(uninterrupted / "start", tmp_path / "start")
    sections = {"model": {"dtype": "bfloat16"}, "optim": {"states": states}, "parallel": {"ep_size": 2}}
    run_ranks(run, 2, tiny_run(tmp_path, **sections, checkpoint={"export": False}))
    assert losses(tmp_path)[0] == pytest.approx(losses(uninterrupted)[0], rel=5e-3)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3


def test_a_run_that_starts_over_is_not_mixed_with_what_is_ahead(uninterrupted: Path, tmp_path: Path) -> None:
    """Its own checkpoints stay, those of the run before it are kept apart, and a restart goes on from its own."""
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "out" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000003", "step-00000006"}
    anew = {"resume": "never", "every": 1, "keep": 2, "export": False}
    run_ranks(run, 2, tiny_run(tmp_path, parallel={"ep_size": 2}, train={"steps": 2}, checkpoint=anew))
    left = {"step-00000001", "step-00000002", "step-00000003.abandoned", "step-00000006.abandoned"}
    assert {path.name for path in checkpoints.iterdir()} == left
    back = {"resume": str(checkpoints / "step-00000001"), "every": 1, "export": False}
    run_ranks(run, 2, tiny_run(tmp_path, parallel={"ep_size": 2}, train={"steps": 2}, checkpoint=back))
    assert {path.name for path in checkpoints.iterdir()} == left | {"step-00000002.abandoned"}


def restart(rank: int, world_size: int, raw: dict[str, Any]) -> None:
    os.environ["SLURM_RESTART_COUNT"] = "1"
    run(rank, world_size, raw)


@pytest.mark.parametrize("resume", ["never", "EARLIER"])
def test_a_restart_by_the_scheduler_goes_on_however_the_run_began(
    uninterrupted: Path, tmp_path: Path, resume: str
) -> None:
    """And does not take checkpoints of another run for its own."""
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out" / "metrics.jsonl").unlink()
    begin = str(uninterrupted / "out" / "checkpoints" / "step-00000003") if resume == "EARLIER" else resume
    first = 1 if resume == "never" else 4
    checkpoint = {"resume": begin, "every": 1, "export": False}
    sections: dict[str, Any] = {"parallel": {"ep_size": 2}, "checkpoint": checkpoint}
    run_ranks(restart, 2, tiny_run(tmp_path, **sections, train={"steps": first}))
    assert sorted(records(tmp_path)) == [first]
    run_ranks(restart, 2, tiny_run(tmp_path, **sections, train={"steps": first + 1}))
    assert sorted(records(tmp_path)) == [first, first + 1]
    lines = read_records(tmp_path / "out" / "metrics.jsonl")
    assert [record["step"] for record in lines if record["kind"] == "step"] == [first, first + 1], "each once"


def test_a_resumed_run_takes_the_settings_of_its_own_configuration(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000006")
    optim = {"lr": 3e-4, "weight_decay": 0.5}
    run_ranks(run, 2, tiny_run(tmp_path, parallel={"ep_size": 2}, optim=optim, checkpoint={"export": False}))
    ours, before = records(tmp_path), records(uninterrupted)
    assert [ours[step]["lr"] for step in (4, 5, 6)] == pytest.approx([0.1 * before[step]["lr"] for step in (4, 5, 6)])
    assert ours[4]["loss"] == before[4]["loss"]  # the step's forward still saw the saved weights
    assert ours[6]["loss"] != before[6]["loss"]
