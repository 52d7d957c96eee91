"""What a model directory must survive before a run: every damage is found and its file named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moetrain.checkpoint import CheckpointInfo, check_checkpoint, find_dropped, save_hf, verify_checksums
from moetrain.checkpoint.format import ShardWriter, TensorSpec, read_header, tensor_bytes
from tests.families import build


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    save_hf(build("mixtral"), directory, max_shard_bytes=60_000)
    return directory


@pytest.fixture
def model_dir(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def shard(model_dir: Path) -> Path:
    return sorted(model_dir.glob("*.safetensors"))[1]


def check_and_verify(path: Path) -> CheckpointInfo:
    info = check_checkpoint(path)
    verify_checksums(info)
    return info


def test_reads_what_safetensors_reads(model_dir: Path) -> None:
    info = check_and_verify(model_dir)
    for path in model_dir.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            raw = path.read_bytes()
            for name in file.keys():  # noqa: SIM118
                found = info.tensors.pop(name)
                assert found.file == path.name and list(found.shape) == file.get_slice(name).get_shape()
                assert raw[found.start : found.end] == bytes(tensor_bytes(file.get_tensor(name)))
    assert not info.tensors


def test_headers_of_all_dtypes_empty_and_scalar_tensors(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False, True]),
        "odd": torch.arange(3, dtype=torch.uint8),
        "f8": torch.randn(5).to(torch.float8_e4m3fn),
        "c": torch.randn(2, dtype=torch.complex64),
        "bf16": torch.randn(3, 5).bfloat16(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    info = check_checkpoint(tmp_path)
    assert {name: (t.dtype, t.shape) for name, t in info.tensors.items()} == {
        "scalar": ("F64", ()),
        "empty": ("F32", (0, 4)),
        "bool": ("BOOL", (3,)),
        "odd": ("U8", (3,)),
        "f8": ("F8_E4M3", (5,)),
        "c": ("C64", (2,)),
        "bf16": ("BF16", (3, 5)),
    }


@pytest.mark.parametrize("cut", [1, 1000, 1 << 14])
def test_truncated_shard_names_file_and_missing_bytes(model_dir: Path, cut: int) -> None:
    path = shard(model_dir)
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(ValueError, match=rf"{path.name} is truncated: {cut:,} of .* bytes are missing"):
        check_checkpoint(model_dir)


@pytest.mark.parametrize("size", [0, 5, 20])
def test_cut_inside_the_header(model_dir: Path, size: int) -> None:
    os.truncate(shard(model_dir), size)
    with pytest.raises(ValueError, match=rf"{shard(model_dir).name} is truncated"):
        check_checkpoint(model_dir)


def test_surplus_bytes(model_dir: Path) -> None:
    with shard(model_dir).open("ab") as file:
        file.write(b"1234")
    with pytest.raises(ValueError, match=rf"{shard(model_dir).name} is corrupt: 4 bytes after the last tensor"):
        check_checkpoint(model_dir)


def test_every_single_bit_flip_in_length_and_header_is_found(tmp_path: Path) -> None:
    """Without checksums: only the value of the format note, which says nothing, may flip unseen."""
    path = tmp_path / "model-00001-of-00001.safetensors"
    weights = {"model.a": torch.randn(2, 6), "model.b": torch.randn(4).bfloat16(), "model.c": torch.arange(3)}
    save_file(weights, path, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, path.name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    clean = path.read_bytes()
    note = range(clean.index(b'"__metadata__"'), clean.index(b"}") + 1)
    for position in range(8 + struct.unpack("<Q", clean[:8])[0]):
        for bit in range(8):
            damaged = bytearray(clean)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            if position not in note:
                with pytest.raises(ValueError, match=path.name):
                    check_checkpoint(tmp_path)


def test_flip_in_the_data_is_found_by_the_manifest(model_dir: Path) -> None:
    path = shard(model_dir)
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    info = check_checkpoint(model_dir)
    with pytest.raises(ValueError, match=rf"{path.name} is corrupt: its SHA-256"):
        verify_checksums(info)


def test_checksum_from_the_hubs_records(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (model_dir / "SHA256SUMS").unlink()
    check_and_verify(model_dir)
    assert "no checksum is known for" in caplog.text
    for path in model_dir.glob("*.safetensors"):
        record = model_dir / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
        record.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        record.write_text(f"{'0' * 40}\n{digest}\n{path.stat().st_mtime + 5}\n")
    assert not check_and_verify(model_dir).without_digest
    path = shard(model_dir)
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, (times.st_atime, times.st_mtime))  # a disk that loses a bit leaves the time alone
    with pytest.raises(ValueError, match=path.name):
        check_and_verify(model_dir)
    os.utime(path, (times.st_atime, times.st_mtime + 60))  # changed on purpose after the download
    assert check_and_verify(model_dir).without_digest == [path.name]


def test_checksum_from_the_hubs_cache(model_dir: Path, tmp_path: Path) -> None:
    """Snapshots of the hub's cache are links to blobs named by their SHA-256."""
    (model_dir / "SHA256SUMS").unlink()
    (tmp_path / "blobs").mkdir()
    for path in model_dir.glob("*.safetensors"):
        blob = tmp_path / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(blob)
    check_and_verify(model_dir)
    blob = shard(model_dir).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ValueError, match=shard(model_dir).name):
        check_and_verify(model_dir)


def edit_index(model_dir: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    path = model_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shard(model_dir: Path) -> None:
    name = shard(model_dir).name
    shard(model_dir).unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 file\(s\) that model.safetensors.index.json names: {name}"):
        check_checkpoint(model_dir)


def test_index_names_a_tensor_that_is_not_there(model_dir: Path) -> None:
    edit_index(model_dir, lambda weights: weights.update({"model.ghost": shard(model_dir).name}))
    with pytest.raises(ValueError, match=rf"{shard(model_dir).name} lacks the tensor model.ghost"):
        check_checkpoint(model_dir)


def test_shard_holds_a_tensor_that_the_index_lacks(model_dir: Path) -> None:
    edit_index(model_dir, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 tensor\(s\) that .* does not name: model.norm.weight"):
        check_checkpoint(model_dir)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "pytorch_model.bin", 3])
def test_index_names_a_file_that_is_none_of_ours(model_dir: Path, name: Any) -> None:
    edit_index(model_dir, lambda weights: weights.update({"model.norm.weight": name}))
    with pytest.raises(ValueError, match=r"index\.json names .*(only safetensors files|is not a file of its)"):
        check_checkpoint(model_dir)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a"'])
def test_corrupt_index(model_dir: Path, text: str) -> None:
    (model_dir / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is corrupt"):
        check_checkpoint(model_dir)


class Exploit:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_directory_with_pickles_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Exploit(tmp_path / "ran")))
    with pytest.raises(ValueError, match=rf"only as pickles \({name}\).* never opened.*safetensors revision"):
        check_checkpoint(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_nothing_there(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(ValueError, match="no model directory at"):
        check_checkpoint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        check_checkpoint(tmp_path / "empty")
    (model_dir / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"holds model-00001-of-\d+.safetensors, but neither"):
        check_checkpoint(model_dir)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}, "which is not 12 bytes"),
        ({"dtype": "F33", "shape": [3], "data_offsets": [0, 12]}, "unknown dtype 'F33'"),
        ({"dtype": "F32", "shape": [-3], "data_offsets": [0, -12]}, "malformed"),
        ({"dtype": "F32", "shape": [True, 3], "data_offsets": [0, 12]}, "malformed"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}, "a gap or an overlap before a"),
        ({"dtype": "F32", "shape": [3]}, "lacks dtype, shape or data_offsets"),
    ],
)
def test_malformed_entries(tmp_path: Path, entry: dict[str, Any], complaint: str) -> None:
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(ValueError, match=complaint):
        check_checkpoint(tmp_path)


def test_repeated_name(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    text = f'{{"a":{entry % (0, 4)},"a":{entry % (4, 8)}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match="a name occurs twice"):
        check_checkpoint(tmp_path)


def test_writer_writes_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "w": torch.randn(3, 5),
        "h": torch.randn(7).bfloat16(),
        "e": torch.empty(0).bfloat16(),
        "u": torch.arange(3).byte(),
    }
    specs = [
        TensorSpec("w", "F32", (3, 5)),
        TensorSpec("h", "BF16", (7,)),
        TensorSpec("e", "BF16", (0,)),
        TensorSpec("u", "U8", (3,)),
    ]
    writer = ShardWriter(tmp_path / "x.safetensors", specs)
    for spec in specs:
        data = tensor_bytes(tensors[spec.name])
        writer.append(spec.name, [data[:1], data[1:]])
    digest = writer.close()
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert list(read_header(tmp_path / "x.safetensors")) == ["w", "h", "e", "u"]
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def add_weights(model_dir: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add tensors to a checkpoint in one file, as a publisher's extra layers."""
    path = model_dir / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = tensors | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"format": "pt"})
    (model_dir / "SHA256SUMS").unlink(missing_ok=True)


DROPPED_LAYERS = {
    "nemotron_h+latent": ["mtp.layers.0.mixer.experts.0.up_proj.weight", "mtp.layers.1.norm.weight"],
    "deepseek_v3": ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.3.gate_proj.weight"],
    "glm4_moe": ["model.layers.2.enorm.weight"],
    "qwen3_next": ["mtp.fc.weight", "mtp.layers.0.mlp.experts.1.down_proj.weight"],
    "mixtral": ["something.of.its.publisher"],
}


@pytest.mark.parametrize("family", DROPPED_LAYERS)
def test_dropped_weights_are_found_and_come_back_unchanged(tmp_path: Path, family: str) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "source")
    extra = {
        name: torch.randn(3, n + 2).to([torch.bfloat16, torch.float32][n % 2])
        for n, name in enumerate(DROPPED_LAYERS[family])
    }
    extra[DROPPED_LAYERS[family][0] + "_scale"] = torch.randint(0, 9, (3,))
    add_weights(tmp_path / "source", extra)
    loaded = type(model).from_pretrained(tmp_path / "source")
    dropped = find_dropped(loaded, check_checkpoint(tmp_path / "source"))
    assert dropped.tensors.keys() == extra.keys()
    assert f"{len(extra)} tensors" in dropped.describe() and "not trained" in dropped.describe()
    save_hf(loaded, tmp_path / "out", extra=dropped, max_shard_bytes=50_000)
    source, out = check_checkpoint(tmp_path / "source"), check_and_verify(tmp_path / "out")
    assert source.tensors.keys() == out.tensors.keys()
    for name, before in source.tensors.items():
        after = out.tensors[name]
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        read = [
            (d / t.file).read_bytes()[t.start : t.end] for d, t in [(source.directory, before), (out.directory, after)]
        ]
        assert read[0] == read[1], name


def test_nothing_is_dropped_of_a_plain_checkpoint(tmp_path: Path) -> None:
    for family in ("nemotron_h", "gpt_oss", "qwen3_moe", "ernie4_5_moe"):
        model = build(family)
        model.save_pretrained(tmp_path / family)
        assert not find_dropped(model, check_checkpoint(tmp_path / family)).tensors


def test_source_of_dropped_weights_is_gone_or_changed(tmp_path: Path) -> None:
    model = build("deepseek_v3")
    model.save_pretrained(tmp_path / "source")
    add_weights(tmp_path / "source", {"model.layers.2.enorm.weight": torch.randn(4)})
    dropped = find_dropped(model, check_checkpoint(tmp_path / "source"))
    save_hf(model, tmp_path / "out", extra=dropped)
    before = (tmp_path / "out" / "SHA256SUMS").read_text()
    os.utime(tmp_path / "source" / "model.safetensors")
    with pytest.raises(ValueError, match=r"source/model.safetensors has changed since the run began"):
        save_hf(model, tmp_path / "out", extra=dropped)
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(ValueError, match=r"source/model.safetensors is gone.*model.layers.2.enorm.weight"):
        save_hf(model, tmp_path / "out", extra=dropped)
    assert (tmp_path / "out" / "SHA256SUMS").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
