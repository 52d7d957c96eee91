"""The products of grouped.py in Triton: any split of the rows, and any number of them.

Both kernels read through ragged TMA descriptors: the copy engine itself stops at the expert's last row, reads zeros
beyond and writes nothing there, so no tile needs a mask. Their tiles are the fastest of 40 at four models' shapes
(docs/perf-notes.md).

Shapes as in grouped.py.
"""

from __future__ import annotations

from typing import Any

import torch

from moetrain.kernels._triton import TensorDescriptor, cdiv, jit, next_power_of_2, tl

TOKENS, FEW, MORE, TILE_N, TILE_K = 128, 64, 32, 128, 64
"""Tiles of `_rows_by_weights`."""
OUTER_TILE, OUTER_TILE_R = 128, 32
"""Tiles of `_outer_by_experts`."""

Rows = tuple[torch.Tensor, torch.Tensor | None]
"""Rows, and how many rows further on in memory they lie (`RowStack`)."""


def multiply_rows(rows: Rows, weight_EKN: torch.Tensor, offsets_E: torch.Tensor, out: Rows) -> None:
    """`grouped.multiply_rows` of `rows` into `out`."""
    (rows_RK, at), (out_RN, out_at) = rows, out
    (num_rows, inner), (experts, _, width) = rows_RK.shape, weight_EKN.shape
    by_input = weight_EKN.stride(1) == 1
    weight = weight_EKN.transpose(1, 2) if by_input else weight_EKN
    _rows_by_weights[((num_rows // TOKENS + min(experts, num_rows)) * cdiv(width, TILE_N),)](
        *(_ragged(rows_RK, rows, TILE_K) for rows in (TOKENS, FEW, MORE)),
        _descriptor(weight, (1, TILE_N, TILE_K) if by_input else (1, TILE_K, TILE_N)),
        *(_ragged(out_RN, rows, TILE_N) for rows in (TOKENS, FEW, MORE)),
        offsets_E,
        at,
        out_at,
        experts,
        width,
        inner,
        BY_INPUT=by_input,
        PAD_E=next_power_of_2(experts),
        GROUP=8,
        TOKENS=TOKENS,
        FEW=FEW,
        MORE=MORE,
        TILE_N=TILE_N,
        TILE_K=TILE_K,
        num_warps=4,
        num_stages=3,
    )


def multiply_outer(left: Rows, right: Rows, offsets_E: torch.Tensor, scale: float) -> torch.Tensor:
    """`grouped.multiply_outer` of `left` and `right`."""
    (left_RM, left_at), (right_RN, right_at) = left, right
    experts, height, width = offsets_E.numel(), left_RM.shape[1], right_RN.shape[1]
    out_EMN = left_RM.new_empty(experts, height, width)
    _outer_by_experts[(experts * cdiv(height, OUTER_TILE) * cdiv(width, OUTER_TILE),)](
        _ragged(left_RM, OUTER_TILE_R, OUTER_TILE),
        _ragged(right_RN, OUTER_TILE_R, OUTER_TILE),
        _descriptor(out_EMN, (1, OUTER_TILE, OUTER_TILE)),
        offsets_E,
        left_at,
        right_at,
        height,
        width,
        scale,
        GROUP=8,
        TILE=OUTER_TILE,
        TILE_R=OUTER_TILE_R,
        num_warps=4,
        num_stages=4,
    )
    return out_EMN


def ragged_shape(tensor_RC: torch.Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of a descriptor whose row bound is part of the coordinates, by Triton's `tools/ragged_tma.py`.

    Two dimensions are put in front with strides 2^34 - s and s (s: one row). Coordinates (2^30, end, 2^30 - count +
    row, column) address row `end - count + row`, since 2^30 * 2^34 bytes wrap to nothing, and the third, bounded by
    2^30, is out of bounds from row `count` on.
    """
    stride, limit = tensor_RC.stride(0), 0x7FFF0000
    return [limit, limit, 2**30, tensor_RC.shape[1]], [2**34 - stride, stride, stride, 1]


def _descriptor(tensor: torch.Tensor, block: tuple[int, ...]) -> Any:
    return TensorDescriptor.from_tensor(tensor, list(block))


def _ragged(tensor_RC: torch.Tensor, block_r: int, block_c: int) -> Any:
    return TensorDescriptor(tensor_RC, *ragged_shape(tensor_RC), [1, 1, block_r, block_c])


@jit
def _shift(at):  # type: ignore[no-untyped-def]
    """Rows that a tensor's own are further on, in the type of a descriptor's coordinates."""
    if at is None:  # noqa: SIM108 - decided at compile time
        rows = 0
    else:
        rows = tl.load(at).to(tl.int32)
    return rows


@jit
def _load(desc, begin, count, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tile of the rows [begin, begin + count), zero past them."""
    return desc.load([1073741824, begin + count, 1073741824 - count + row, column]).reshape(ROWS, COLUMNS)


@jit
def _store(desc, begin, count, row, column, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a tile of the rows [begin, begin + count), nothing past them."""
    desc.store([1073741824, begin + count, 1073741824 - count + row, column], tile.reshape(1, 1, ROWS, COLUMNS))


@jit
def _load_weight(  # type: ignore[no-untyped-def]
    weight, expert, n, k, BY_INPUT: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr
):
    """[TILE_N, TILE_K] of an expert's weight, whichever way it lies in memory."""
    if BY_INPUT:
        tile_NK = weight.load([expert, n, k]).reshape(TILE_N, TILE_K)
    else:
        tile_NK = weight.load([expert, k, n]).reshape(TILE_K, TILE_N).T
    return tile_NK


@jit
def _find_tile(  # type: ignore[no-untyped-def]
    offsets_E,
    experts,
    width,
    PAD_E: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    MORE: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """This program's tile: whether it has none, its expert, that expert's first row and count, its row and column.

    An expert has one tile for every TOKENS rows; up to MORE rows on top go with the last. GROUP tiles of rows go
    through all columns together, so that they share the weights in cache.
    """
    e = tl.arange(0, PAD_E)
    end_E = tl.load(offsets_E + e, mask=e < experts, other=0)
    begin_E = tl.load(offsets_E + e - 1, mask=(e > 0) & (e < experts), other=0)
    count_E = tl.where(e < experts, end_E - begin_E, 0)
    tiles_E = tl.where(count_E > 0, tl.maximum((count_E - MORE + TOKENS - 1) // TOKENS, 1), 0)
    last_E = tl.cumsum(tiles_E, 0)
    columns = tl.cdiv(width, TILE_N)
    group = tl.program_id(0) // (GROUP * columns)
    inside = tl.program_id(0) - group * GROUP * columns
    size = tl.minimum(tl.sum(tiles_E, 0) - group * GROUP, GROUP)
    idle = inside >= size * columns
    size = tl.maximum(size, 1)
    tile = group * GROUP + inside % size
    expert = tl.sum(((e < experts) & (last_E <= tile)).to(tl.int32), 0)
    begin = tl.sum(tl.where(e == expert, begin_E, 0), 0)
    count = tl.sum(tl.where(e == expert, count_E, 0), 0)
    row = (tile - tl.sum(tl.where(e == expert, last_E - tiles_E, 0), 0)) * TOKENS
    return idle, expert, begin, count, row, (inside // size) * TILE_N


@jit
def _one_product(  # type: ignore[no-untyped-def]
    rows,
    weight,
    out,
    expert,
    begin,
    out_begin,
    count,
    row,
    n,
    inner,
    BY_INPUT: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    acc_NT = tl.zeros((TILE_N, TOKENS), tl.float32)
    for k in range(0, inner, TILE_K):
        x_TK = _load(rows, begin, count, row, k, TOKENS, TILE_K)
        acc_NT = tl.dot(_load_weight(weight, expert, n, k, BY_INPUT, TILE_N, TILE_K), x_TK.T, acc_NT)
    _store(out, out_begin, count, row, n, acc_NT.to(out.dtype).T, TOKENS, TILE_N)


@jit
def _two_products(  # type: ignore[no-untyped-def]
    rows,
    more_rows,
    weight,
    out,
    more_out,
    expert,
    begin,
    out_begin,
    count,
    row,
    n,
    inner,
    BY_INPUT: tl.constexpr,
    TOKENS: tl.constexpr,
    MORE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """TOKENS + MORE rows that share the weight's tiles."""
    acc_NT = tl.zeros((TILE_N, TOKENS), tl.float32)
    more_acc_NT = tl.zeros((TILE_N, MORE), tl.float32)
    for k in range(0, inner, TILE_K):
        x_TK = _load(rows, begin, count, row, k, TOKENS, TILE_K)
        more_x_TK = _load(more_rows, begin, count, row + TOKENS, k, MORE, TILE_K)
        w_NK = _load_weight(weight, expert, n, k, BY_INPUT, TILE_N, TILE_K)
        acc_NT = tl.dot(w_NK, x_TK.T, acc_NT)
        more_acc_NT = tl.dot(w_NK, more_x_TK.T, more_acc_NT)
    _store(out, out_begin, count, row, n, acc_NT.to(out.dtype).T, TOKENS, TILE_N)
    _store(more_out, out_begin, count, row + TOKENS, n, more_acc_NT.to(out.dtype).T, MORE, TILE_N)


@jit
def _rows_by_weights(  # type: ignore[no-untyped-def]
    rows,
    few_rows,
    more_rows,
    weight,
    out,
    few_out,
    more_out,
    offsets_E,
    at,
    out_at,
    experts,
    width,
    inner,
    BY_INPUT: tl.constexpr,
    PAD_E: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    FEW: tl.constexpr,
    MORE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """One tile of the result, transposed: weights are the left operand and tokens the right, whose tile may be as
    narrow as 8. With 256 rows an expert, half of the experts have a few more than two tiles of 128: those few go with
    the last tile (`MORE`), or into a tile half as wide (`FEW`)."""
    idle, expert, begin, count, row, n = _find_tile(offsets_E, experts, width, PAD_E, GROUP, TOKENS, MORE, TILE_N)
    if idle:
        return
    left = count - row
    out_begin = begin + _shift(out_at)
    begin += _shift(at)
    if left <= FEW:
        _one_product(
            few_rows, weight, few_out, expert, begin, out_begin, count, row, n, inner, BY_INPUT, FEW, TILE_N, TILE_K
        )
    elif left > TOKENS and left <= TOKENS + MORE:
        _two_products(
            rows,
            more_rows,
            weight,
            out,
            more_out,
            expert,
            begin,
            out_begin,
            count,
            row,
            n,
            inner,
            BY_INPUT,
            TOKENS,
            MORE,
            TILE_N,
            TILE_K,
        )
    else:
        _one_product(
            rows, weight, out, expert, begin, out_begin, count, row, n, inner, BY_INPUT, TOKENS, TILE_N, TILE_K
        )


@jit
def _outer_by_experts(  # type: ignore[no-untyped-def]
    left,
    right,
    out,
    offsets_E,
    left_at,
    right_at,
    height,
    width,
    scale,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """One tile of one expert's result: a sum over its rows. Three programs of 128 threads fit a multiprocessor, which
    hides each other's first loads and last stores: with 256 rows a tile's sum has only 8 steps."""
    down, across = tl.cdiv(height, TILE), tl.cdiv(width, TILE)
    expert = tl.program_id(0) // (down * across)
    tile = tl.program_id(0) - expert * down * across
    group = tile // (GROUP * across)
    size = tl.minimum(down - group * GROUP, GROUP)
    tile -= group * GROUP * across
    m = (group * GROUP + tile % size) * TILE
    n = (tile // size) * TILE
    begin = tl.load(offsets_E + expert - 1, mask=expert > 0, other=0)
    count = tl.load(offsets_E + expert) - begin
    left_begin, right_begin = begin + _shift(left_at), begin + _shift(right_at)
    acc_MN = tl.zeros((TILE, TILE), tl.float32)
    for r in range(0, count, TILE_R):
        left_RM = _load(left, left_begin, count, r, m, TILE_R, TILE)
        right_RN = _load(right, right_begin, count, r, n, TILE_R, TILE)
        acc_MN = tl.dot(left_RM.T, right_RN, acc_MN)
    out.store([expert, m, n], (acc_MN * scale).to(out.dtype).reshape(1, TILE, TILE))
