"""The largest of a few numbers, for routers: torch's `topk` takes 33 us for the 8 of 128 of 4,096 tokens, and 119 us at
16,384, because it is made for long rows (H200, docs/perf-notes.md).

Shapes: T tokens, E experts, K choices of a token.
"""

from __future__ import annotations

import torch

from moetrain.kernels._triton import cdiv, jit, next_power_of_2, runs_triton, tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_EXPERTS, MOST_CHOICES = 1024, 32
"""Of a row that one program holds in registers, and of the passes that it makes over it."""


def top_k(scores_TE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest numbers of each row in falling order [T, K], and their columns as int64; NaN counts as the largest,
    and of equal numbers the first comes first. As `torch.topk(scores_TE, k)`, without autograd.

    Args:
        scores_TE: fp32, bf16 or fp16, of any number of leading dimensions.
    """
    values, indices = _top_k_op(scores_TE, k)
    return values, indices


@torch.library.custom_op("moetrain::top_k", mutates_args=())
def _top_k_op(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not runs_triton(scores) or scores.numel() == 0:
        return top_k_ref(scores, k)
    scores = scores.contiguous()
    experts = scores.shape[-1]
    rows, pad = scores.numel() // experts, next_power_of_2(experts)
    values = scores.new_empty(*scores.shape[:-1], k)
    indices = torch.empty_like(values, dtype=torch.int64)
    tile = max(1024 // pad, 1)
    _top_k[(cdiv(rows, tile),)](scores, values, indices, rows, experts, K=k, PAD_E=pad, TILE_T=tile, num_warps=4)
    return values, indices


@_top_k_op.register_fake
def _(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = scores.new_empty(*scores.shape[:-1], k)
    return values, torch.empty_like(values, dtype=torch.int64)


def top_k_ref(scores_TE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_k` by a stable sort."""
    values, indices = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), indices[..., :k].contiguous()


@jit
def _top_k(scores_TE, values_TK, indices_TK, rows, experts, K: tl.constexpr, PAD_E: tl.constexpr, TILE_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number and its column as one integer: fp32's bits are in the order of the numbers, but that those of negative
    ones fall."""
    t = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    e = tl.arange(0, PAD_E)
    inside_TE = (t < rows)[:, None] & (e < experts)[None, :]
    score_TE = tl.load(scores_TE + t[:, None] * experts + e[None, :], mask=inside_TE, other=0.0).to(tl.float32)
    bits_TE = (score_TE + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    bits_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    key_TE = (bits_TE.to(tl.int64) << 32) | (PAD_E - 1 - e[None, :]).to(tl.int64)
    least = -(2**63)
    key_TE = tl.where(inside_TE, key_TE, least)
    for k in tl.static_range(K):
        key_T = tl.max(key_TE, 1)
        bits_T = (key_T >> 32).to(tl.int32)
        value_T = (bits_T ^ ((bits_T >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        column_T = PAD_E - 1 - (key_T & 0xFFFFFFFF)
        tl.store(values_TK + t * K + k, value_T.to(values_TK.dtype.element_ty), mask=t < rows)
        tl.store(indices_TK + t * K + k, column_T, mask=t < rows)
        key_TE = tl.where(key_TE == key_T[:, None], least, key_TE)
