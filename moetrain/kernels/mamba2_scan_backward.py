"""Kernels of the Mamba-2 scan, backward (mamba2.py says what is computed and what the letters mean).

The gradient of y, and that of the state that a chunk ends with, give all others. A decay is the exponential of a sum of
dt A, and the gradient of the sum is what flows into the terms that it weighs. Those are added up by pairs of tokens, in
fp32. The differences of y * grad_y and x * grad_x would be the same numbers without the pairs, but where a head forgets
quickly they drown in the rounding of y.
"""

from __future__ import annotations

from typing import Any

import torch

from moetrain.kernels._triton import TensorDescriptor, cdiv, jit, next_power_of_2, tl
from moetrain.kernels.mamba2_scan import (
    Tiles,
    by_head,
    chunk_documents,
    chunk_states,
    load_tile,
    readable,
    softplus,
    state_descriptor,
    store_tile,
    time_steps,
)


def scan_backward(
    grad_BSHP: torch.Tensor,
    x_BSHP: torch.Tensor,
    dt_BSH: torch.Tensor,
    A_H: torch.Tensor,
    B_BSGN: torch.Tensor,
    C_BSGN: torch.Tensor,
    D_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    seq_idx_BS: torch.Tensor | None,
    low: float,
    high: float,
    size: Tiles,
) -> list[torch.Tensor]:
    """Gradients of x, dt, A, B, C, D and dt_bias, each in the dtype of what it belongs to."""
    x_BSHP, B_BSGN, C_BSGN, grad_BSHP = (readable(tensor) for tensor in (x_BSHP, B_BSGN, C_BSGN, grad_BSHP))
    seq_idx_BS = None if seq_idx_BS is None else seq_idx_BS.contiguous()
    rows, tokens, heads, _ = x_BSHP.shape
    groups, programs = B_BSGN.shape[2], heads // size.heads
    steps = time_steps(dt_BSH, A_H, dt_bias_H, low, high, size.chunk)
    states, _ = chunk_states(x_BSHP, B_BSGN, *steps, seq_idx_BS, size)
    grad_states, through_TBHK = chunk_states(grad_BSHP, C_BSGN, *steps, seq_idx_BS, size, states)
    chunks = steps[0].shape[2]
    grid, counts = (chunks, programs, rows), (tokens, heads, heads // groups)
    options = {
        "HEADS": size.heads,
        "CHUNK": size.chunk,
        "TILE_P": size.p,
        "TILE_N": size.n,
        "num_warps": size.warps,
        "num_stages": size.stages,
    }
    grad_x_BSHP = torch.empty(x_BSHP.shape, dtype=x_BSHP.dtype, device=x_BSHP.device)
    grad_BC_KRLL = x_BSHP.new_empty(rows * chunks, programs, size.chunk, size.chunk)
    grad_BC = TensorDescriptor.from_tensor(grad_BC_KRLL, [1, 1, size.chunk, size.chunk])
    grad_dt_BHKL, grad_ends_BHKL, leaving_BHKL, read_BHKL = (torch.empty_like(steps[0]) for _ in range(4))
    grad_D_BKH = steps[0].new_empty(rows, chunks, heads)
    _gradients[grid](
        by_head(grad_BSHP, size.chunk, size.p),
        by_head(x_BSHP, size.chunk, size.p),
        by_head(B_BSGN, size.chunk, size.n),
        by_head(C_BSGN, size.chunk, size.n),
        D_H,
        *steps,
        state_descriptor(grad_states, size.n, size.p),
        seq_idx_BS,
        by_head(grad_x_BSHP, size.chunk, size.p),
        grad_BC,
        grad_dt_BHKL,
        grad_ends_BHKL,
        leaving_BHKL,
        grad_D_BKH,
        *counts,
        **options,
    )

    def group_gradient(x: torch.Tensor, other: torch.Tensor, given: torch.Tensor, read: torch.Tensor | None) -> Any:
        # the heads of a group that share a program are summed there, and the programs of a group here
        dtype = other.dtype if programs == groups else torch.float32
        part = torch.empty(rows, tokens, programs, other.shape[3], dtype=dtype, device=other.device)
        _group_gradients[grid](
            by_head(x, size.chunk, size.p),
            by_head(other, size.chunk, size.n),
            by_head(C_BSGN, size.chunk, size.n),
            *steps,
            state_descriptor(given, size.n, size.p),
            grad_BC,
            seq_idx_BS,
            by_head(part, size.chunk, size.n),
            read,
            *counts,
            **options,
        )
        return part if programs == groups else part.unflatten(2, (groups, -1)).sum(3).to(other.dtype)

    grad_B_BSGN = group_gradient(x_BSHP, C_BSGN, grad_states, None)
    grad_C_BSGN = group_gradient(grad_BSHP, B_BSGN, states, read_BHKL)
    flows = (grad_dt_BHKL, grad_ends_BHKL, leaving_BHKL, read_BHKL, through_TBHK)
    grad_dt_BSH, grad_A_H, grad_bias_H = _time_step_gradients(flows, dt_BSH, A_H, dt_bias_H, low, high)
    grad_D_H = grad_D_BKH.flatten(0, 1).sum(0).to(D_H.dtype)
    return [grad_x_BSHP, grad_dt_BSH, grad_A_H, grad_B_BSGN, grad_C_BSGN, grad_D_H, grad_bias_H]


def _time_step_gradients(
    flows: tuple[torch.Tensor, ...],
    dt_BSH: torch.Tensor,
    A_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of dt, A and dt_bias from what flows into the time steps and the sums of dt A."""
    rows, heads, chunks, chunk = flows[0].shape
    grad_dt_BSH = torch.empty(dt_BSH.shape, dtype=dt_BSH.dtype, device=dt_BSH.device)
    grad_A_BKH, grad_bias_BKH = (flows[0].new_empty(rows, chunks, heads) for _ in range(2))
    tile_h = min(next_power_of_2(heads), 16)
    _time_steps_backward[(chunks, cdiv(heads, tile_h), rows)](
        *flows,
        dt_BSH,
        A_H,
        dt_bias_H,
        grad_dt_BSH,
        grad_A_BKH,
        grad_bias_BKH,
        *dt_BSH.stride(),
        dt_BSH.shape[1],
        heads,
        flows[-1].shape[0],
        low,
        high,
        CHUNK=chunk,
        TILE_H=tile_h,
        num_warps=4,
    )
    grad_A_H, grad_bias_H = (part.flatten(0, 1).sum(0) for part in (grad_A_BKH, grad_bias_BKH))
    return grad_dt_BSH, grad_A_H.to(A_H.dtype), grad_bias_H.to(dt_bias_H.dtype)


@jit
def _gradients(  # type: ignore[no-untyped-def]
    grad_BHSP,
    x_BHSP,
    B_BGSN,
    C_BGSN,
    D_H,
    dt_BHKL,
    ends_BHKL,
    grad_states_KHNP,
    seq_idx_BS,
    grad_x_BHSP,
    grad_BC_KRLL,
    grad_dt_BHKL,
    grad_ends_BHKL,
    leaving_BHKL,
    grad_D_BKH,
    tokens,
    heads,
    heads_per_group,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """One chunk of HEADS heads. Rows of the L x L tiles are sources and columns targets, so that no product inside of
    the loop needs a tile turned over.

    Written are the gradients of x, of B C^T summed over the heads, of dt as the weight of x, of D, and of the sums of
    dt A: `grad_ends` by pairs of tokens, `leaving` what each token adds to the state at the chunk's end.
    """
    chunk, chunks, row = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    first_head = tl.program_id(1) * HEADS
    group = first_head // heads_per_group
    at_L = tl.arange(0, CHUNK)
    document_L, _, last = chunk_documents(seq_idx_BS, row, chunk, tokens, CHUNK)
    B_LN = load_tile(B_BGSN, row, group, chunk * CHUNK, 0, CHUNK, TILE_N)
    C_LN = load_tile(C_BGSN, row, group, chunk * CHUNK, 0, CHUNK, TILE_N)
    BC_st = tl.dot(B_LN, tl.trans(C_LN), input_precision="ieee")
    sees_st = (at_L[:, None] <= at_L[None, :]) & (document_L[:, None] == document_L[None, :])
    grad_BC_st = tl.zeros((CHUNK, CHUNK), tl.float32)
    for head in range(first_head, first_head + HEADS):
        vector = ((row.to(tl.int64) * heads + head) * chunks + chunk) * CHUNK
        ends_L = tl.load(ends_BHKL + vector + at_L)
        dt_L = tl.load(dt_BHKL + vector + at_L)
        total = tl.load(ends_BHKL + vector + CHUNK - 1)
        x_LP = load_tile(x_BHSP, row, head, chunk * CHUNK, 0, CHUNK, TILE_P)
        grad_LP = load_tile(grad_BHSP, row, head, chunk * CHUNK, 0, CHUNK, TILE_P)
        grad_state_NP = load_tile(grad_states_KHNP, row * chunks + chunk, head, 0, 0, TILE_N, TILE_P)
        decay_st = tl.where(sees_st, tl.exp(ends_L[None, :] - ends_L[:, None]), 0.0)
        x_grad_st = tl.dot(x_LP, tl.trans(grad_LP), input_precision="ieee")
        grad_D = tl.sum(tl.where(at_L[:, None] == at_L[None, :], x_grad_st, 0.0))
        tl.store(grad_D_BKH + (row.to(tl.int64) * chunks + chunk) * heads + head, grad_D)
        x_grad_st *= decay_st * dt_L[:, None]
        grad_BC_st += x_grad_st
        pairs_st = tl.where(at_L[:, None] < at_L[None, :], x_grad_st * BC_st, 0.0)
        tl.store(grad_ends_BHKL + vector + at_L, tl.sum(pairs_st, 0) - tl.sum(pairs_st, 1))

        kept_L = tl.where(document_L == last, tl.exp(total - ends_L), 0.0)
        into_LP = tl.dot(B_LN, grad_state_NP, input_precision="ieee") * kept_L[:, None]
        tl.store(leaving_BHKL + vector + at_L, dt_L * tl.sum(x_LP.to(tl.float32) * into_LP, 1))
        into_LP = tl.dot((BC_st * decay_st).to(grad_LP.dtype), grad_LP, into_LP, input_precision="ieee")
        tl.store(grad_dt_BHKL + vector + at_L, tl.sum(x_LP.to(tl.float32) * into_LP, 1))
        into_LP = into_LP * dt_L[:, None] + tl.load(D_H + head).to(tl.float32) * grad_LP.to(tl.float32)
        store_tile(grad_x_BHSP, row, head, chunk * CHUNK, 0, into_LP, CHUNK, TILE_P)
    store_tile(grad_BC_KRLL, row * chunks + chunk, tl.program_id(1), 0, 0, grad_BC_st, CHUNK, CHUNK)


@jit
def _group_gradients(  # type: ignore[no-untyped-def]
    x_BHSP,
    B_BGSN,
    C_BGSN,
    dt_BHKL,
    ends_BHKL,
    states_KHNP,
    grad_BC_KRLL,
    seq_idx_BS,
    out_BRSN,
    read_BHKL,
    tokens,
    heads,
    heads_per_group,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Gradient of B, from x, C and the gradient of the states; with `read`, of C, from the gradient of y, B and the
    states. Summed over HEADS heads of one chunk. `read` gets the gradient of the sums of dt A by what each token reads
    of the state at the chunk's start."""
    chunk, chunks, row = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    first_head = tl.program_id(1) * HEADS
    group = first_head // heads_per_group
    at_L = tl.arange(0, CHUNK)
    document_L, before, last = chunk_documents(seq_idx_BS, row, chunk, tokens, CHUNK)
    B_LN = load_tile(B_BGSN, row, group, chunk * CHUNK, 0, CHUNK, TILE_N)
    grad_BC_st = load_tile(grad_BC_KRLL, row * chunks + chunk, tl.program_id(1), 0, 0, CHUNK, CHUNK)
    if read_BHKL is None:
        sum_LN = tl.dot(grad_BC_st, B_LN, input_precision="ieee")
    else:
        sum_LN = tl.dot(tl.trans(grad_BC_st), B_LN, input_precision="ieee")
        C_LN = load_tile(C_BGSN, row, group, chunk * CHUNK, 0, CHUNK, TILE_N)
    for head in range(first_head, first_head + HEADS):
        vector = ((row.to(tl.int64) * heads + head) * chunks + chunk) * CHUNK
        ends_L = tl.load(ends_BHKL + vector + at_L)
        x_LP = load_tile(x_BHSP, row, head, chunk * CHUNK, 0, CHUNK, TILE_P)
        state_NP = load_tile(states_KHNP, row * chunks + chunk, head, 0, 0, TILE_N, TILE_P)
        if read_BHKL is None:
            weight_L = tl.exp(tl.load(ends_BHKL + vector + CHUNK - 1) - ends_L) * tl.load(dt_BHKL + vector + at_L)
            weight_L = tl.where(document_L == last, weight_L, 0.0)
            x_LP = (x_LP.to(tl.float32) * weight_L[:, None]).to(state_NP.dtype)
            sum_LN = tl.dot(x_LP, tl.trans(state_NP), sum_LN, input_precision="ieee")
        else:
            part_LN = tl.dot(x_LP, tl.trans(state_NP), input_precision="ieee")
            part_LN *= tl.where(document_L == before, tl.exp(ends_L), 0.0)[:, None]
            tl.store(read_BHKL + vector + at_L, tl.sum(C_LN.to(tl.float32) * part_LN, 1))
            sum_LN += part_LN
    store_tile(out_BRSN, row, tl.program_id(1), chunk * CHUNK, 0, sum_LN, CHUNK, TILE_N)


@jit
def _time_steps_backward(  # type: ignore[no-untyped-def]
    grad_dt_BHKL,
    grad_ends_BHKL,
    leaving_BHKL,
    read_BHKL,
    through_TBHK,
    dt_BSH,
    A_H,
    bias_H,
    grad_raw_BSH,
    grad_A_BKH,
    grad_bias_BKH,
    stride_b,
    stride_s,
    stride_h,
    tokens,
    heads,
    parts,
    low,
    high,
    CHUNK: tl.constexpr,
    TILE_H: tl.constexpr,
):
    """From the gradients of dt, as the weight of x, and of the sums of dt A to those of what dt was made of."""
    chunk, chunks, row = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    head_H = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    head_1H = head_H[None, :]
    at_L1 = tl.arange(0, CHUNK)[:, None]
    token_L1 = chunk * CHUNK + at_L1
    mask = (token_L1 < tokens) & (head_1H < heads)
    raw = tl.load(dt_BSH + row * stride_b + token_L1.to(tl.int64) * stride_s + head_1H * stride_h, mask=mask, other=0.0)
    raw = raw.to(tl.float32) + tl.load(bias_H + head_1H, mask=head_1H < heads, other=0.0).to(tl.float32)
    dt = softplus(raw)
    inside = mask & (dt >= low) & (dt <= high)
    dt = tl.where(mask, tl.minimum(tl.maximum(dt, low), high), 0.0)
    A = tl.load(A_H + head_1H, mask=head_1H < heads, other=0.0).to(tl.float32)

    # a token's dt A is in every sum from it on, and weighs what earlier tokens leave at the chunk's end
    vector = (row * heads + head_H) * chunks + chunk
    at = vector[None, :] * CHUNK + at_L1
    grad_ends = tl.load(grad_ends_BHKL + at, mask=mask, other=0.0) + tl.load(read_BHKL + at, mask=mask, other=0.0)
    leaving = tl.load(leaving_BHKL + at, mask=mask, other=0.0)
    through_H = tl.zeros((TILE_H,), tl.float32)
    for part in range(parts):
        place = part * tl.num_programs(2) * heads * chunks + vector
        through_H += tl.load(through_TBHK + place, mask=head_H < heads, other=0.0)
    grad_step = tl.cumsum(grad_ends, 0, reverse=True) + tl.cumsum(leaving, 0) - leaving + through_H[None, :]

    grad_raw = tl.load(grad_dt_BHKL + at, mask=mask, other=0.0) + grad_step * A
    grad_raw = tl.where(inside, grad_raw * tl.sigmoid(raw), 0.0)
    out = grad_raw_BSH + (row * tokens + token_L1) * heads + head_1H
    tl.store(out, grad_raw.to(grad_raw_BSH.dtype.element_ty), mask=mask)
    sums = (row * chunks + chunk) * heads + head_H
    tl.store(grad_A_BKH + sums, tl.sum(grad_step * dt, 0), mask=head_H < heads)
    tl.store(grad_bias_BKH + sums, tl.sum(grad_raw, 0), mask=head_H < heads)
