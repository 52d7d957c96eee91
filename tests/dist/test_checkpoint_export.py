"""The export of sharded models on four ranks: the bytes of an unsharded save, without a rank holding the model."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from moetrain.checkpoint import check_checkpoint, export, find_dropped, format, save_hf, verify_checksums
from tests.families import build, tiny
from tests.ranks import run_ranks

WORLD = 4
LAYOUTS: dict[str, Any] = {
    "ep2_efsdp2": {"fsdp_size": 4, "ep_size": 2},
    "ep4": {"fsdp_size": 4, "ep_size": 4},
    "ep2_replicated": {"fsdp_size": 2, "ep_size": 2, "dp_replicate_size": 2},
    "fsdp": {"fsdp_size": 4},
}
# Three experts a rank in two shards, head norms of 6 in four: rows of 2, 1 and 0 on some ranks.
UNEVEN = {"num_experts": 6, "num_local_experts": 6, "head_dim": 6}
CASES = [
    ("uneven", "ep2_efsdp2"),
    ("deepseek_v3", "ep4"),
    ("gpt_oss", "ep2_replicated"),
    ("nemotron_h+latent", "ep2_efsdp2"),
    ("mixtral", "ep2_replicated"),
    ("mixtral", "fsdp"),
    ("mixtral", "columns"),
    ("qwen3_5_moe", "ep2_efsdp2"),
]


def test_sharded_export(tmp_path: Path) -> None:
    for family in {family for family, _ in CASES}:
        model = build(family) if family != "uneven" else AutoModelForCausalLM.from_config(tiny("qwen3_moe", **UNEVEN))
        if family == "mixtral":
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(tmp_path / family)
        add_extra_layers(tmp_path / family)
    results = run_ranks(_export_everything, WORLD, tmp_path)
    for case, layout in CASES:
        written, gathered = zip(*[of_rank[f"{case}-{layout}"] for of_rank in results], strict=True)
        compare(tmp_path / case, tmp_path / f"{case}-{layout}")
        assert all(written), f"{case} {layout}: a rank wrote nothing: {written}"
        # experts that become tensors of their own never leave the ranks that hold them
        if case not in ("gpt_oss", "qwen3_5_moe") and layout != "columns":
            assert not [name for name in gathered[0] if ".experts." in name]
    for of_rank in results:
        assert of_rank["failures"] == EXPECTED_FAILURES


EXPECTED_FAILURES = [
    ("OSError", True, "No space left on device"),
    ("ValueError", True, "is a file"),
    ("ValueError", True, "has changed since the run began"),
]


def add_extra_layers(directory: Path) -> None:
    """Weights that Transformers does not load, of three item sizes, one of them empty."""
    path = directory / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for n in range(5):
        tensors[f"mtp.layers.{n}.weight"] = torch.randn(3, 40).bfloat16()
    tensors |= {"mtp.scale": torch.randn(7), "mtp.empty": torch.empty(0, 4), "mtp.ids": torch.arange(5)}
    save_file(tensors, path, metadata={"format": "pt"})


def compare(expected: Path, got: Path) -> None:
    info = check_checkpoint(got)
    verify_checksums(info)
    assert not info.without_digest
    ours: dict[str, torch.Tensor] = {}
    for name in info.sizes:
        with safe_open(got / name, "pt") as file:
            ours |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with safe_open(expected / "model.safetensors", "pt") as file:
        assert set(file.keys()) == ours.keys()
        for key in file.keys():  # noqa: SIM118
            theirs = file.get_tensor(key)
            assert ours[key].dtype == theirs.dtype and torch.equal(ours[key], theirs), key
    for name in ("config.json", "generation_config.json"):
        ours_json, theirs_json = (json.loads((d / name).read_text()) for d in (got, expected))
        assert ours_json == theirs_json
    index = json.loads((got / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in info.tensors.values())


class Progress:
    """The last call's bytes."""

    done = 0

    def __call__(self, done: int, total: int) -> None:
        assert self.done <= done <= total
        self.done = done


def _export_everything(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    gathered: list[str] = []
    read = export.ModelWeights.read
    export.ModelWeights.read = lambda self, name, keep: (gathered.append(name), read(self, name, keep))[1]  # type: ignore[method-assign,func-returns-value]
    for family, layout in CASES:
        model = _load(folder / family, layout)
        dropped = find_dropped(model, check_checkpoint(folder / family))
        name, sizes = f"{family}-{layout}", Progress()
        save_hf(model, folder / name, extra=dropped, max_shard_bytes=30_000, progress=sizes)
        results[name] = sizes.done, list(gathered)
        gathered.clear()
    results["failures"] = _failures(rank, model, dropped, folder)
    return results


def _load(path: Path, layout: str) -> Any:
    if layout == "columns":
        return _by_columns(AutoModelForCausalLM.from_pretrained(path))
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**LAYOUTS[layout]))


def _by_columns(model: Any) -> Any:
    """Every matrix sharded by its last dimension, so that no rank holds whole rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim > 1:
                sharded = distribute_tensor(parameter.data, mesh, [Replicate(), Shard(parameter.ndim - 1)])
                setattr(module, name, torch.nn.Parameter(sharded))
    rows = torch.arange(8.0)
    inner = DTensor.from_local(rows[:2], mesh, [_StridedShard(0, split_factor=2), Shard(0)], run_check=False)
    fused = DTensor.from_local(rows[:2], mesh, [_StridedShard(0, split_factor=4), Shard(0)], run_check=False)
    assert export.holds_one_block(inner) and not export.holds_one_block(fused)
    model.tie_weights()
    return model


def _failures(rank: int, model: Any, dropped: Any, folder: Path) -> list[tuple[str, bool, str]]:
    """(exception, whether the old export is untouched and nothing is left, reason) of exports that fail on one rank."""
    save_hf(model, folder / "kept")
    before = (folder / "kept" / "SHA256SUMS").read_bytes()
    outcomes = []
    cases: list[tuple[Any, str, Any, str]] = [
        (_full_disk(rank), "kept", None, "No space left on device"),
        (contextlib.nullcontext(), "kept/config.json", None, "is a file"),
        (_touched(rank, folder), "kept", dropped, "has changed since the run began"),
    ]
    for fail, target, extra, reason in cases:
        try:
            with fail:
                save_hf(model, folder / target, extra=extra, max_shard_bytes=30_000)
            outcomes.append(("none", False, ""))
        except Exception as error:
            dist.barrier()
            clean = not list(folder.glob("kept.*")) and (folder / "kept" / "SHA256SUMS").read_bytes() == before
            outcomes.append((type(error).__name__, clean, reason if reason in str(error) else str(error)))
        dist.barrier()
    return outcomes


@contextlib.contextmanager
def _full_disk(rank: int) -> Any:
    """The disk of rank 2 is full after 1000 bytes."""
    write, written = format.ShardWriter._write, [0]

    def fail(self: Any, block: Any) -> int:
        written[0] += len(block)
        if rank == 2 and written[0] > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, block)

    format.ShardWriter._write = fail  # type: ignore[method-assign]
    yield
    format.ShardWriter._write = write  # type: ignore[method-assign]


@contextlib.contextmanager
def _touched(rank: int, folder: Path) -> Any:
    if rank == 0:
        for path in folder.glob("*/model.safetensors"):
            path.touch()
    dist.barrier()
    yield
