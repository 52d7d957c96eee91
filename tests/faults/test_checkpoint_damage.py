"""Damaged, hostile and misplaced training checkpoints, and disks that refuse: a clear error, and nothing lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

from moetrain.checkpoint import (
    check_checkpoint,
    commit,
    export_run,
    find_dropped,
    find_latest,
    format,
    load_state,
    manifest,
    save_hf,
    save_state,
    state,
    verify_checksums,
)
from tests.families import build
from tests.ranks import run_ranks


def trained(family: str = "mixtral", lr: float = 1e-3) -> tuple[Any, torch.optim.Optimizer]:
    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, optimizer = trained()
    return save_state(tmp_path_factory.mktemp("saved"), 1, model=model, optimizer=optimizer, data_state={"row": 3})


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2; tests damage that of step 2."""
    for step in (1, 2):
        shutil.copytree(saved, tmp_path / "checkpoints" / f"step-{step:08d}")
    return tmp_path / "checkpoints"


def newest(root: Path) -> Path:
    return root / "step-00000002"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def load(path: Path) -> Any:
    model, optimizer = trained()
    return load_state(path, model=model, optimizer=optimizer)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "tensors.json", "state.json", "model/config.json"])
def test_flipped_bit_names_the_file(root: Path, name: str) -> None:
    flip(newest(root) / name, -40)
    with pytest.raises(ValueError, match=rf"step-00000002/{name} is corrupt: its SHA-256"):
        load(newest(root))
    with pytest.raises(ValueError, match=rf"step-00000002/{name} is corrupt: its SHA-256"):
        export_run(newest(root), root / "out")


@pytest.mark.parametrize("given", ["runs/mine", "runs/mine/checkpoints"])
def test_export_of_a_run_names_its_newest_complete_checkpoint(
    tmp_path: Path, root: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root, "runs/mine/checkpoints")
    with pytest.raises(ValueError, match=r"did you mean runs/mine/checkpoints/step-00000002\?$"):
        export_run(given, "out")
    Path("runs/mine/checkpoints/step-00000002/SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"did you mean runs/mine/checkpoints/step-00000001\?$"):
        export_run(given, "out")
    with pytest.raises(ValueError, match=r"^runs/mine/step-2 does not exist$"):
        export_run("runs/mine/step-2", "out")
    Path("runs/empty").mkdir()
    with pytest.raises(ValueError, match=r"runs/empty is not a complete training checkpoint .* export another one"):
        export_run("runs/empty", "out")
    assert not Path("out").exists()


def test_an_export_does_not_mix_with_other_files(tmp_path: Path, root: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    export_run(newest(root), data)
    (data / "README.md").write_text("mine")
    export_run(newest(root), data)
    assert (data / "README.md").read_text() == "mine" and (data / "model.safetensors").exists()
    for path in data.iterdir():
        path.unlink()
    (data / "chats.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"data holds files that are no model's \(chats.jsonl\); export to a new"):
        export_run(newest(root), data)
    assert [path.name for path in data.iterdir()] == ["chats.jsonl"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest", "no index"])
def test_incomplete_checkpoint_is_passed_over_and_refused(
    root: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = newest(root)
    if damage == "truncate":
        os.truncate(path / "rank-00000.safetensors", 9000)
    else:
        (
            path / {"remove": "rank-00000.safetensors", "no manifest": "SHA256SUMS", "no index": "tensors.json"}[damage]
        ).unlink()
    assert find_latest(root) == root / "step-00000001"
    assert "passing over a damaged checkpoint" in caplog.text and "step-00000002" in caplog.text
    with pytest.raises(ValueError, match=r"step-00000002.*; resume from another checkpoint"):
        load(path)


def test_directories_of_other_names_are_no_checkpoints(root: Path) -> None:
    newest(root).rename(root / "step-00000009.incomplete")
    shutil.copytree(root / "step-00000001", root / "step-latest")
    assert find_latest(root) == root / "step-00000001"
    assert find_latest(root / "absent") is None


class Exploit:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", [".metadata", "tensors.json", "state.json", "rank-00000.safetensors"])
def test_malicious_pickles_never_run(root: Path, tmp_path: Path, name: str) -> None:
    """In place of each file, with a manifest that says it is right, and as the index that torch's reader would take."""
    path = newest(root)
    (path / name).write_bytes(pickle.dumps(Exploit(tmp_path / "ran")))
    sums = manifest.read_manifest(path) | {name: manifest.hash_file(path / name)}
    manifest.write_manifest(path, sums)
    if name == ".metadata":
        assert load(path).data_state == {"row": 3}
    else:
        with pytest.raises(ValueError, match=name):
            load(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads((path / name).read_bytes()).close()
    assert (tmp_path / "ran").exists(), "a reader that unpickles would not have been caught"


def test_checkpoint_of_another_model_or_optimizer(root: Path) -> None:
    model, optimizer = trained("qwen3_moe")
    with pytest.raises(ValueError, match=r"lacks \d+ tensor\(s\) of this model and optimizer: model\."):
        load_state(newest(root), model=model, optimizer=optimizer)
    model = build("mixtral")
    with pytest.raises(ValueError, match=r"lacks \d+ tensor\(s\) .*: optimizer\..*max_exp_avg_sq"):
        load_state(newest(root), model=model, optimizer=torch.optim.AdamW(model.parameters(), amsgrad=True))
    with pytest.raises(ValueError, match=r"holds \d+ tensor\(s\) that this run has not: optimizer\..*exp_avg"):
        load_state(newest(root), model=model, optimizer=torch.optim.SGD(model.parameters()))
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(ValueError, match="groups its parameters otherwise"):
        load_state(newest(root), model=model, optimizer=torch.optim.AdamW(groups))
    model, optimizer = trained()
    model.bfloat16()
    with pytest.raises(ValueError, match=r"model\.\S+ is F32 \[.*\] there and BF16 \[.*\] here"):
        load_state(newest(root), model=model, optimizer=optimizer)


def test_unknown_format(root: Path) -> None:
    parsed = json.loads((newest(root) / "state.json").read_text())
    (newest(root) / "state.json").write_text(json.dumps(parsed | {"format": 99}))
    model, optimizer = trained()
    with pytest.raises(ValueError, match="has format 99; this version reads format 1"):
        load_state(newest(root), model=model, optimizer=optimizer, verify=False)


def test_export_of_a_run_whose_source_is_gone(tmp_path: Path) -> None:
    model, optimizer = trained("deepseek_v3")
    model.save_pretrained(tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors") | {"model.layers.2.enorm.weight": torch.randn(4)}
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    dropped = find_dropped(model, check_checkpoint(tmp_path / "source"))
    path = save_state(tmp_path / "run", 1, model=model, optimizer=optimizer, dropped=dropped)
    (tmp_path / "source").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"no model directory at .*source"):
        export_run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_run(path, tmp_path / "out", source=tmp_path / "moved")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got["model.layers.2.enorm.weight"], weights["model.layers.2.enorm.weight"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, or a skip where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("predicted", [True, False])
def test_full_disk(small_disk: Path, predicted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    save_hf(model, small_disk / "out")
    save_state(small_disk / "c", 1, model=model, optimizer=optimizer)
    before = (small_disk / "out" / "SHA256SUMS").read_text()
    if not predicted:  # quotas do not show in what the file system says is free
        monkeypatch.setattr(commit.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 60))
    complaint = r": \d\.\d\d MB are needed, \d\.\d\d MB are free" if predicted else "No space left on device"
    with pytest.raises(OSError, match=complaint):
        save_state(small_disk / "c", 2, model=model, optimizer=optimizer)
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 60_000))
    with pytest.raises(OSError, match=complaint):
        save_hf(model, small_disk / "out")
    assert (small_disk / "out" / "SHA256SUMS").read_text() == before
    verify_checksums(check_checkpoint(small_disk / "out"))
    assert find_latest(small_disk / "c") == small_disk / "c" / "step-00000001"
    assert not list(small_disk.rglob("*.incomplete")), "a full disk is left full"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(1_600_000, "1.60 MB"), (999_900_000, "999.90 MB"), (10**9, "1.00 GB"), (1_234_560_000_000, "1,234.56 GB")],
)
def test_sizes_that_do_not_fit(num_bytes: int, text: str) -> None:
    assert commit._size(num_bytes) == text


def test_read_only_directory(tmp_path: Path) -> None:
    model, optimizer = trained()
    place = tmp_path / "ro"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("cannot mount a read-only file system")
    try:
        with pytest.raises(OSError, match=r"cannot write to .*/ro: Read-only file system"):
            save_hf(model, place / "out")
        with pytest.raises(OSError, match=r"cannot write to .*/ro/c: Read-only file system"):
            save_state(place / "c", 1, model=model, optimizer=optimizer)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    model, optimizer = trained()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*/file: "):
        save_hf(model, tmp_path / "file" / "out")
    with pytest.raises(OSError, match=r"cannot write to .*/file: "):
        save_state(tmp_path / "file", 1, model=model, optimizer=optimizer)


def _killed_rank(rank: int, world_size: int, root: Path, victim: int, stage: str) -> None:
    model = build("mixtral")
    fully_shard(model)
    save_state(root, 1, model=model, optimizer=torch.optim.AdamW(model.parameters()))
    if rank == victim:
        owner: Any = {"_write": format.ShardWriter, "publish": state}[stage]
        setattr(owner, stage, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    save_state(root, 2, model=model, optimizer=torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(("victim", "stage"), [(1, "_write"), (0, "publish")])
def test_killed_rank(tmp_path: Path, victim: int, stage: str) -> None:
    """The others notice, no half of a checkpoint is chosen, and the next save clears up."""
    with pytest.raises(AssertionError, match=rf"ended by signals: \{{{victim}: 'SIGKILL'\}}"):
        run_ranks(_killed_rank, 2, tmp_path, victim, stage)
    assert find_latest(tmp_path) == tmp_path / "step-00000001"
    assert not (tmp_path / "step-00000002").exists()
    model = build("mixtral")
    optimizer = torch.optim.AdamW(model.parameters())
    load_state(tmp_path / "step-00000001", model=model, optimizer=optimizer)
    save_state(tmp_path, 2, model=model, optimizer=optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
