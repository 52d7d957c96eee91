"""Lists of tensors as tables on the device, so that one launch walks through all of them; and the sum of squares so.

A table holds addresses and sizes; another says which program works on which piece of which tensor. They are kept by
content: while the tensors stay where they are nothing is sent to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moetrain.kernels._triton import cdiv, jit, runs_triton, tl

CHUNK = 16384
"""Elements of a program. It reads its place in two dependent steps before the first element: a loop over several tiles
makes them rare, and a model of 200M elements still gives each multiprocessor of an H200 90 programs."""
_TILE = 1024

Table = tuple[torch.Tensor, torch.Tensor]
"""On the host and on the device."""
_TABLES: dict[tuple[Any, torch.device], Table] = {}
"""The last ones, oldest first."""
_CAPTURED: list[Table] = []
"""Those that CUDA graphs read; nothing tells when a graph is gone."""


def device_table(rows: Sequence[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    """The numbers as int64 [rows, columns] on the device. No host sync."""
    return _on_device(tuple(rows), lambda: torch.tensor(rows, dtype=torch.int64), device)


def chunk_table(sizes: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """Programs for tensors of (row in the table, elements): int32 [programs, 2] of row and number of the chunk."""

    def make() -> torch.Tensor:
        rows = [torch.full((cdiv(numel, CHUNK),), row, dtype=torch.int32) for row, numel in sizes]
        numbers = [torch.arange(len(row), dtype=torch.int32) for row in rows]
        return torch.stack([torch.cat(rows), torch.cat(numbers)], 1)

    return _on_device(("chunks", *sizes), make, device)


def _on_device(key: Any, make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """The table of this content. One that is new to a graph in capture is sent by the graph, in each replay."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _TABLES.pop((key, device), None)
    new = table is None
    if table is None:
        host = make()
        if device.type == "cuda":
            host = host.pin_memory()  # or the copy might wait for what the device has yet to do; graphs take no other
        table = host, host.to(device, non_blocking=True)
    if capturing:
        _CAPTURED.append(table)
    if not (new and capturing):
        _TABLES[key, device] = table
    if len(_TABLES) > 64:
        del _TABLES[next(iter(_TABLES))]
    return table[1]


def vector_length(places: int, itemsize: int) -> int:
    """Elements that a thread takes at once of each of some tensors of one size: as many of the widest as make 16 bytes,
    and no more of the others, whose values would have to change threads. 1 where an address or the size is odd.

    Args:
        places: the tensors' addresses and their number of elements, combined by `|`.
        itemsize: of the widest, in bytes.
    """
    return 1 if places % 16 else 16 // itemsize


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Over all elements of all tensors (fp32 or bf16, one device): a scalar in fp64, always the same bits.

    On a GPU one launch reads each element once: squares in fp32, added in fp32 within 16,384 elements and in fp64 over
    those sums. Finite for tensors whose norm over that many elements fits 1.8e19.
    """
    assert tensors, "no tensors"
    if not all(runs_triton(tensor) for tensor in tensors):
        return sum_of_squares_ref(tensors)
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    tensors = [tensor.contiguous() for tensor in tensors]
    kinds: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
    for tensor in tensors:
        vector = vector_length(tensor.data_ptr() | tensor.numel(), tensor.element_size())
        kinds.setdefault((tensor.dtype, vector), []).append(tensor)
    for (dtype, vector), members in kinds.items():
        chunks = chunk_table([(row, tensor.numel()) for row, tensor in enumerate(members)], total.device)
        if len(chunks) == 0:
            continue
        table = device_table([(tensor.data_ptr(), tensor.numel()) for tensor in members], total.device)
        partial = torch.empty(len(chunks), dtype=torch.float32, device=total.device)
        _sum_of_squares[(len(chunks),)](
            table, chunks, partial, DTYPE=triton_type(dtype), VECTOR=vector, CHUNK=CHUNK, TILE=_TILE, num_warps=4
        )
        total += partial.sum(dtype=torch.float64)
    return total


def sum_of_squares_ref(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same by torch's norms, whose squares are added in fp64: they can pass fp32's range, and there are few."""
    pieces = list(tensors)
    if pieces[0].device.type == "cpu":
        # the CPU sums in order: 2e-3 off for 50M elements in one piece, and fp64 sums take 10 times as long
        pieces = [piece for tensor in tensors for piece in tensor.reshape(-1).split(2**16)]
    dtype = torch.promote_types(pieces[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(pieces, 2.0, dtype=dtype)).double().square().sum()


def triton_type(dtype: torch.dtype) -> object:
    """Triton's name for it, as an argument of a kernel."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.uint8: tl.uint8}[dtype]


@jit
def pointer(entry, DTYPE: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The address in an entry of a table. What Triton knows of alignment decides how much a thread loads at once."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), VECTOR * DTYPE.primitive_bitwidth // 8)


@jit
def chunk_of(chunks, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row of this program's tensor in the table, and its first element there."""
    place = chunks + 2 * tl.program_id(0)
    return tl.load(place), tl.load(place + 1).to(tl.int64) * CHUNK


@jit
def chunk_length(numel, start, VECTOR: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements of the chunk that are in the tensor."""
    return tl.multiple_of(tl.minimum(numel - start, CHUNK).to(tl.int32), VECTOR)


@jit
def _sum_of_squares(  # type: ignore[no-untyped-def]
    table, chunks, partial, DTYPE: tl.constexpr, VECTOR: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    row, start = chunk_of(chunks, CHUNK)
    values = pointer(table + 2 * row, DTYPE, VECTOR) + start
    length = chunk_length(tl.load(table + 2 * row + 1), start, VECTOR, CHUNK)
    squares = tl.zeros((4, TILE), tl.float32)
    for offset in range(0, length, 4 * TILE):
        at = offset + tl.arange(0, 4)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        value = tl.load(values + at, mask=at < length, other=0.0).to(tl.float32)
        squares += value * value
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(squares, 1), 0))
