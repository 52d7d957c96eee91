"""The safetensors file format: headers read with every check that needs no tensor data, files written as a stream.

A file is 8 bytes of header length (little endian), a JSON header `{name: {dtype, shape, data_offsets}}` and the
tensors' bytes, back to back. https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
DTYPE_BITS = {name: 8 * dtype.itemsize for name, dtype in TORCH_DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference reader."""
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes are: `[start, end)` of `file`, a name inside the checkpoint directory."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec of a tensor on any device, meta included. Raises ValueError when safetensors has no such dtype."""
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, which safetensors cannot hold")
    return TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in file order.

    Raises:
        ValueError: the file is truncated, has surplus bytes, or its header is no valid safetensors header: bad JSON,
            a repeated name, an unknown dtype, a range that does not fit dtype and shape, ranges that leave a gap.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path} is truncated: {size} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} is corrupt: a header of {length:,} bytes (limit {MAX_HEADER_BYTES:,})")
        if 8 + length > size:
            raise ValueError(f"{path} is truncated inside its header: {8 + length - size:,} bytes are missing")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_pairs)
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
        header.pop("__metadata__", None)
        tensors = {name: _parse_entry(name, entry, path.name, 8 + length) for name, entry in header.items()}
    except ValueError as error:
        raise ValueError(f"{path} is corrupt: header: {error}") from None
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_cover(path, tensors, 8 + length, size)
    return tensors


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _parse_entry(name: str, entry: Any, file: str, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{name} lacks dtype, shape or data_offsets") from None
    if dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in [*shape, start, end]):
        raise ValueError(f"{name} has malformed shape or data_offsets")
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (end - start):
        raise ValueError(f"{name} is {dtype} {shape}, which is not {end - start} bytes")
    return TensorInfo(file, dtype, tuple(shape), data_start + start, data_start + end)


def _check_cover(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """The tensors lie back to back from the header's end to the file's."""
    position = data_start
    for name, tensor in tensors.items():
        if tensor.start != position:
            raise ValueError(f"{path} is corrupt: header: a gap or an overlap before {name}")
        position = tensor.end
    if position > size:
        raise ValueError(f"{path} is truncated: {position - size:,} of {position:,} bytes are missing")
    if position < size:
        raise ValueError(f"{path} is corrupt: {size - position:,} bytes after the last tensor")


def build_header(tensors: Iterable[TensorSpec]) -> bytes:
    """Length prefix and header of a file that holds `tensors` in this order, padded to 8 bytes as usual."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in tensors:
        assert spec.name not in header, f"{spec.name} occurs twice"
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position := position + spec.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardWriter:
    """Writes one safetensors file front to back and hashes it on the way, so memory holds one tensor at a time."""

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]) -> None:
        """Create the file and write its header. Wider items come first, else readers meet unaligned tensors."""
        widths = [DTYPE_BITS[spec.dtype] for spec in tensors]
        assert widths == sorted(widths, reverse=True), "tensors must come in order of falling item size"
        self._pending = list(reversed(tensors))
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._write(build_header(tensors))

    def append(self, name: str, blocks: Iterable[bytes | memoryview]) -> int:
        """Write the next tensor, which must be `name`, from its bytes in blocks; returns their number."""
        spec = self._pending.pop()
        assert spec.name == name, f"{name} written where the header has {spec.name}"
        written = sum(self._write(block) for block in blocks)
        assert written == spec.nbytes, f"{name}: {written} bytes written of {spec.nbytes}"
        return written

    def _write(self, block: bytes | memoryview) -> int:
        with self._closed_on_error():
            self._file.write(block)
        self._digest.update(block)  # 1 to 2 GB/s, while the kernel brings the last blocks to the disk
        return len(block)

    @property
    def complete(self) -> bool:
        return not self._pending

    def close(self) -> str:
        """Bring the file to the disk; returns its SHA-256 in hex."""
        with self._closed_on_error():
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """A file that stays open keeps its room on a full disk after it is deleted."""
        try:
            yield
        except OSError:
            with suppress(OSError):  # closing writes what is buffered, and fails again
                self._file.close()
            raise


def read_range(path: Path, start: int, end: int) -> Iterable[bytes]:
    """Bytes `[start, end)` of a file in blocks of at most 16 MiB."""
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(_BLOCK_BYTES, end - start))
            if not block:
                raise OSError(f"{path} ends {end - start:,} bytes early")
            start += len(block)
            yield block
