"""Grouped matrix products of the experts: one launch for all experts, no host, any split of the rows.

Shapes: R rows in expert order, E experts, K and N the weight's inputs and outputs, M and N two widths of rows.
Rows from `offsets_E[-1]` on are neither read nor written, here and in the references' results zero.

On Hopper the products run in the two Triton kernels below, elsewhere in `torch._grouped_mm`. Both kernels read through
ragged TMA descriptors: the copy engine itself stops at the expert's last row, reads zeros beyond and writes nothing
there, so no tile needs a mask. Their tiles are the fastest of 40 at four models' shapes (docs/perf-notes.md).
"""

from __future__ import annotations

from typing import Any

import torch

from moetrain.kernels._triton import INTERPRETED, TensorDescriptor, cdiv, jit, next_power_of_2, runs_triton, tl
from moetrain.kernels.row_stack import rows_at

TOKENS, FEW, MORE, TILE_N, TILE_K = 128, 64, 32, 128, 64
"""Tiles of `_rows_by_weights`."""
OUTER_TILE, OUTER_TILE_R = 128, 32
"""Tiles of `_outer_by_experts`."""


def grouped_mm(rows_RK: torch.Tensor, weight_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Product of each row with its expert's weight [R, N]. Differentiable.

    Args:
        weight_EKN: contiguous, or the transposed view of a contiguous [E, N, K].
        offsets_E: row at which each expert ends, int32, not above R.
    """
    result: torch.Tensor = _grouped_mm_op(rows_RK, weight_EKN, offsets_E)
    return result


def multiply_rows(
    rows_RK: torch.Tensor,
    weight_EKN: torch.Tensor,
    offsets_E: torch.Tensor,
    *,
    at: torch.Tensor | None = None,
    out_RN: torch.Tensor | None = None,
    out_at: torch.Tensor | None = None,
) -> torch.Tensor:
    """`grouped_mm` without autograd.

    Args:
        at: the rows are this many further on in memory than `rows_RK` (`RowStack`).
        out_RN: where the result goes, `out_at` rows further on; None makes room.
    """
    if rows_RK.dtype == torch.float64 or rows_RK.numel() == 0 or not _runs_here(rows_RK, weight_EKN):
        rows_RK = rows_at(rows_RK, at)
        plain = multiply_rows_ref if rows_RK.dtype == torch.float64 or rows_RK.numel() == 0 else torch._grouped_mm
        result_RN: torch.Tensor = plain(rows_RK, weight_EKN, offsets_E)
        if out_RN is None:
            return result_RN
        rows_at(out_RN, out_at).copy_(result_RN)
        return out_RN
    (num_rows, inner), (experts, _, width) = rows_RK.shape, weight_EKN.shape
    if out_RN is None:
        out_RN = rows_RK.new_empty(num_rows, width)
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
    return out_RN


def multiply_outer(
    left_RM: torch.Tensor,
    right_RN: torch.Tensor,
    offsets_E: torch.Tensor,
    scale: float = 1.0,
    *,
    left_at: torch.Tensor | None = None,
    right_at: torch.Tensor | None = None,
) -> torch.Tensor:
    """`scale` times the sum over each expert's rows of the outer products of left and right [E, M, N], in fp32: a
    weight's gradient. Zero for an expert without rows.

    Args:
        left_at: the rows of left are this many further on in memory (`RowStack`); likewise `right_at`.
    """
    if left_RM.dtype == torch.float64 or left_RM.numel() == 0 or not _runs_here(left_RM, right_RN):
        left_RM, right_RN = rows_at(left_RM, left_at), rows_at(right_RN, right_at)
        if left_RM.dtype == torch.float64 or left_RM.numel() == 0:
            return multiply_outer_ref(left_RM, right_RN, offsets_E, scale)
        out_EMN = torch._grouped_mm(left_RM.t(), right_RN, offs=offsets_E)
        return out_EMN if scale == 1.0 else out_EMN.mul_(scale)
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


def multiply_rows_ref(rows_RK: torch.Tensor, weight_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """`multiply_rows` as a loop over experts. Reads the offsets on the host."""
    out_RN = rows_RK.new_zeros(rows_RK.shape[0], weight_EKN.shape[2])
    ends = offsets_E.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        out_RN[start:end] = rows_RK[start:end] @ weight_EKN[expert]
    return out_RN


def multiply_outer_ref(
    left_RM: torch.Tensor, right_RN: torch.Tensor, offsets_E: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """`multiply_outer` as a loop over experts. Reads the offsets on the host."""
    out_EMN = left_RM.new_zeros(offsets_E.numel(), left_RM.shape[1], right_RN.shape[1])
    ends = offsets_E.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        out_EMN[expert] = left_RM[start:end].T @ right_RN[start:end] * scale
    return out_EMN


def _runs_here(*tensors: torch.Tensor) -> bool:
    """True where the Triton kernels can: 16-bit operands, rows of a multiple of 16 bytes, and a GPU with TMA."""
    if not all(runs_triton(t) and t.element_size() == 2 and t.data_ptr() % 16 == 0 for t in tensors):
        return False
    if any(s != 1 and s % 8 for t in tensors for s in t.stride()) or any(1 not in t.stride()[-2:] for t in tensors):
        return False
    return INTERPRETED or torch.cuda.get_device_capability(tensors[0].device) >= (9, 0)


def _descriptor(tensor: torch.Tensor, block: tuple[int, ...]) -> Any:
    return TensorDescriptor.from_tensor(tensor, list(block))


def _ragged(tensor_RC: torch.Tensor, block_r: int, block_c: int) -> Any:
    """Descriptor whose row bound is part of the coordinates, by Triton's `tools/ragged_tma.py`.

    Two dimensions are put in front with strides 2^34 - s and s (s: one row). Coordinates (2^30, end, 2^30 - count +
    row, column) address row `end - count + row`, since 2^30 * 2^34 bytes wrap to nothing, and the third, bounded by
    2^30, is out of bounds from row `count` on.
    """
    stride = tensor_RC.stride(0)
    limit = 0x7FFF0000
    return TensorDescriptor(
        tensor_RC,
        [limit, limit, 2**30, tensor_RC.shape[1]],
        [2**34 - stride, stride, stride, 1],
        [1, 1, block_r, block_c],
    )


@torch.library.custom_op("moetrain::grouped_mm", mutates_args=())
def _grouped_mm_op(rows_RK: torch.Tensor, weight_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return multiply_rows(rows_RK.contiguous(), weight_EKN, offsets_E)


@torch.library.custom_op("moetrain::grouped_outer", mutates_args=())
def _grouped_outer_op(left_RM: torch.Tensor, right_RN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return multiply_outer(left_RM.contiguous(), right_RN.contiguous(), offsets_E)


@_grouped_mm_op.register_fake
def _(rows_RK: torch.Tensor, weight_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return rows_RK.new_empty(rows_RK.shape[0], weight_EKN.shape[2])


@_grouped_outer_op.register_fake
def _(left_RM: torch.Tensor, right_RN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return left_RM.new_empty(offsets_E.shape[0], left_RM.shape[1], right_RN.shape[1])


def _grouped_mm_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx, grad_RN):  # type: ignore[no-untyped-def]
    rows_RK, weight_EKN, offsets_E = ctx.saved_tensors
    grad_rows = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_rows = _grouped_mm_op(grad_RN, weight_EKN.transpose(1, 2), offsets_E)
    if ctx.needs_input_grad[1] and weight_EKN.stride(1) == 1:
        grad_weight = _grouped_outer_op(grad_RN, rows_RK, offsets_E).transpose(1, 2)
    elif ctx.needs_input_grad[1]:
        grad_weight = _grouped_outer_op(rows_RK, grad_RN, offsets_E)
    return grad_rows, grad_weight, None


_grouped_mm_op.register_autograd(_grouped_mm_backward, setup_context=_grouped_mm_setup)


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
def _store(desc, begin, count, row, column, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore
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
