"""Storage of torch's distributed checkpoints without pickles: one safetensors file a rank and one JSON index.

DCP plans which rank writes which part of a tensor and how another layout reads it back. Its own storages either pickle
the index, which makes a training checkpoint a file that runs code when read, or build each rank's file in memory. This
one streams tensors into files that `format.py` checks and `manifest.py` hashes.

A file holds a part under `<tensor>` when it is the whole, else under `<tensor>@<offsets>`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from moetrain.checkpoint.format import (
    DTYPE_BITS,
    DTYPE_NAMES,
    TORCH_DTYPES,
    ShardWriter,
    TensorSpec,
    spec_of,
    tensor_bytes,
)

TENSOR_INDEX = "tensors.json"


@dataclass(frozen=True)
class Part:
    """One block of a tensor: where it lies in the tensor and in the checkpoint."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a training checkpoint: safetensors dtype, full shape, and its parts, which tile it."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def read_index(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name. Raises ValueError when the index is damaged."""
    path = directory / TENSOR_INDEX
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: StoredTensor(
                entry["dtype"],
                tuple(entry["shape"]),
                tuple(Part(tuple(p["offsets"]), tuple(p["sizes"]), p["file"], p["key"]) for p in entry["parts"]),
            )
            for name, entry in raw.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is missing or corrupt: {error!r}") from None


def read_tensor(directory: Path, stored: StoredTensor, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """A whole tensor, or rows [start, stop) of its dimension 0, put together from its parts on the CPU."""
    start, stop = rows if rows is not None else (0, stored.shape[0] if stored.shape else 0)
    shape = (stop - start, *stored.shape[1:]) if stored.shape else ()
    result = torch.empty(shape, dtype=TORCH_DTYPES[stored.dtype])
    for part in stored.parts:
        with safe_open(directory / part.file, framework="pt") as file:
            if not stored.shape:
                result.copy_(file.get_tensor(part.key))
                break
            first, last = max(start, part.offsets[0]), min(stop, part.offsets[0] + part.sizes[0])
            if first < last:
                inner = tuple(slice(o, o + n) for o, n in zip(part.offsets[1:], part.sizes[1:], strict=True))
                block = file.get_slice(part.key)[first - part.offsets[0] : last - part.offsets[0]]
                result[(slice(first - start, last - start), *inner)] = block
    return result


class TensorWriter(StorageWriter):
    """Writes this rank's parts to `rank-<rank>.safetensors` of an existing directory.

    `digests` holds the SHA-256 of the files that this rank wrote, afterwards.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        super().__init__()
        self.digests: dict[str, str] = {}
        self._directory = directory
        self._file = f"rank-{rank:05d}.safetensors"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors = {_key_of(item): _resolve(planner, item) for item in plan.items}
        specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
        specs.sort(key=lambda spec: -DTYPE_BITS[spec.dtype])
        if specs:
            self._write(specs, tensors)
        results = [self._result(item) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, specs: list[TensorSpec], tensors: dict[str, torch.Tensor]) -> None:
        writer = ShardWriter(self._directory / self._file, specs)
        for spec in specs:
            writer.append(spec.name, [tensor_bytes(tensors[spec.name].cpu())])
        self.digests[self._file] = writer.close()

    def _result(self, item: WriteItem) -> WriteResult:
        assert item.tensor_data is not None
        chunk = item.tensor_data.chunk
        part = Part(tuple(chunk.offsets), tuple(chunk.sizes), self._file, _key_of(item))
        size = chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        return WriteResult(index=item.index, size_in_bytes=size, storage_data=part)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank: write the index."""
        parts: dict[str, list[Part]] = {}
        for result in (result for of_rank in results for result in of_rank):
            parts.setdefault(result.index.fqn, []).append(result.storage_data)
        index = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            entry = StoredTensor(DTYPE_NAMES[stored.properties.dtype], tuple(stored.size), tuple(parts[name]))
            index[name] = dataclasses.asdict(entry)
        with (self._directory / TENSOR_INDEX).open("w", encoding="utf-8") as file:
            json.dump(index, file)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


class TensorReader(StorageReader):
    """Reads the parts that a rank needs, into the tensors it has."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._parts: dict[MetadataIndex, Part] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        for name, stored in read_index(self._directory).items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in stored.parts]
            properties = TensorProperties(dtype=TORCH_DTYPES[stored.dtype])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
            self._parts |= {MetadataIndex(name, torch.Size(p.offsets)): p for p in stored.parts}
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[ReadItem, Part]]] = {}
        for item in plan.items:
            part = self._parts[item.storage_index]
            by_file.setdefault(part.file, []).append((item, part))
        for name, items in by_file.items():
            with safe_open(self._directory / name, framework="pt") as file:
                for item, part in items:
                    target = planner.resolve_tensor(item).detach()
                    _read_into(file, item, part, target)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def _key_of(item: WriteItem) -> str:
    assert item.type != WriteItemType.BYTE_IO and item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    chunk = item.tensor_data.chunk
    if tuple(chunk.sizes) == tuple(item.tensor_data.size):
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, chunk.offsets))}"


def _resolve(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach()


def _read_into(file: Any, item: ReadItem, part: Part, target: torch.Tensor) -> None:
    slices = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
    target.copy_(file.get_slice(part.key)[slices] if slices else file.get_tensor(part.key))
