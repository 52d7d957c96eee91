"""Kernels that store into the other GPUs' memory over NVLink, and those that read what arrived. exchange.py uses them.

Shapes: W ranks, T tokens of a rank, S = W*T tokens of all ranks in the order of ranks, K choices of a token (top_k),
H hidden, R rows of this rank's experts. `table`s are the addresses of a buffer on every rank, int64 [W].
"""

from __future__ import annotations

import torch

from moetrain.kernels._triton import cdiv, jit, next_power_of_2, tl

TOKEN_PROGRAMS, SUM_PROGRAMS = 132, 264
"""Programs that push tokens and sums when nothing else runs. Of 32 to 2,112 all from 64 and 132 on are within 5 % of
the best (8 H200): the links are the limit."""
SUM_BLOCK = 1024
"""Columns of a program's tile of sums."""


def push_choices(
    index_TK: torch.Tensor, weights_TK: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor, rank: int
) -> None:
    """Write this rank's choices and weights into every rank's [S, K]."""
    numbers = index_TK.numel()
    _push_choices[(choices.numel(), cdiv(numbers, 1024))](
        index_TK, weights_TK, choices, weights, rank, numbers, BLOCK=1024, num_warps=4
    )


def push_tokens(
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    sent: torch.Tensor,
    rank: int,
    local_experts: int,
    programs: int = TOKEN_PROGRAMS,
) -> None:
    """Write each token into [rank, token] of every rank that holds one of its experts."""
    tokens, hidden = x_TH.shape
    _push_tokens[(programs,)](
        x_TH.contiguous(),
        index_TK,
        sent,
        rank,
        tokens,
        hidden,
        local_experts,
        TOP_K=index_TK.shape[1],
        PAD_K=next_power_of_2(index_TK.shape[1]),
        WORLD=sent.numel(),
        PROGRAMS=programs,
        TILE_T=2,
        BLOCK=next_power_of_2(hidden),
        num_warps=8,
    )


def push_sums(
    rows_RH: torch.Tensor,
    weights_R: torch.Tensor | None,
    row_SK: torch.Tensor,
    returned: torch.Tensor,
    weight_grads: torch.Tensor,
    rank: int,
    programs: int = SUM_PROGRAMS,
) -> None:
    """Sum the rows of each token in fp32 and write it into [this rank, token] of the rank the token is from; with
    `weights_R`, those of its rows into [this rank, token, k]."""
    world, hidden = returned.numel(), rows_RH.shape[1]
    everyone, top_k = row_SK.shape
    block = min(next_power_of_2(hidden), SUM_BLOCK)
    _push_sums[(programs,)](
        rows_RH.contiguous(),
        weights_R,
        row_SK,
        returned,
        weight_grads,
        rank,
        everyone // world,
        hidden,
        TOP_K=top_k,
        PAD_K=next_power_of_2(top_k),
        WORLD=world,
        PAD_W=next_power_of_2(world),
        PROGRAMS=programs,
        BLOCK=block,
        TILES_H=cdiv(hidden, block),
        num_warps=4,
    )


def sum_partials(
    returned_SH: torch.Tensor,
    weights_SK: torch.Tensor | None,
    index_TK: torch.Tensor,
    local_experts: int,
    world: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum over the ranks of each token's experts [T, H] in fp32, in the order of ranks; with `weights_SK`, the weight
    of each choice from its expert's rank [T, K]."""
    tokens, top_k = index_TK.shape
    hidden = returned_SH.shape[1]
    out_TH = returned_SH.new_empty(tokens, hidden)
    weights_TK = None if weights_SK is None else weights_SK.new_empty(tokens, top_k)
    block = min(next_power_of_2(hidden), 1024)
    _sum_partials[(tokens, cdiv(hidden, block))](
        returned_SH,
        weights_SK,
        index_TK,
        out_TH,
        weights_TK,
        tokens,
        hidden,
        local_experts,
        TOP_K=top_k,
        WORLD=world,
        BLOCK=block,
        num_warps=4,
    )
    return out_TH, weights_TK


@jit
def _peer(table, peer, like):  # type: ignore[no-untyped-def]
    """Pointer to a rank's buffer, of the type of `like`, aligned for 16-byte stores."""
    return tl.multiple_of(tl.load(table + peer).to(like.dtype), 16)


@jit
def _push_choices(index_TK, weights_TK, choices, weights, rank, numbers, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_TK + n, mask=n < numbers)
    tl.store(_peer(choices, tl.program_id(0), index_TK) + rank * numbers + n, index, mask=n < numbers)
    weight = tl.load(weights_TK + n, mask=n < numbers)
    tl.store(_peer(weights, tl.program_id(0), weights_TK) + rank * numbers + n, weight, mask=n < numbers)


@jit
def _ranks_of(index_TK, token, local_experts, TOP_K: tl.constexpr, WORLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bit p is set if rank p holds an expert of the token."""
    ranks = tl.full((), 0, tl.int32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(index_TK + token * TOP_K + k)
        here = (expert >= 0) & (expert < WORLD * local_experts)
        ranks |= tl.where(here, tl.full((), 1, tl.int32) << (tl.where(here, expert, 0) // local_experts), 0)
    return ranks


@jit
def _push_tokens(  # type: ignore[no-untyped-def]
    x_TH,
    index_TK,
    sent,
    rank,
    tokens,
    hidden,
    local_experts,
    TOP_K: tl.constexpr,
    PAD_K: tl.constexpr,
    WORLD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k_1K = tl.arange(0, PAD_K)[None, :]
    h_1H = tl.arange(0, BLOCK)[None, :]
    stride = tl.cast(hidden, tl.int64)
    for start in range(tl.program_id(0) * TILE_T, tokens, PROGRAMS * TILE_T):
        token_T1 = (start + tl.arange(0, TILE_T))[:, None]
        expert_TK = tl.load(index_TK + token_T1 * TOP_K + k_1K, mask=(token_T1 < tokens) & (k_1K < TOP_K), other=-1)
        rank_TK = tl.where((expert_TK >= 0) & (expert_TK < WORLD * local_experts), expert_TK // local_experts, -1)
        x = tl.load(x_TH + token_T1 * stride + h_1H, mask=(token_T1 < tokens) & (h_1H < hidden))
        for step in tl.static_range(WORLD):
            peer = (rank + step) % WORLD  # each rank begins with itself, so no rank is everyone's target at once
            here_T1 = (tl.max((rank_TK == peer).to(tl.int32), 1) > 0)[:, None]
            at_T1 = (rank * tokens + token_T1) * stride
            tl.store(_peer(sent, peer, x_TH) + at_T1 + h_1H, x, mask=here_T1 & (h_1H < hidden))


@jit
def _push_sums(  # type: ignore[no-untyped-def]
    rows_RH,
    weights_R,
    row_SK,
    returned,
    weight_grads,
    rank,
    tokens,
    hidden,
    TOP_K: tl.constexpr,
    PAD_K: tl.constexpr,
    WORLD: tl.constexpr,
    PAD_W: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES_H: tl.constexpr,
):
    """One token number of all ranks at a time: as many rows in flight as there are ranks."""
    w = tl.arange(0, PAD_W)
    here_W1 = (w < WORLD)[:, None]
    source_W = (rank + w) % WORLD
    to_W1 = _peer(returned, source_W, rows_RH)[:, None]
    k_1K = tl.arange(0, PAD_K)[None, :]
    stride = tl.cast(hidden, tl.int64)
    for item in range(tl.program_id(0), tokens * TILES_H, PROGRAMS):
        token = item // TILES_H
        h_1H = ((item % TILES_H) * BLOCK + tl.arange(0, BLOCK))[None, :]
        slot_W1 = (source_W * tokens + token)[:, None] * TOP_K
        row_WK = tl.load(row_SK + slot_W1 + k_1K, mask=here_W1 & (k_1K < TOP_K), other=-1)
        sum_WH = tl.zeros((PAD_W, BLOCK), tl.float32)
        for k in tl.static_range(TOP_K):
            row_W1 = tl.sum(tl.where(k_1K == k, row_WK, 0), 1)[:, None]
            mask_WH = (row_W1 >= 0) & (h_1H < hidden)
            sum_WH += tl.load(rows_RH + row_W1 * stride + h_1H, mask=mask_WH, other=0.0).to(tl.float32)
        mask_WH = (tl.max(row_WK, 1) >= 0)[:, None] & (h_1H < hidden)
        to = to_W1 + (rank * tokens + token) * stride + h_1H
        tl.store(to, sum_WH.to(rows_RH.dtype.element_ty), mask=mask_WH)
        if weights_R is not None:  # noqa: SIM102 - decided at compile time
            if item % TILES_H == 0:
                weight_WK = tl.load(weights_R + row_WK, mask=row_WK >= 0, other=0.0)
                weight_to = _peer(weight_grads, source_W, weights_R)[:, None] + (rank * tokens + token) * TOP_K + k_1K
                tl.store(weight_to, weight_WK, mask=row_WK >= 0)


@jit
def _sum_partials(  # type: ignore[no-untyped-def]
    returned_SH,
    weights_SK,
    index_TK,
    out_TH,
    weights_TK,
    tokens,
    hidden,
    local_experts,
    TOP_K: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ranks = _ranks_of(index_TK, token, local_experts, TOP_K, WORLD)
    sum_H = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(WORLD):
        at = (peer * tokens + token).to(tl.int64) * hidden
        here = ((ranks >> peer) & 1) != 0
        sum_H += tl.load(returned_SH + at + h, mask=(h < hidden) & here, other=0.0).to(tl.float32)
    tl.store(out_TH + token.to(tl.int64) * hidden + h, sum_H.to(out_TH.dtype.element_ty), mask=h < hidden)
    if weights_SK is not None:  # noqa: SIM102 - decided at compile time
        if tl.program_id(1) == 0:
            for k in tl.static_range(TOP_K):
                expert = tl.load(index_TK + token * TOP_K + k)
                here = (expert >= 0) & (expert < WORLD * local_experts)
                owner = tl.where(here, expert, 0) // local_experts
                weight = tl.load(weights_SK + (owner * tokens + token) * TOP_K + k, mask=here, other=0.0)
                tl.store(weights_TK + token * TOP_K + k, weight)
