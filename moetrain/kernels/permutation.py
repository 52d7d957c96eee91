"""Copy tokens to rows in expert order and sum rows back to tokens: each is the other's backward.

Shapes: T tokens, K choices of a token (top_k), R rows (capacity), H hidden.
Rows that hold no slot are neither read nor written: what is in them does not matter, not even NaN.
"""

from __future__ import annotations

import torch

from moetrain.kernels._triton import cdiv, jit, next_power_of_2, runs_triton, tl
from moetrain.kernels.routing import Routing
from moetrain.kernels.row_stack import Place, rows_at

SCATTER_BLOCK, SUM_BLOCK = 2048, 1024
"""Columns of a program: the fastest of 512 to 4096 on an H200, at 3.6 and 4.1 TB/s."""


def permute(x_TH: torch.Tensor, weights_TK: torch.Tensor | None, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [R, H] in expert order, and the routing weight of each row [R] in fp32 (empty without weights).

    The backward sums the K rows of a token in fp32, in the order of k: no atomics, the same bits every time.
    """
    rows_RH, weights_R = _permute_op(x_TH, weights_TK, routing.row_TK, routing.slot_R.numel())
    return rows_RH, weights_R


def unpermute_reduce(rows_RH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sum of the rows of each token [T, H], accumulated in fp32; a slot without a row adds nothing."""
    out_TH: torch.Tensor = _unpermute_reduce_op(rows_RH, None, routing.row_TK)[0]
    return out_TH


def permute_ref(
    x_TH: torch.Tensor, weights_TK: torch.Tensor | None, row_TK: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`permute` in plain torch; rows without a slot are zero."""
    top_k = row_TK.shape[1]
    row_N = row_TK.reshape(-1).long()
    row_N = torch.where(row_N < 0, num_rows, row_N)
    token_N = torch.arange(row_N.numel(), device=row_N.device) // top_k
    rows_RH = x_TH.new_zeros(num_rows + 1, x_TH.shape[1]).index_copy(0, row_N, x_TH[token_N])[:num_rows]
    if weights_TK is None:
        return rows_RH, x_TH.new_empty(0, dtype=torch.float32)
    dtype = torch.promote_types(weights_TK.dtype, torch.float32)
    weights_R = weights_TK.new_zeros(num_rows + 1, dtype=dtype)
    return rows_RH, weights_R.index_copy(0, row_N, weights_TK.reshape(-1).to(dtype))[:num_rows]


def unpermute_reduce_ref(
    rows_RH: torch.Tensor, weights_R: torch.Tensor | None, row_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`unpermute_reduce` in plain torch, and the weights of each token's rows [T, K] (empty without weights)."""
    here_TK = row_TK >= 0
    index_TK = row_TK.clamp(min=0).long()
    if rows_RH.shape[0] == 0:
        out_TH = rows_RH.new_zeros(row_TK.shape[0], rows_RH.shape[1])
        return out_TH, rows_RH.new_zeros(row_TK.shape if weights_R is not None else 0, dtype=torch.float32)
    dtype = torch.promote_types(rows_RH.dtype, torch.float32)
    rows_TKH = rows_RH[index_TK].to(dtype).masked_fill(~here_TK[..., None], 0.0)
    out_TH = rows_TKH.sum(dim=1).to(rows_RH.dtype)
    if weights_R is None:
        return out_TH, rows_RH.new_empty(0, dtype=torch.float32)
    return out_TH, weights_R[index_TK].masked_fill(~here_TK, 0.0)


def permute_rows(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor | None,
    row_TK: torch.Tensor,
    num_rows: int,
    place: Place | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`permute` without autograd, from `Routing.row_TK` alone.

    Args:
        place: where the rows go (not the weights): they begin `place.at` rows after the result. None makes room.
    """
    tokens, hidden = x_TH.shape
    at = None if place is None else place.at
    if not runs_triton(x_TH) or num_rows == 0 or x_TH.numel() == 0:
        rows_RH, weights_R = permute_ref(x_TH, weights_TK, row_TK, num_rows)
        if place is None:
            return rows_RH, weights_R
        placed_RH = place.rows("rows", num_rows, hidden, x_TH.dtype)
        rows_at(placed_RH, at).copy_(rows_RH)
        return placed_RH, weights_R
    x_TH = x_TH.contiguous()
    rows_RH = x_TH.new_empty(num_rows, hidden) if place is None else place.rows("rows", num_rows, hidden, x_TH.dtype)
    weights_R = x_TH.new_empty(num_rows if weights_TK is not None else 0, dtype=torch.float32)
    block = min(next_power_of_2(hidden), SCATTER_BLOCK)
    _scatter_tokens[(tokens, cdiv(hidden, block))](
        x_TH,
        None if weights_TK is None else weights_TK.contiguous(),
        row_TK.contiguous(),
        rows_RH,
        at,
        weights_R,
        hidden,
        TOP_K=row_TK.shape[1],
        PAD_K=next_power_of_2(row_TK.shape[1]),
        BLOCK=block,
        num_warps=4,
    )
    return rows_RH, weights_R


def sum_rows(
    rows_RH: torch.Tensor, weights_R: torch.Tensor | None, row_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`unpermute_reduce` without autograd, and `unpermute_reduce_ref`'s second result."""
    if not runs_triton(rows_RH) or row_TK.numel() == 0 or rows_RH.numel() == 0:
        return unpermute_reduce_ref(rows_RH, weights_R, row_TK)
    rows_RH = rows_RH.contiguous()
    tokens, top_k = row_TK.shape
    hidden = rows_RH.shape[1]
    out_TH = rows_RH.new_empty(tokens, hidden)
    weights_TK = rows_RH.new_empty((tokens, top_k) if weights_R is not None else 0, dtype=torch.float32)
    block = min(next_power_of_2(hidden), SUM_BLOCK)
    _sum_rows[(tokens, cdiv(hidden, block))](
        rows_RH,
        weights_R,
        row_TK.contiguous(),
        out_TH,
        weights_TK,
        hidden,
        TOP_K=top_k,
        BLOCK=block,
        num_warps=8,
    )
    return out_TH, weights_TK


@torch.library.custom_op("moetrain::permute", mutates_args=())
def _permute_op(
    x_TH: torch.Tensor, weights_TK: torch.Tensor | None, row_TK: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return permute_rows(x_TH, weights_TK, row_TK, num_rows)


_unpermute_reduce_op = torch.library.custom_op("moetrain::unpermute_reduce", sum_rows, mutates_args=())


@_permute_op.register_fake
def _(
    x_TH: torch.Tensor, weights_TK: torch.Tensor | None, row_TK: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    weights_R = x_TH.new_empty(num_rows if weights_TK is not None else 0, dtype=torch.float32)
    return x_TH.new_empty(num_rows, x_TH.shape[1]), weights_R


@_unpermute_reduce_op.register_fake
def _(rows_RH: torch.Tensor, weights_R: torch.Tensor | None, row_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights_TK = rows_RH.new_empty(row_TK.shape if weights_R is not None else 0, dtype=torch.float32)
    return rows_RH.new_empty(row_TK.shape[0], rows_RH.shape[1]), weights_TK


def _permute_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, weights_TK, row_TK, _ = inputs
    ctx.weights_dtype = None if weights_TK is None else weights_TK.dtype
    ctx.save_for_backward(row_TK)
    ctx.set_materialize_grads(False)


def _permute_backward(ctx, grad_rows_RH, grad_weights_R):  # type: ignore[no-untyped-def]
    (row_TK,) = ctx.saved_tensors
    weighted = ctx.weights_dtype is not None and grad_weights_R is not None
    grad_x_TH, grad_TK = _unpermute_reduce_op(grad_rows_RH, grad_weights_R if weighted else None, row_TK)
    return grad_x_TH, grad_TK.to(ctx.weights_dtype) if weighted else None, None, None


def _unpermute_reduce_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rows_RH, _, row_TK = inputs
    ctx.num_rows = rows_RH.shape[0]
    ctx.save_for_backward(row_TK)
    ctx.set_materialize_grads(False)


def _unpermute_reduce_backward(ctx, grad_out_TH, _):  # type: ignore[no-untyped-def]
    (row_TK,) = ctx.saved_tensors
    grad_rows_RH, _ = _permute_op(grad_out_TH, None, row_TK, ctx.num_rows)
    return grad_rows_RH, None, None


_permute_op.register_autograd(_permute_backward, setup_context=_permute_setup)
_unpermute_reduce_op.register_autograd(_unpermute_reduce_backward, setup_context=_unpermute_reduce_setup)


@jit
def _scatter_tokens(  # type: ignore[no-untyped-def]
    x_TH,
    weights_TK,
    row_TK,
    rows_RH,
    at,
    weights_R,
    hidden,
    TOP_K: tl.constexpr,
    PAD_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read a token once, write it to its K rows: T * H read, T * K * H written. Tokens without a row are not read."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PAD_K)
    if tl.max(tl.load(row_TK + token * TOP_K + k, mask=k < TOP_K, other=-1), 0) < 0:
        return
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_H = tl.load(x_TH + token * hidden + h, mask=h < hidden)
    if at is not None:
        rows_RH += tl.load(at) * hidden
    for k in tl.static_range(TOP_K):
        row = tl.load(row_TK + token * TOP_K + k).to(tl.int64)
        tl.store(rows_RH + row * hidden + h, x_H, mask=(h < hidden) & (row >= 0))
        if weights_TK is not None:  # noqa: SIM102 - decided at compile time
            if (row >= 0) & (tl.program_id(1) == 0):
                tl.store(weights_R + row, tl.load(weights_TK + token * TOP_K + k).to(tl.float32))


@jit
def _sum_rows(  # type: ignore[no-untyped-def]
    rows_RH, weights_R, row_TK, out_TH, weights_TK, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the K rows of a token in fp32, and collect the weights of those rows: T * K * H read, T * H written."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_H = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_TK + token * TOP_K + k).to(tl.int64)
        sum_H += tl.load(rows_RH + row * hidden + h, mask=(h < hidden) & (row >= 0), other=0.0).to(tl.float32)
        if weights_R is not None:  # noqa: SIM102 - decided at compile time
            if tl.program_id(1) == 0:
                weight = tl.load(weights_R + row, mask=row >= 0, other=0.0)
                tl.store(weights_TK + token * TOP_K + k, weight)
    tl.store(out_TH + token * hidden + h, sum_H.to(out_TH.dtype.element_ty), mask=h < hidden)
