"""The export against Transformers' own `save_pretrained`, in one process: every family, names, bytes and files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moetrain.checkpoint import check_checkpoint, save_hf, verify_checksums
from tests.families import FAMILIES, build


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same_checkpoint(expected: Path, got: Path) -> None:
    ours, theirs = tensors_of(got), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
    for name in ("config.json", "generation_config.json"):
        assert (expected / name).exists() == (got / name).exists()
        if (got / name).exists():
            assert json.loads((got / name).read_text()) == json.loads((expected / name).read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_save_pretrained(tmp_path: Path, family: str) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "stock")
    save_hf(model, tmp_path / "ours", max_shard_bytes=40_000)
    info = check_checkpoint(tmp_path / "ours")
    assert len(info.sizes) > 1 and not info.without_digest
    assert_same_checkpoint(tmp_path / "stock", tmp_path / "ours")


def test_loaded_model_keeps_the_names_it_was_loaded_from(tmp_path: Path) -> None:
    """Nemotron-H checkpoints exist with `backbone.` and with `model.` names: either comes back as it was."""
    build("nemotron_h").save_pretrained(tmp_path / "a")
    build("nemotron_h").save_pretrained(tmp_path / "b", save_original_format=False)
    assert tensors_of(tmp_path / "a").keys() != tensors_of(tmp_path / "b").keys()
    for name in "ab":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / f"stock-{name}")
        save_hf(model, tmp_path / f"ours-{name}")
        assert_same_checkpoint(tmp_path / f"stock-{name}", tmp_path / f"ours-{name}")


def test_bf16_with_fp32_parameters_is_aligned(tmp_path: Path) -> None:
    model = build("deepseek_v3")
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data = parameter.data.float()
    model.save_pretrained(tmp_path / "stock")
    save_hf(model, tmp_path / "ours")
    assert_same_checkpoint(tmp_path / "stock", tmp_path / "ours")
    assert {info.start % 4 for info in check_checkpoint(tmp_path / "ours").tensors.values() if info.dtype == "F32"} == {
        0
    }


def test_tied_head_is_written_once(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "untied")
    tied = AutoModelForCausalLM.from_config(model.config)
    tied.save_pretrained(tmp_path / "stock")
    save_hf(tied, tmp_path / "ours")
    assert "lm_head.weight" not in tensors_of(tmp_path / "ours")
    assert_same_checkpoint(tmp_path / "stock", tmp_path / "ours")


def test_shards_respect_the_limit_and_the_index_adds_up(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    calls: list[tuple[int, int]] = []
    save_hf(model, tmp_path / "out", max_shard_bytes=20_000, progress=lambda done, total: calls.append((done, total)))
    info = check_checkpoint(tmp_path / "out")
    by_file: dict[str, list[int]] = {}
    for tensor in info.tensors.values():
        by_file.setdefault(tensor.file, []).append(tensor.nbytes)
    assert all(sum(sizes) <= 20_000 or len(sizes) == 1 for sizes in by_file.values())
    assert max(map(sum, by_file.values())) <= max(20_000, largest)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = sum(map(sum, by_file.values()))
    assert index["metadata"] == {"total_size": total, "total_parameters": model.num_parameters()}
    assert calls[-1] == (total, total) and [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_small_model_is_one_file_and_sha256sum_agrees(tmp_path: Path) -> None:
    save_hf(build("mixtral"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", check=True)
    listed = {line.split()[1] for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in (tmp_path / "out").iterdir()} - {"SHA256SUMS"}
    verify_checksums(check_checkpoint(tmp_path / "out"))


def test_replaces_an_earlier_export_and_keeps_what_others_added(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_hf(build("mixtral", seed=1), out, max_shard_bytes=20_000)
    (out / "README.md").write_text("mine")
    (out / "runs").mkdir()
    (out / "runs" / "events").write_text("log")
    model = build("mixtral", seed=2)
    model.save_pretrained(tmp_path / "stock")
    save_hf(model, out)
    assert_same_checkpoint(tmp_path / "stock", out)
    assert len(list(out.glob("model*"))) == 1, "shards of the earlier export are left"
    assert (out / "README.md").read_text() == "mine" and (out / "runs" / "events").read_text() == "log"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stock"]


def test_an_existing_directory_without_weights_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-5").mkdir(parents=True)
    (out / "checkpoint-5" / "x").write_text("x")
    model = build("mixtral")
    for _ in range(2):
        save_hf(model, out)
        verify_checksums(check_checkpoint(out))
        assert (out / "checkpoint-5" / "x").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_refuses_to_write_over_other_weights(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "other")
    before = tensors_of(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds weights of another origin \(model.safetensors\)"):
        save_hf(build("mixtral", seed=1), tmp_path / "other")
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(tmp_path / "other").items())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_hf(model, tmp_path / "file")
