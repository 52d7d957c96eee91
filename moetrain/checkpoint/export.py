"""A sharded model is written as one standard Hugging Face checkpoint, without any rank holding the model.

Experts are written by the ranks that hold them. The rest is gathered one conversion at a time, so a device holds at
most one such tensor more than in training (the embedding or, where a checkpoint stacks the experts of a layer in one
tensor, that), and written by one rank. `plan.py` decides who writes what, `commit.py` how it appears at once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from moetrain.checkpoint.agree import gather, rank, together
from moetrain.checkpoint.commit import fsync_file, publish, staged
from moetrain.checkpoint.dropped import Dropped
from moetrain.checkpoint.format import ShardWriter, read_range, tensor_bytes
from moetrain.checkpoint.manifest import Progress, hash_file, write_manifest
from moetrain.checkpoint.plan import (
    Piece,
    Plan,
    PlannedFile,
    RowRange,
    build_plan,
    group_conversions,
    plain_conversions,
    saved_names,
)
from moetrain.checkpoint.source import INDEX_FILE

MAX_SHARD_BYTES = 5 * 10**9
_BLOCK_BYTES = 256 << 20
"""Rows are converted in blocks of about this size, as a conversion copies them once or twice."""


class Weights(Protocol):
    """Where an export takes tensors from: a live model, or a training checkpoint."""

    def meta(self) -> dict[str, torch.Tensor]:
        """Meta tensors of full shape, in the order of the state dict, of tied tensors one."""
        ...

    def rows(self, name: str) -> RowRange | None:
        """Rows of dimension 0 that this rank can read alone; None if its part of the tensor is not whole rows."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A CPU copy of rows within `rows(name)`."""
        ...

    def read(self, name: str, keep: bool) -> torch.Tensor | None:
        """The whole tensor on the CPU where `keep`; collective."""
        ...


class ModelWeights:
    """The tensors of a model, plain or sharded as DTensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        names = set(saved_names(model))
        self._tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name in names}

    def meta(self) -> dict[str, torch.Tensor]:
        return {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in self._tensors.items()}

    def rows(self, name: str) -> RowRange | None:
        tensor = self._tensors[name]
        if not isinstance(tensor, DTensor):
            return (0, tensor.shape[0]) if tensor.ndim else None
        if not holds_one_block(tensor) or any(getattr(p, "dim", 0) != 0 for p in tensor.placements):
            return None
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return offset[0], offset[0] + shape[0]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name]
        held = self.rows(name)
        assert held is not None and held[0] <= start <= stop <= held[1]
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local[start - held[0] : stop - held[0]].cpu()

    def read(self, name: str, keep: bool) -> torch.Tensor | None:
        tensor = self._tensors[name]
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return tensor.cpu() if keep else None


def holds_one_block(tensor: DTensor) -> bool:
    """Whether a rank's part is one contiguous block of the tensor, and not interleaved as fused layers are under TP.

    FSDP2 marks rows that an inner mesh dimension has sharded before as strided: that is a block when the stride is
    the size of those inner dimensions.
    """
    inner = 1
    for size, placement in reversed(list(zip(tensor.device_mesh.shape, tensor.placements, strict=True))):
        if isinstance(placement, _StridedShard):
            if placement.dim != 0 or placement.split_factor != inner:
                return False
        elif not isinstance(placement, Shard | Replicate):
            return False
        if not isinstance(placement, Replicate) and placement.dim == 0:
            inner *= size
    return True


def save_hf(
    model: PreTrainedModel,
    out_dir: str | Path,
    *,
    extra: Dropped | None = None,
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write `model` as a Hugging Face checkpoint that plain Transformers loads; collective.

    Names and bytes are those of `save_pretrained` on the unsharded model; one that was loaded from quantised weights is
    written as the plain model that it is. The directory appears, or takes the place of an earlier export, when it is
    complete and on the disk.

    Args:
        extra: weights that the model does not hold, copied unchanged from their source.
        tokenizer: anything with `save_pretrained`, written beside the weights.
        max_shard_bytes: length at which the next file begins.
        progress: called on each rank with the bytes it has written and will write.

    Raises:
        ValueError: the directory holds other files, or the source of `extra` is gone. Every rank raises.
        OSError: the disk is full or not writable. What was there before is untouched. Every rank raises.
    """
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise ValueError("the model has adapters; merge them first, or write them alone with save_pretrained")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model's parameters are quantised; load it with dequantize=True in its quantization_config"
        )

    def write_model_files(directory: Path) -> None:
        save_model_files(model, directory, tokenizer)

    export(model, ModelWeights(model), out_dir, write_model_files, extra, max_shard_bytes, progress)


def save_model_files(model: PreTrainedModel, directory: Path, tokenizer: Any = None) -> None:
    """Everything of a checkpoint but the weights: configuration, generation settings, remote code, tokenizer."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    if model.is_remote_code():
        custom_object_save(model, directory, config=config)  # type: ignore[arg-type]
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def export(
    model: PreTrainedModel,
    weights: Weights,
    out_dir: str | Path,
    write_model_files: Callable[[Path], None],
    extra: Dropped | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write `weights` as a checkpoint of `model`, which may be on the meta device; collective. See `save_hf`."""
    target = Path(out_dir).absolute()
    meta = weights.meta()
    rows = {name: held for name in meta if (held := weights.rows(name)) is not None}
    with plain_conversions(model):
        plan = build_plan(group_conversions(model, meta), gather(rows), extra, max_shard_bytes)
        with together():
            if extra is not None:
                extra.check()
        with staged(target, plan.nbytes) as staging:
            digests = _write_pieces(model, weights, plan, extra, staging, progress)
            with together():
                if rank() == 0:
                    _check_files(staging, plan.files)
                    write_model_files(staging)
                    if len(plan.files) > 1:
                        _write_index(staging, plan, model.num_parameters())
                    write_manifest(staging, digests | finish_small_files(staging, digests))
                    publish(staging, target)


def _write_pieces(
    model: PreTrainedModel,
    weights: Weights,
    plan: Plan,
    extra: Dropped | None,
    staging: Path,
    progress: Progress | None,
) -> dict[str, str]:
    """Go through the pieces with the other ranks and write this rank's; the digests of all files, on every rank.

    A rank that fails goes on with the gathers that the others wait in, and says so at the end.
    """
    stream = _FileStream(staging, [file for file in plan.files if file.owner == rank()], progress)
    failure: Exception | None = None
    for piece in plan.pieces:
        tensors = _read_whole(weights, piece)
        if piece.owner == rank() and failure is None:
            try:
                for name, blocks in _contents(model, weights, piece, tensors, extra):
                    stream.append(name, blocks)
            except Exception as error:
                failure = error
    with together():
        if isinstance(failure, OSError):
            raise OSError(failure.errno, f"cannot write {staging}: {failure.strerror or failure}") from failure
        if failure is not None:
            raise failure
    return {name: digest for part in gather(stream.digests) for name, digest in part.items()}


def _read_whole(weights: Weights, piece: Piece) -> dict[str, torch.Tensor]:
    """The complete tensors of a piece that is not made of rows, on its owner; collective."""
    if piece.group is None or piece.rows is not None:
        return {}
    mine = piece.owner == rank()
    return {n: t for n in piece.group.inputs if (t := weights.read(n, keep=mine)) is not None}


def _contents(
    model: PreTrainedModel, weights: Weights, piece: Piece, tensors: dict[str, torch.Tensor], extra: Dropped | None
) -> Iterator[tuple[str, Any]]:
    """The outputs of a piece as (name, blocks of bytes), in file order."""
    if piece.copy is not None:
        assert extra is not None
        path = extra.directory / piece.copy.file
        yield piece.outputs[0].name, read_range(path, piece.copy.start, piece.copy.end)
    elif piece.rows is not None:
        yield from _convert_rows(model, weights, piece)
    else:
        assert piece.group is not None
        if piece.group.renamed:
            tensors = {piece.outputs[0].name: tensors[piece.group.inputs[0]]}
        else:
            tensors = revert_weight_conversion(model, tensors)
        for output in piece.outputs:
            yield output.name, [tensor_bytes(tensors[output.name])]


def _convert_rows(model: PreTrainedModel, weights: Weights, piece: Piece) -> Iterator[tuple[str, Any]]:
    """Convert a block of rows [n, ...] at a time. The conversion numbers its T x n results from 0: they go by order."""
    assert piece.group is not None and piece.rows is not None
    (name,) = piece.group.inputs
    first, last = piece.rows
    per_row = len(piece.outputs) // (last - first)
    step = max(1, _BLOCK_BYTES // max(1, piece.nbytes // (last - first)))
    names = iter(piece.outputs)
    for start in range(first, last, step):
        n = min(step, last - start)
        converted = list(revert_weight_conversion(model, {name: weights.read_rows(name, start, start + n)}).values())
        assert len(converted) == per_row * n
        for e in range(n):
            for tensor in converted[e::n]:
                yield next(names).name, [tensor_bytes(tensor)]


class _FileStream:
    """Writes this rank's tensors one after the other into its planned files."""

    def __init__(self, directory: Path, files: list[PlannedFile], progress: Progress | None) -> None:
        self.digests: dict[str, str] = {}
        self._directory = directory
        self._files = iter(files)
        self._file: PlannedFile | None = None
        self._writer: ShardWriter | None = None
        self._progress = progress
        self._total = sum(spec.nbytes for file in files for spec in file.tensors)
        self._done = 0

    def append(self, name: str, blocks: Any) -> None:
        if self._writer is None:
            self._file = next(self._files)
            self._writer = ShardWriter(self._directory / self._file.name, self._file.tensors)
        self._done += self._writer.append(name, blocks)
        if self._writer.complete:
            assert self._file is not None
            self.digests[self._file.name] = self._writer.close()
            self._writer = None
        if self._progress is not None:
            self._progress(self._done, self._total)


def _check_files(staging: Path, files: tuple[PlannedFile, ...]) -> None:
    """Every rank's files are visible here, which they are not when the ranks write to disks of their own."""
    for file in files:
        if not (staging / file.name).is_file():
            raise OSError(f"{file.name} of rank {file.owner} is not in {staging}: all nodes must share this directory")


def _write_index(staging: Path, plan: Plan, parameters: int) -> None:
    index = {
        "metadata": {"total_parameters": parameters, "total_size": plan.nbytes},
        "weight_map": {spec.name: file.name for file in plan.files for spec in file.tensors},
    }
    (staging / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def finish_small_files(staging: Path, digests: Mapping[str, str]) -> dict[str, str]:
    """Bring the files without a digest yet to the disk; their digests."""
    found = [path for path in staging.rglob("*") if path.is_file()]
    small = {str(path.relative_to(staging)): path for path in found if str(path.relative_to(staging)) not in digests}
    for path in small.values():
        fsync_file(path)
    return {name: hash_file(path) for name, path in small.items()}
