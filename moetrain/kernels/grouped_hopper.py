"""The products of grouped.py on Hopper, for groups of many rows, built as cuBLAS builds its own.

One program stays on each multiprocessor. Of its warps one chooses tiles, one loads them by the copy engine, three steps
ahead and over the ends of tiles, and twice four multiply half a tile each; what they have computed is on its way out
while they compute the next. Triton's own language cannot give warps roles on Hopper; Gluon, its lower level, can. The
six products of a layer take 5 to 8 % less than grouped_triton.py's, and 1 to 13 % more than cuBLAS takes for groups
that are all equal (docs/perf-notes.md).

    tile       128 rows x 256 columns, 64 of the inner dimension a step: 85 operations for each byte from the cache
    choice     by a counter: a program that another kernel keeps waiting takes fewer tiles

Warps wait for each other at barriers in shared memory, of which each turn's parity tells whether it has come:

    ready[s], free[s]    step s of STAGES has been loaded; both groups have multiplied it
    told, heard          the next tile lies in the mail; those that load and multiply have read it

Shapes as in grouped.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moetrain.kernels._triton import cdiv
from moetrain.kernels.grouped_triton import Rows, ragged_shape

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError("Triton before 3.6 has another Gluon")

TILE_M, TILE_N, STEP = gl.constexpr(128), gl.constexpr(256), gl.constexpr(64)
"""Rows and columns of a tile, and how much of the inner dimension is loaded at once."""
HALF = gl.constexpr(64)
"""Rows of a tile that four warps multiply: their results fill 128 of a thread's registers."""
STAGES = gl.constexpr(3)
"""Steps that are loaded ahead: 144 KiB, beside 64 KiB of results on their way out."""
GROUP = gl.constexpr(16)
"""Tiles of rows that go through all columns together, so that they share the weights in cache."""
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # names until Triton 3.8
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
OPTIONS = {"num_warps": 4, "maxnreg": 168}
"""Twelve warps have 168 registers each; those that multiply take 232, the one that loads leaves all but 40."""


def multiply_rows(rows: Rows, weight_EKN: torch.Tensor, offsets_E: torch.Tensor, out: Rows) -> None:
    """`grouped.multiply_rows` of `rows` into `out`."""
    (rows_RK, at), (out_RN, out_at) = rows, out
    experts, inner, width = weight_EKN.shape
    by_input = weight_EKN.stride(1) == 1
    weight = weight_EKN.transpose(1, 2) if by_input else weight_EKN
    _rows_by_weights[(_multiprocessors(rows_RK.device),)](
        _ragged(rows_RK, TILE_M, STEP),
        _descriptor(weight, *((1, TILE_N, STEP) if by_input else (1, STEP, TILE_N))),
        _ragged(out_RN, HALF, TILE_N),
        offsets_E,
        at,
        out_at,
        _counter(rows_RK.device),
        experts,
        width,
        inner,
        BY_INPUT=by_input,
        **OPTIONS,
    )


def multiply_outer(left: Rows, right: Rows, offsets_E: torch.Tensor, scale: float) -> torch.Tensor:
    """`grouped.multiply_outer` of `left` and `right`."""
    (left_RM, left_at), (right_RN, right_at) = left, right
    experts, height, width = offsets_E.numel(), left_RM.shape[1], right_RN.shape[1]
    out_EMN = left_RM.new_empty(experts, height, width)
    _outer_by_experts[(_multiprocessors(left_RM.device),)](
        _ragged(left_RM, STEP, HALF),
        _ragged(right_RN, STEP, TILE_N),
        _descriptor(out_EMN, 1, HALF, TILE_N),
        offsets_E,
        left_at,
        right_at,
        _counter(left_RM.device),
        experts * cdiv(height, TILE_M.value) * cdiv(width, TILE_N.value),
        height,
        width,
        scale,
        **OPTIONS,
    )
    return out_EMN


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _counter(device: torch.device) -> torch.Tensor:
    """Tiles that have been taken beside each program's first. A launch has its own: two may run at the same time."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def shared_layout(rank: int) -> gl.NVMMASharedLayout:
    """Of 16-bit tiles that the copy engine writes and the tensor cores read."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def _descriptor(tensor: torch.Tensor, *block: Any) -> Any:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), _block(block), shared_layout(len(block)))


def _ragged(tensor_RC: torch.Tensor, rows: Any, columns: Any) -> Any:
    """Descriptor whose row bound is part of the coordinates (`ragged_shape`)."""
    return TensorDescriptor(tensor_RC, *ragged_shape(tensor_RC), _block((1, 1, rows, columns)), shared_layout(4))


def _block(sizes: Sequence[Any]) -> list[int]:
    return [size.value if isinstance(size, gl.constexpr) else size for size in sizes]


def jit(function: Any) -> Any:
    """`gluon.jit`, whatever its type."""
    return gluon.jit(function)


@jit
def _shift(at):  # type: ignore[no-untyped-def]
    """Rows that a tensor's own are further on, in the type of a descriptor's coordinates."""
    if at is None:  # noqa: SIM108 - decided at compile time
        rows = 0
    else:
        rows = gl.load(at).to(gl.int32)
    return rows


@jit
def _group_of(offsets_E, expert):  # type: ignore[no-untyped-def]
    """First row of an expert, and how many it has."""
    begin = gl.load(offsets_E + expert - 1, mask=expert > 0, other=0)
    return begin, gl.load(offsets_E + expert) - begin


@jit
def _barriers(number: gl.constexpr, arrivals: gl.constexpr):  # type: ignore[no-untyped-def]
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@jit
def _news():  # type: ignore[no-untyped-def]
    mail = gl.allocate_shared_memory(gl.int32, [16, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return _barriers(2, 1), _barriers(2, 3), mail


@jit
def _write(mail, number, value):  # type: ignore[no-untyped-def]
    mail.index(number).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@jit
def _read(mail, number, warps: gl.constexpr):  # type: ignore[no-untyped-def]
    """Every thread reads the same address, and the compiler knows that all have the same value: what is computed from
    it, descriptors of the tensor cores' operands among them, stays in registers of the whole warp."""
    return gl.sum(mail.index(number).load(gl.BlockedLayout([1], [32], [warps], [0])), 0)


@jit
def _tell(news, turn, end, count, row, column, expert):  # type: ignore[no-untyped-def]
    """From the warp that chooses to the others: a tile. They may be one tile behind."""
    told, heard, mail = news
    at = turn % 2 * 8
    mbarrier.wait(heard.index(turn % 2), ((turn // 2) & 1) ^ 1)
    _write(mail, at, end)
    _write(mail, at + 1, count)
    _write(mail, at + 2, row)
    _write(mail, at + 3, column)
    _write(mail, at + 4, expert)
    mbarrier.arrive(told.index(turn % 2), count=1)


@jit
def _hear(news, turn, warps: gl.constexpr):  # type: ignore[no-untyped-def]
    told, heard, mail = news
    at = turn % 2 * 8
    mbarrier.wait(told.index(turn % 2), (turn // 2) & 1)
    end, count = _read(mail, at, warps), _read(mail, at + 1, warps)
    row, column, expert = _read(mail, at + 2, warps), _read(mail, at + 3, warps), _read(mail, at + 4, warps)
    mbarrier.arrive(heard.index(turn % 2), count=1)
    return end, count, row, column, expert


@jit
def _next_tile(counter):  # type: ignore[no-untyped-def]
    return gl.num_programs(0) + gl.atomic_add(counter, 1)


@jit
def _claim(ready, free, step):  # type: ignore[no-untyped-def]
    """The buffer of a step, once both groups have multiplied what was in it: it is to be loaded now."""
    s = step % STAGES
    mbarrier.wait(free.index(s), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(s), (TILE_M + TILE_N) * STEP * 2)
    return s


@jit
def _await(ready, step):  # type: ignore[no-untyped-def]
    """The buffer of a step, once it has been loaded."""
    s = step % STAGES
    mbarrier.wait(ready.index(s), (step // STAGES) & 1)
    return s


@jit
def _release(free, step):  # type: ignore[no-untyped-def]
    """This group has multiplied what is in the buffer of a step."""
    mbarrier.arrive(free.index(step % STAGES), count=1)


@jit
def _send(out, where, out_buf, acc):  # type: ignore[no-untyped-def]
    """Put a half tile of the result on its way, once the one before it has left the buffer."""
    tma.store_wait(pendings=0)
    out_buf.reshape([HALF, TILE_N]).store(acc.to(out.dtype))
    fence_async_shared()
    _store(out, where, out_buf)


@jit
def _choose_rows(offsets_E, counter, experts, width, news):  # type: ignore[no-untyped-def]
    """Tell of tile after tile: an expert's, then the next expert's. A count of 0 ends them."""
    columns = gl.cdiv(width, TILE_N)
    expert = 0
    first = 0  # tile of the expert
    begin, count = _group_of(offsets_E, expert)
    tile = gl.program_id(0)
    turn = 0
    going = True
    while going:
        down = gl.cdiv(count, TILE_M)
        while (tile >= first + down * columns) & (expert + 1 < experts):
            first += down * columns
            expert += 1
            begin, count = _group_of(offsets_E, expert)
            down = gl.cdiv(count, TILE_M)
        inside = tile - first
        going = inside < down * columns
        group = inside // (GROUP * columns)
        inside -= group * GROUP * columns
        size = gl.maximum(gl.minimum(down - group * GROUP, GROUP), 1)
        row = (group * GROUP + inside % size) * TILE_M
        _tell(news, turn, begin + count, gl.where(going, count, 0), row, (inside // size) * TILE_N, expert)
        turn += 1
        tile = _next_tile(counter)


@jit
def _load_rows(rows, weight, at, inner, buffers, ready, free, news, BY_INPUT: gl.constexpr):  # type: ignore[no-untyped-def]
    row_bufs, weight_bufs = buffers
    shift = _shift(at)
    step = 0
    turn = 0
    going = True
    while going:
        end, count, row, n, expert = _hear(news, turn, 1)
        turn += 1
        going = count > 0
        if going:
            for k in range(0, inner, STEP):
                s = _claim(ready, free, step)
                where = [1073741824, shift + end, 1073741824 - count + row, k]
                _load(rows, where, ready.index(s), row_bufs.index(s))
                if BY_INPUT:
                    _load(weight, [expert, n, k], ready.index(s), weight_bufs.index(s))
                else:
                    _load(weight, [expert, k, n], ready.index(s), weight_bufs.index(s))
                step += 1


@jit
def _multiply_rows(  # type: ignore[no-untyped-def]
    out, out_at, inner, buffers, ready, free, news, out_buf, which: gl.constexpr, BY_INPUT: gl.constexpr
):
    """Four warps' half of each tile."""
    row_bufs, weight_bufs = buffers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    shift = _shift(out_at)
    step = 0
    turn = 0
    going = True
    while going:
        end, count, row, n, _ = _hear(news, turn, 4)
        turn += 1
        going = count > 0
        row += which * HALF
        if row < count:
            acc = gl.zeros((HALF, TILE_N), gl.float32, layout)
            for k in range(0, inner, STEP):
                s = _await(ready, step)
                x = row_bufs.index(s).reshape([2 * HALF, STEP]).slice(which * HALF, HALF, dim=0)
                if BY_INPUT:
                    w = weight_bufs.index(s).reshape([TILE_N, STEP]).permute((1, 0))
                else:
                    w = weight_bufs.index(s).reshape([STEP, TILE_N])
                acc = warpgroup_mma(x, w, acc, use_acc=k > 0, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
                if k > 0:  # the product before this one is done
                    _release(free, step + STAGES - 1)
                step += 1
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            _release(free, step + STAGES - 1)
            _send(out, [1073741824, shift + end, 1073741824 - count + row, n], out_buf, acc)
        elif going:  # no row of this half
            for _ in range(0, inner, STEP):
                _await(ready, step)
                _release(free, step)
                step += 1
    tma.store_wait(pendings=0)


@jit
def _rows_by_weights(  # type: ignore[no-untyped-def]
    rows, weight, out, offsets_E, at, out_at, counter, experts, width, inner, BY_INPUT: gl.constexpr
):
    buffers = (
        gl.allocate_shared_memory(rows.dtype, [STAGES, 1, 1, TILE_M, STEP], rows.layout),
        gl.allocate_shared_memory(rows.dtype, [STAGES] + weight.block_type.shape, weight.layout),  # noqa: RUF005
    )
    out_bufs = gl.allocate_shared_memory(rows.dtype, [2, 1, 1, HALF, TILE_N], out.layout)
    ready, free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    news = _news()
    first, second = out_bufs.index(0), out_bufs.index(1)
    gl.warp_specialize(
        [
            (_multiply_rows, (out, out_at, inner, buffers, ready, free, news, first, 0, BY_INPUT)),
            (_multiply_rows, (out, out_at, inner, buffers, ready, free, news, second, 1, BY_INPUT)),
            (_load_rows, (rows, weight, at, inner, buffers, ready, free, news, BY_INPUT)),
            (_choose_rows, (offsets_E, counter, experts, width, news)),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )


@jit
def _choose_outer(offsets_E, counter, tiles, height, width, news):  # type: ignore[no-untyped-def]
    """Tell of tile after tile, a negative count after the last."""
    down = gl.cdiv(height, TILE_M)
    across = gl.cdiv(width, TILE_N)
    tile = gl.program_id(0)
    turn = 0
    while tile < tiles:
        expert = tile // (down * across)
        inside = tile - expert * down * across
        begin, count = _group_of(offsets_E, expert)
        _tell(news, turn, begin + count, count, (inside % down) * TILE_M, (inside // down) * TILE_N, expert)
        turn += 1
        tile = _next_tile(counter)
    _tell(news, turn, 0, -1, 0, 0, 0)


@jit
def _load_outer(left, right, left_at, right_at, buffers, ready, free, news):  # type: ignore[no-untyped-def]
    left_bufs, right_bufs = buffers
    left_shift, right_shift = _shift(left_at), _shift(right_at)
    step = 0
    turn = 0
    going = True
    while going:
        end, count, m, n, _ = _hear(news, turn, 1)
        turn += 1
        going = count >= 0
        for r in range(0, count, STEP):
            s = _claim(ready, free, step)
            row = 1073741824 - count + r
            for i in gl.static_range(2):
                where = [1073741824, left_shift + end, row, m + i * HALF]
                _load(left, where, ready.index(s), left_bufs.index(2 * s + i))
            where = [1073741824, right_shift + end, row, n]
            _load(right, where, ready.index(s), right_bufs.index(s))
            step += 1


@jit
def _multiply_outer(out, scale, buffers, ready, free, news, out_buf, which: gl.constexpr):  # type: ignore[no-untyped-def]
    """Four warps' half of each tile."""
    left_bufs, right_bufs = buffers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    step = 0
    turn = 0
    going = True
    while going:
        _, count, m, n, expert = _hear(news, turn, 4)
        turn += 1
        going = count >= 0
        if going:
            acc = gl.zeros((HALF, TILE_N), gl.float32, layout)
            for r in range(0, count, STEP):
                s = _await(ready, step)
                x = left_bufs.index(2 * s + which).reshape([STEP, HALF]).permute((1, 0))
                w = right_bufs.index(s).reshape([STEP, TILE_N])
                acc = warpgroup_mma(x, w, acc, use_acc=r > 0, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
                if r > 0:  # the product before this one is done
                    _release(free, step + STAGES - 1)
                step += 1
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            if count > 0:
                _release(free, step + STAGES - 1)
            _send(out, [expert, m + which * HALF, n], out_buf, acc * scale)
    tma.store_wait(pendings=0)


@jit
def _outer_by_experts(left, right, out, offsets_E, left_at, right_at, counter, tiles, height, width, scale):  # type: ignore[no-untyped-def]
    buffers = (  # of the left operand a half each: the tensor cores read its columns as rows, 64 at a time
        gl.allocate_shared_memory(left.dtype, [2 * STAGES, 1, 1, STEP, HALF], left.layout),
        gl.allocate_shared_memory(left.dtype, [STAGES, 1, 1, STEP, TILE_N], right.layout),
    )
    out_bufs = gl.allocate_shared_memory(left.dtype, [2, 1, HALF, TILE_N], out.layout)
    ready, free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    news = _news()
    first, second = out_bufs.index(0), out_bufs.index(1)
    gl.warp_specialize(
        [
            (_multiply_outer, (out, scale, buffers, ready, free, news, first, 0)),
            (_multiply_outer, (out, scale, buffers, ready, free, news, second, 1)),
            (_load_outer, (left, right, left_at, right_at, buffers, ready, free, news)),
            (_choose_outer, (offsets_E, counter, tiles, height, width, news)),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )
