"""A writer is killed before each of its file-system calls in turn: what is found next is the old or the new, whole."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moetrain.checkpoint import (
    check_checkpoint,
    commit,
    find_latest,
    format,
    load_state,
    prune,
    save_hf,
    save_state,
    set_aside,
    verify_checksums,
)
from tests.families import tiny

Patches = list[tuple[Any, str, Callable[..., Any]]]

# Every call through which the package changes what is on the disk.
CALLS: list[tuple[Any, str]] = [
    (os, "rename"),
    (os, "replace"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "mkdir"),
    (Path, "write_text"),
    (format.ShardWriter, "_write"),
    (commit, "_exchange"),
]


def killed_before(call: int, action: Callable[[], object], patches: Patches) -> bool:
    """Run `action` in a fork that gets SIGKILL before its `call`-th call of `CALLS`; False if it made fewer."""
    child = os.fork()
    if child == 0:
        left = [call]
        for owner, name, replacement in patches:
            setattr(owner, name, replacement)
        for owner, name in CALLS:
            setattr(owner, name, _counted(getattr(owner, name), left))
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the writer failed"
    return False


def _counted(original: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return original(*args, **kwargs)

    return call


def small(seed: int) -> PreTrainedModel:
    """A model of few tensors, as each of them is a call to be killed before."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny("mixtral", num_hidden_layers=1, num_local_experts=4))
    return model


NO_EXCHANGE: Patches = [(commit, "_exchange", lambda a, b: False)]


@pytest.mark.parametrize("patches", [[], NO_EXCHANGE], ids=["swap", "two_renames"])
def test_kills_while_an_export_is_replaced(tmp_path: Path, patches: Patches) -> None:
    old, new = small(seed=1), small(seed=2)
    save_hf(old, tmp_path / "old", max_shard_bytes=40_000)
    save_hf(new, tmp_path / "new", max_shard_bytes=40_000)
    sums = {name: (tmp_path / name / "SHA256SUMS").read_text() for name in ("old", "new")}
    out = tmp_path / "place" / "out"
    seen = {"old": 0, "new": 0, "between": 0}
    call = 0
    while True:
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        (out / "README.md").write_text("mine")
        killed = killed_before(call, lambda: save_hf(new, out, max_shard_bytes=40_000), patches)
        if out.exists():
            state = next(name for name, text in sums.items() if (out / "SHA256SUMS").read_text() == text)
            verify_checksums(check_checkpoint(out))
        else:
            state = "between"
            assert (out.with_name("out.replaced") / "SHA256SUMS").read_text() == sums["old"]
        seen[state] += 1
        save_hf(new, out, max_shard_bytes=40_000)
        assert (out / "SHA256SUMS").read_text() == sums["new"]
        assert (out / "README.md").read_text() == "mine"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        if not killed:
            break
        call += 1
    assert seen["old"] > 20 and seen["new"] > 5
    assert (seen["between"] > 0) == bool(patches)


def test_kills_while_a_first_export_is_written(tmp_path: Path) -> None:
    model = small(seed=0)
    out = tmp_path / "place" / "out"
    call = 0
    while killed_before(call, lambda: save_hf(model, out), []):
        if out.exists():
            verify_checksums(check_checkpoint(out))
        shutil.rmtree(out.parent, ignore_errors=True)
        call += 1
    assert call > 10
    verify_checksums(check_checkpoint(out))


@pytest.fixture
def run() -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    model = small(seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def weight_sum(model: PreTrainedModel) -> float:
    return sum(parameter.double().sum().item() for parameter in model.parameters())


def test_kills_while_a_training_checkpoint_is_written(tmp_path: Path, run: Any) -> None:
    model, optimizer = run
    root = tmp_path / "checkpoints"
    sums = {}
    save_state(tmp_path / "first", 1, model=model, optimizer=optimizer)
    sums["step-00000001"] = weight_sum(model)
    with torch.no_grad():
        model.lm_head.weight += 1
    sums["step-00000002"] = weight_sum(model)
    found = {name: 0 for name in sums}
    call, killed = 0, True
    while killed:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "first", root)
        killed = killed_before(call, lambda: save_state(root, 2, model=model, optimizer=optimizer), [])
        latest = find_latest(root)
        assert latest is not None
        found[latest.name] += 1
        reader = small(seed=5)
        state = load_state(latest, model=reader, optimizer=torch.optim.AdamW(reader.parameters()))
        assert f"step-{state.step:08d}" == latest.name and weight_sum(reader) == sums[latest.name]
        prune(root, keep=5)
        assert all(path.suffix == "" for path in root.iterdir()), "a dead writer's directory is left"
        call += 1
    assert found["step-00000001"] > 10 and found["step-00000002"] >= 2


def test_kills_while_checkpoints_are_pruned(tmp_path: Path, run: Any) -> None:
    model, optimizer = run
    for step in (1, 2, 3):
        save_state(tmp_path / "all", step, model=model, optimizer=optimizer)
    root = tmp_path / "checkpoints"
    call, killed = 0, True
    while killed:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "all", root)
        killed = killed_before(call, lambda: prune(root, keep=1), [])
        assert find_latest(root) == root / "step-00000003"
        for path in root.glob("step-????????"):  # what still has its name is whole
            reader = small(seed=5)
            load_state(path, model=reader, optimizer=torch.optim.AdamW(reader.parameters()))
        prune(root, keep=1)
        assert [path.name for path in root.iterdir()] == ["step-00000003"]
        call += 1
    assert call > 10


def test_prune_never_deletes_the_newest_complete_one(tmp_path: Path, run: Any) -> None:
    model, optimizer = run
    for step in (1, 2, 3):
        save_state(tmp_path, step, model=model, optimizer=optimizer)
    os.truncate(tmp_path / "step-00000003" / "rank-00000.safetensors", 5000)
    prune(tmp_path, keep=1)
    assert find_latest(tmp_path) == tmp_path / "step-00000002"
    with pytest.raises(ValueError, match="keep=0 would delete the newest checkpoint"):
        prune(tmp_path, keep=0)


def test_what_is_set_aside_twice_is_kept_twice(tmp_path: Path) -> None:
    complete = [f"step-{step:08d}" for step in (2, 9, 12)]
    for name in (*complete, "step-00000009.abandoned", "step-00000009.incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    aside = set_aside(tmp_path, 2)
    assert sorted(path.name for path in aside) == ["step-00000009.abandoned-2", "step-00000012.abandoned"]
    assert (tmp_path / "step-00000009.abandoned-2" / "which").read_text() == "step-00000009"
    assert (tmp_path / "step-00000009.abandoned" / "which").read_text() == "step-00000009.abandoned"
    assert set_aside(tmp_path, 2) == [] and (tmp_path / "step-00000002").is_dir()
    prune(tmp_path, keep=1)
    assert all(path.is_dir() for path in aside), "nothing deletes them"
