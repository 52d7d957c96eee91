"""Kernels of the Mamba-2 scan, forward (mamba2.py says what is computed and what the letters mean).

Inside a chunk the scan is a product of the chunk's own tokens weighed by their decay, as attention without softmax; of
the states only those at the chunks' starts are written to memory: at P = 64, N = 128 twice as many numbers as x has.
A state is carried in fp32 and rounded where it meets the tensor cores. Tiles come and go by the copy engine (TMA): it
needs no registers for addresses, and ends at a row's last token by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moetrain.kernels._triton import TensorDescriptor, cdiv, jit, next_power_of_2, tl

MAX_HEADS = 8
"""Heads of a group that one program works through: the product of B and C is made once for them."""


class Tiles(NamedTuple):
    """Sizes that the kernels are compiled for."""

    chunk: int
    """Tokens of a chunk. With 128 fewer states are written, but the L x L tiles then fill the registers of 8 warps."""
    p: int
    n: int
    """head_dim and state size, rounded up to powers of two, at least 16."""
    heads: int
    """Heads of one group that a program works through."""
    stages: int
    """Heads whose tiles are on their way or in use at a time."""
    warps: int


def tiles(x_BSHP: torch.Tensor, B_BSGN: torch.Tensor) -> Tiles:
    heads_per_group = x_BSHP.shape[2] // B_BSGN.shape[2]
    heads = max(n for n in range(1, MAX_HEADS + 1) if heads_per_group % n == 0)
    p, n = (max(next_power_of_2(size), 16) for size in (x_BSHP.shape[3], B_BSGN.shape[3]))
    half = x_BSHP.element_size() == 2
    return Tiles(64 if half else 32, p, n, heads, stages=2 if half and n <= 128 else 1, warps=4 if half else 8)


def scan_forward(
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
) -> torch.Tensor:
    """`chunk_scan` on tensors that Triton can work on, without autograd."""
    x_BSHP, B_BSGN, C_BSGN = readable(x_BSHP), readable(B_BSGN), readable(C_BSGN)
    seq_idx_BS = None if seq_idx_BS is None else seq_idx_BS.contiguous()
    dt_BHKL, ends_BHKL = time_steps(dt_BSH, A_H, dt_bias_H, low, high, size.chunk)
    states_BKHNP, _ = chunk_states(x_BSHP, B_BSGN, dt_BHKL, ends_BHKL, seq_idx_BS, size)
    (rows, tokens, heads, _), groups = x_BSHP.shape, B_BSGN.shape[2]
    y_BSHP = torch.empty(x_BSHP.shape, dtype=x_BSHP.dtype, device=x_BSHP.device)
    _outputs[(dt_BHKL.shape[2], heads // size.heads, rows)](
        by_head(x_BSHP, size.chunk, size.p),
        by_head(B_BSGN, size.chunk, size.n),
        by_head(C_BSGN, size.chunk, size.n),
        D_H,
        dt_BHKL,
        ends_BHKL,
        state_descriptor(states_BKHNP, size.n, size.p),
        seq_idx_BS,
        by_head(y_BSHP, size.chunk, size.p),
        tokens,
        heads,
        heads // groups,
        HEADS=size.heads,
        CHUNK=size.chunk,
        TILE_P=size.p,
        TILE_N=size.n,
        num_warps=size.warps,
        num_stages=size.stages,
    )
    return y_BSHP


def can_read(head_dim: int, state: int, itemsize: int) -> bool:
    """Whether the copy engine can address heads and groups of these widths: multiples of 16 bytes."""
    return head_dim * itemsize % 16 == 0 and state * itemsize % 16 == 0


def readable(x: torch.Tensor) -> torch.Tensor:
    """[B, S, heads, width] as the copy engine can read it: itself, or a copy where an address is no multiple of 16."""
    strides = [stride * x.element_size() for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def by_head(x: torch.Tensor, tokens: int, width: int) -> Any:
    """Descriptor of [B, S, heads, width] that yields a tile of one head, zero past its last token and number."""
    rows, length, heads, full = x.shape
    strides = [stride if size > 1 else 16 for stride, size in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(
        x, [rows, heads, length, full], [strides[0], strides[2], strides[1], 1], [1, 1, tokens, width]
    )


def state_descriptor(states_BKHNP: torch.Tensor, n: int, p: int) -> Any:
    """Descriptor that yields a tile of one head's state at the start of one chunk (of all rows' chunks)."""
    return TensorDescriptor.from_tensor(states_BKHNP.flatten(0, 1), [1, 1, n, p])


def time_steps(
    dt_BSH: torch.Tensor, A_H: torch.Tensor, dt_bias_H: torch.Tensor, low: float, high: float, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Time steps, and sums of dt A from the chunk's start through each token, both fp32 [B, H, K, L].

    Tokens past the row have a time step of zero.
    """
    rows, tokens, heads = dt_BSH.shape
    chunks, tile_h = cdiv(tokens, chunk), min(next_power_of_2(heads), 16)
    dt_BHKL = torch.empty(rows, heads, chunks, chunk, dtype=torch.float32, device=dt_BSH.device)
    ends_BHKL = torch.empty_like(dt_BHKL)
    _time_steps[(chunks, cdiv(heads, tile_h), rows)](
        dt_BSH,
        A_H,
        dt_bias_H,
        dt_BHKL,
        ends_BHKL,
        *dt_BSH.stride(),
        tokens,
        heads,
        low,
        high,
        CHUNK=chunk,
        TILE_H=tile_h,
        num_warps=4,
    )
    return dt_BHKL, ends_BHKL


def chunk_states(
    x_BSHP: torch.Tensor,
    B_BSGN: torch.Tensor,
    dt_BHKL: torch.Tensor,
    ends_BHKL: torch.Tensor,
    seq_idx_BS: torch.Tensor | None,
    size: Tiles,
    forward_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that each chunk starts from [B, K, H, N, P], in the dtype of x.

    With `forward_states`, x and B are the gradient of y and C, and the result the gradient of the state that each chunk
    ends with: the same walk from the last chunk to the first, tokens weighed by their decay from the chunk's start.
    Beside it, in fp32 [T, B, H, K] and for T parts of a state, that gradient times what is left of the state that the
    chunk started from: the gradient of the chunk's whole sum of dt A, as far as the state passes through.
    """
    (rows, tokens, heads, head_dim), (groups, state) = x_BSHP.shape, B_BSGN.shape[2:]
    chunks, reverse = dt_BHKL.shape[2], forward_states is not None
    states_BKHNP = torch.empty(rows, chunks, heads, state, head_dim, dtype=x_BSHP.dtype, device=x_BSHP.device)
    tile_n, tile_p = min(size.n, 64), min(size.p, 32)  # 4 programs a head at N = 128, P = 64
    parts = cdiv(state, tile_n) * cdiv(head_dim, tile_p)
    through_TBHK = torch.empty(parts if reverse else 0, rows, heads, chunks, dtype=torch.float32, device=x_BSHP.device)
    _states[(parts, heads, rows)](
        by_head(x_BSHP, size.chunk, tile_p),
        by_head(B_BSGN, size.chunk, tile_n),
        dt_BHKL,
        ends_BHKL,
        seq_idx_BS,
        state_descriptor(states_BKHNP, tile_n, tile_p),
        None if forward_states is None else state_descriptor(forward_states, tile_n, tile_p),
        through_TBHK,
        tokens,
        chunks,
        cdiv(head_dim, tile_p),
        heads // groups,
        CHUNK=size.chunk,
        TILE_P=tile_p,
        TILE_N=tile_n,
        num_warps=4,
        num_stages=size.stages + 1,
    )
    return states_BKHNP, through_TBHK


@jit
def softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)); the quotient takes back what 1 + exp(x) rounds off where exp(x) is small."""
    small = tl.exp(tl.minimum(x, 20.0))
    more = 1.0 + small
    return tl.where(x > 20.0, x, tl.where(more == 1.0, small, tl.log(more) * (small / (more - 1.0))))


@jit
def _time_steps(  # type: ignore[no-untyped-def]
    dt_BSH,
    A_H,
    bias_H,
    dt_BHKL,
    ends_BHKL,
    stride_b,
    stride_s,
    stride_h,
    tokens,
    heads,
    low,
    high,
    CHUNK: tl.constexpr,
    TILE_H: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head_1H = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)[None, :]
    at_L1 = tl.arange(0, CHUNK)[:, None]
    token_L1 = chunk * CHUNK + at_L1
    mask = (token_L1 < tokens) & (head_1H < heads)
    raw = tl.load(dt_BSH + row * stride_b + token_L1.to(tl.int64) * stride_s + head_1H * stride_h, mask=mask, other=0.0)
    raw = raw.to(tl.float32) + tl.load(bias_H + head_1H, mask=head_1H < heads, other=0.0).to(tl.float32)
    dt = tl.where(mask, tl.minimum(tl.maximum(softplus(raw), low), high), 0.0)
    ends = tl.cumsum(dt * tl.load(A_H + head_1H, mask=head_1H < heads, other=0.0).to(tl.float32), 0)
    out = ((row * heads + head_1H) * tl.num_programs(0) + chunk) * CHUNK + at_L1
    tl.store(dt_BHKL + out, dt, mask=head_1H < heads)
    tl.store(ends_BHKL + out, ends, mask=head_1H < heads)


@jit
def chunk_documents(seq_idx_BS, row, chunk, tokens, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Documents of the chunk's tokens [L], of the token before the chunk and of its last one; zeros without any."""
    token_L = chunk * CHUNK + tl.arange(0, CHUNK)
    if seq_idx_BS is not None:
        seq_idx_S = seq_idx_BS + row.to(tl.int64) * tokens
        document_L = tl.load(seq_idx_S + token_L, mask=token_L < tokens, other=-1)
        before = tl.load(seq_idx_S + tl.maximum(chunk * CHUNK - 1, 0))
        last = tl.load(seq_idx_S + tl.minimum(chunk * CHUNK + CHUNK, tokens) - 1)
    else:
        document_L = token_L * 0
        before = chunk * 0
        last = chunk * 0
    return document_L, before, last


@jit
def load_tile(desc, i, j, k, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    return desc.load([i, j, k, n]).reshape(ROWS, COLUMNS)


@jit
def store_tile(desc, i, j, k, n, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    desc.store([i, j, k, n], tile.to(desc.dtype).reshape(1, 1, ROWS, COLUMNS))


@jit
def _states(  # type: ignore[no-untyped-def]
    x_BHSP,
    B_BGSN,
    dt_BHKL,
    ends_BHKL,
    seq_idx_BS,
    states_KHNP,
    forward_states_KHNP,
    through_TBHK,
    tokens,
    chunks,
    tiles_p,
    heads_per_group,
    CHUNK: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
):
    part, head, row, heads = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    n, p = (part // tiles_p) * TILE_N, (part % tiles_p) * TILE_P
    at_L = tl.arange(0, CHUNK)
    state_NP = tl.zeros((TILE_N, TILE_P), tl.float32)
    for step in range(chunks):
        chunk = step if forward_states_KHNP is None else chunks - 1 - step
        store_tile(states_KHNP, row * chunks + chunk, head, n, p, state_NP, TILE_N, TILE_P)
        document_L, before, last = chunk_documents(seq_idx_BS, row, chunk, tokens, CHUNK)
        vector = ((row.to(tl.int64) * heads + head) * chunks + chunk) * CHUNK
        ends_L = tl.load(ends_BHKL + vector + at_L)
        total = tl.load(ends_BHKL + vector + CHUNK - 1)
        state_NP *= tl.where(before == last, tl.exp(total), 0.0)
        if forward_states_KHNP is None:
            weight_L = tl.exp(total - ends_L) * tl.load(dt_BHKL + vector + at_L)
            weight_L = tl.where(document_L == last, weight_L, 0.0)
        else:
            weight_L = tl.where(document_L == before, tl.exp(ends_L), 0.0)
            forward_NP = load_tile(forward_states_KHNP, row * chunks + chunk, head, n, p, TILE_N, TILE_P)
            through = tl.sum(forward_NP.to(tl.float32) * state_NP)
            tl.store(through_TBHK + ((part * tl.num_programs(2) + row) * heads + head) * chunks + chunk, through)
        x_LP = load_tile(x_BHSP, row, head, chunk * CHUNK, p, CHUNK, TILE_P)
        B_LN = load_tile(B_BGSN, row, head // heads_per_group, chunk * CHUNK, n, CHUNK, TILE_N)
        x_LP = (x_LP.to(tl.float32) * weight_L[:, None]).to(B_LN.dtype)
        state_NP = tl.dot(tl.trans(B_LN), x_LP, state_NP, input_precision="ieee")


@jit
def _outputs(  # type: ignore[no-untyped-def]
    x_BHSP,
    B_BGSN,
    C_BGSN,
    D_H,
    dt_BHKL,
    ends_BHKL,
    states_KHNP,
    seq_idx_BS,
    y_BHSP,
    tokens,
    heads,
    heads_per_group,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """One chunk of HEADS heads."""
    chunk, chunks, row = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    first_head = tl.program_id(1) * HEADS
    group = first_head // heads_per_group
    at_L = tl.arange(0, CHUNK)
    document_L, before, _ = chunk_documents(seq_idx_BS, row, chunk, tokens, CHUNK)
    B_LN = load_tile(B_BGSN, row, group, chunk * CHUNK, 0, CHUNK, TILE_N)
    C_LN = load_tile(C_BGSN, row, group, chunk * CHUNK, 0, CHUNK, TILE_N)
    CB_ts = tl.dot(C_LN, tl.trans(B_LN), input_precision="ieee")
    sees_ts = (at_L[:, None] >= at_L[None, :]) & (document_L[:, None] == document_L[None, :])
    for head in range(first_head, first_head + HEADS):
        vector = ((row.to(tl.int64) * heads + head) * chunks + chunk) * CHUNK
        ends_L = tl.load(ends_BHKL + vector + at_L)
        dt_L = tl.load(dt_BHKL + vector + at_L)
        state_NP = load_tile(states_KHNP, row * chunks + chunk, head, 0, 0, TILE_N, TILE_P)
        x_LP = load_tile(x_BHSP, row, head, chunk * CHUNK, 0, CHUNK, TILE_P)
        carried_L = tl.where(document_L == before, tl.exp(ends_L), 0.0)
        y_LP = tl.dot(C_LN, state_NP, input_precision="ieee") * carried_L[:, None]
        decay_ts = tl.where(sees_ts, tl.exp(ends_L[:, None] - ends_L[None, :]), 0.0)
        scores_ts = (CB_ts * decay_ts * dt_L[None, :]).to(x_LP.dtype)
        y_LP = tl.dot(scores_ts, x_LP, y_LP, input_precision="ieee")
        y_LP += tl.load(D_H + head).to(tl.float32) * x_LP.to(tl.float32)
        store_tile(y_BHSP, row, head, chunk * CHUNK, 0, y_LP, CHUNK, TILE_P)
