"""Causal attention in Triton for rows of documents and for windows, whose cost does not depend on how many there are.

A token t sees the keys from first(t) to t, and a key k is seen by the tokens from k to before past(k). Neither falls
from one token to the next, so that the keys of a block of tokens are one span; what lies outside is not
visited. With documents

    first(t) = max(begin of its document, t - window + 1)        past(k) = min(end of its document, k + window)

Library kernels instead start a program for each block that a document could have, were it as long as the row: with
room for 256 documents in a row of 4,096 tokens they take five times as long as with room for 16.

Forward and backward are those of FlashAttention-2 (https://arxiv.org/abs/2307.08691), with a kernel for the queries'
gradient and one for that of keys and values. No sum depends on the order in which programs run.

Shape suffixes: B rows, S tokens of a row, T = B * S, H query heads, G key heads (a divisor of H), D size of a query and
a key, V size of a value, N documents, P parts that a key head's query heads are shared out to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.kernels._triton import cdiv, jit, next_power_of_2, runs_triton, tl

LARGEST_HEAD = 128
LOG2_E = 1.4426950408889634
_HIDDEN = -1e30
"""Score of a key that is not seen: finite, so that a row without keys so far is no NaN. What it adds is scaled by 0 as
soon as the row meets one that it sees."""
_FORWARD = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_QUERY_GRADIENT = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
_KEY_GRADIENT = {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2}
"""Tiles that leave all sums in registers on Hopper."""
_PROGRAMS = 512
"""Wanted of the gradient of keys, four for each multiprocessor of an H100: their work differs."""


def forward(
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    sinks_H: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """out [B, S, H, V] and the log-sum-exp [B, H, S] in fp32, sinks counted in; see `attention.attend`."""
    rows, length, heads, size = q_BSHD.shape
    value_size = v_BSGV.shape[-1]
    out = q_BSHD.new_empty(rows, length, heads, value_size)
    lse = q_BSHD.new_empty(rows, heads, length, dtype=torch.float32)
    _forward_kernel[(cdiv(length, _FORWARD["BLOCK_Q"]), heads, rows)](
        q_BSHD,
        k_BSGD,
        v_BSGV,
        sinks_H,
        _bounds(cu_seqlens, rows, length),
        out,
        lse,
        length,
        window,
        heads // k_BSGD.shape[2],
        scale,
        *_strides(q_BSHD, k_BSGD, v_BSGV),
        **_constants(size, value_size),
        **_FORWARD,
    )
    return out, lse


def backward(
    grad_BSHV: Tensor,
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    out_BSHV: Tensor,
    lse_BHS: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; that of sinks follows from `out` and `lse` (`attention.sink_gradient`)."""
    rows, length, heads, size = q_BSHD.shape
    key_heads, value_size = v_BSGV.shape[2:]
    group = heads // key_heads
    bounds, constants = _bounds(cu_seqlens, rows, length), _constants(size, value_size)
    dq, delta = q_BSHD.new_empty(q_BSHD.shape), torch.empty_like(lse_BHS)
    common = (length, window, group, scale, *_strides(grad_BSHV, q_BSHD, k_BSGD, v_BSGV))
    _query_gradient_kernel[(cdiv(length, _QUERY_GRADIENT["BLOCK_Q"]), heads, rows)](
        *(grad_BSHV, q_BSHD, k_BSGD, v_BSGV, out_BSHV, lse_BHS, bounds, dq, delta),
        *common,
        *_strides(out_BSHV),
        **constants,
        **_QUERY_GRADIENT,
    )
    blocks = cdiv(length, _KEY_GRADIENT["BLOCK_K"])
    parts = _parts(group, blocks * key_heads * rows)
    dtype = k_BSGD.dtype if parts == 1 else torch.float32
    dk = k_BSGD.new_empty(parts, rows, length, key_heads, size, dtype=dtype)
    dv = k_BSGD.new_empty(parts, rows, length, key_heads, value_size, dtype=dtype)
    _key_gradient_kernel[(blocks, key_heads * parts, rows)](
        *(grad_BSHV, q_BSHD, k_BSGD, v_BSGV, lse_BHS, delta, bounds, dk, dv),
        *common,
        parts,
        **constants,
        **_KEY_GRADIENT,
    )
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0, dtype=torch.float32).to(k_BSGD.dtype), dv.sum(0, dtype=torch.float32).to(v_BSGV.dtype)


def document_bounds(cu_seqlens: Tensor, rows: int, length: int) -> Tensor:
    """Where each token's document begins and ends in its row: int32 [2, B, S].

    Args:
        cu_seqlens: int32 [N + 1], where the documents begin in the flattened rows, ending with T.
    """
    if not runs_triton(cu_seqlens):
        return document_bounds_ref(cu_seqlens, rows, length)
    bounds = cu_seqlens.new_empty(2, rows, length)
    documents = cu_seqlens.shape[0] - 1
    steps = max(documents - 1, 0).bit_length()
    _bounds_kernel[(cdiv(rows * length, 256),)](
        cu_seqlens, bounds, documents, rows * length, length, STEPS=steps, BLOCK=256
    )
    return bounds


def document_bounds_ref(cu_seqlens: Tensor, rows: int, length: int) -> Tensor:
    """`document_bounds` by torch's operators."""
    token_T = torch.arange(rows * length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    past_T = torch.searchsorted(cu_seqlens, token_T, right=True)
    bounds_2T = torch.stack([cu_seqlens[past_T - 1], cu_seqlens[past_T]]) - token_T // length * length
    return bounds_2T.to(torch.int32).view(2, rows, length)


def _bounds(cu_seqlens: Tensor | None, rows: int, length: int) -> Tensor | None:
    return None if cu_seqlens is None else document_bounds(cu_seqlens, rows, length)


def _strides(*tensors: Tensor) -> list[int]:
    """Of row, token and head; the numbers of a head lie side by side."""
    assert all(tensor.stride(3) == 1 for tensor in tensors)
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _constants(size: int, value_size: int) -> dict[str, Any]:
    """Of all kernels: the sizes of a head, and of the tiles that hold it; tensor cores take no less than 16."""
    assert max(size, value_size) <= LARGEST_HEAD
    blocks = {"BLOCK_D": max(next_power_of_2(size), 16), "BLOCK_V": max(next_power_of_2(value_size), 16)}
    return {"D": size, "V": value_size, **blocks, "HIDDEN": _HIDDEN, "LOG2_E": LOG2_E}


def _parts(group: int, programs: int) -> int:
    """Programs that share the query heads of a key head, a divisor of their number."""
    divisors = [parts for parts in range(1, group + 1) if group % parts == 0]
    return next((parts for parts in divisors if parts * programs >= _PROGRAMS), group)


@jit
def _bounds_kernel(cu_ptr, bounds_ptr, documents, tokens, length, STEPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Halving: the last document that begins at the token or before it. Empty ones begin there too, but earlier."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = token < tokens
    low, high = tl.zeros_like(token), tl.zeros_like(token) + documents
    for _ in range(STEPS):
        middle = (low + high) // 2
        begins = tl.load(cu_ptr + middle, mask=valid, other=0) <= token
        low, high = tl.where(begins, middle, low), tl.where(begins, high, middle)
    row = token // length * length
    tl.store(bounds_ptr + token, tl.load(cu_ptr + low, mask=valid, other=0) - row, mask=valid)
    tl.store(bounds_ptr + tokens + token, tl.load(cu_ptr + low + 1, mask=valid, other=0) - row, mask=valid)


@jit
def _first(token, begin_ptr, length, window):  # type: ignore[no-untyped-def]
    """The first key that a token sees; also for a block of tokens."""
    first = token * 0
    if begin_ptr is not None:
        first = tl.load(begin_ptr + token, mask=token < length, other=0)
    if window is not None:
        first = tl.maximum(first, token - window + 1)
    return first


@jit
def _past(key, end_ptr, length, window):  # type: ignore[no-untyped-def]
    """One past the last token that sees a key; also for a block of keys."""
    past = key * 0 + length
    if end_ptr is not None:
        past = tl.load(end_ptr + key, mask=key < length, other=0)
    if window is not None:
        past = tl.minimum(past, key + window)
    return past


@jit
def _tile(pointer, start, stride, length, SIZE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A head's numbers of the tokens from `start` on: [TOKENS, BLOCK], zero where there are none."""
    token, number = tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    valid = (start + token)[:, None] < length
    if SIZE < BLOCK:
        valid = valid & (number[None, :] < SIZE)
    first = pointer + tl.cast(start, tl.int64) * stride
    return tl.load(first + token[:, None] * stride + number[None, :], mask=valid, other=0.0)


@jit
def _store_tile(pointer, value, start, stride, length, SIZE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token, number = tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    valid = ((start + token)[:, None] < length) & (number[None, :] < SIZE)
    first = pointer + tl.cast(start, tl.int64) * stride
    tl.store(first + token[:, None] * stride + number[None, :], value.to(pointer.dtype.element_ty), mask=valid)


@jit
def _head(pointer, row, head, stride_b, stride_h):  # type: ignore[no-untyped-def]
    return pointer + tl.cast(row, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    bounds_ptr,
    out_ptr,
    lse_ptr,
    length,
    window,
    group,
    scale,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    """A block of tokens of one head: softmax while the keys pass by. Powers are of 2, which the hardware has."""
    head, row, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q  # those with most keys first
    begin_ptr = bounds_ptr
    if bounds_ptr is not None:
        begin_ptr += row * length
    token = start + tl.arange(0, BLOCK_Q)
    first = _first(token, begin_ptr, length, window)
    q = _tile(_head(q_ptr, row, head, q_stride_b, q_stride_h), start, q_stride_s, length, D, BLOCK_Q, BLOCK_D)
    keys = _head(k_ptr, row, head // group, k_stride_b, k_stride_h)
    values = _head(v_ptr, row, head // group, v_stride_b, v_stride_h)
    if sinks_ptr is None:
        highest = tl.full((BLOCK_Q,), HIDDEN, tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
    else:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        highest, total = tl.zeros((BLOCK_Q,), tl.float32) + sink, tl.full((BLOCK_Q,), 1.0, tl.float32)
    sums = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    low = _first(start, begin_ptr, length, window)
    for at in range(low, tl.minimum(start + BLOCK_Q, length), BLOCK_K):
        k = _tile(keys, at, k_stride_s, length, D, BLOCK_K, BLOCK_D)
        key = at + tl.arange(0, BLOCK_K)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= token[:, None])
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * (scale * LOG2_E), HIDDEN)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        v = _tile(values, at, v_stride_s, length, V, BLOCK_K, BLOCK_V)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
        highest = higher
    out = _head(out_ptr, row, head, length * heads * V, V)
    _store_tile(out, sums / total[:, None], start, heads * V, length, V, BLOCK_Q, BLOCK_V)
    lse = (highest + tl.log2(total)) / LOG2_E
    tl.store(lse_ptr + (row * heads + head) * length + token, lse, mask=token < length)


@jit
def _query_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    bounds_ptr,
    dq_ptr,
    delta_ptr,
    length,
    window,
    group,
    scale,
    grad_stride_b,
    grad_stride_s,
    grad_stride_h,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    """The gradient of a block of queries of one head, and delta, the sum of grad * out over V, for the other kernel."""
    head, row, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    begin_ptr = bounds_ptr
    if bounds_ptr is not None:
        begin_ptr += row * length
    token = start + tl.arange(0, BLOCK_Q)
    first = _first(token, begin_ptr, length, window)
    grad = _head(grad_ptr, row, head, grad_stride_b, grad_stride_h)
    grad = _tile(grad, start, grad_stride_s, length, V, BLOCK_Q, BLOCK_V)
    out = _head(out_ptr, row, head, out_stride_b, out_stride_h)
    out = _tile(out, start, out_stride_s, length, V, BLOCK_Q, BLOCK_V)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    at_token = (row * heads + head) * length + token
    tl.store(delta_ptr + at_token, delta, mask=token < length)
    lse_log2 = tl.load(lse_ptr + at_token, mask=token < length, other=float("inf")) * LOG2_E
    q = _tile(_head(q_ptr, row, head, q_stride_b, q_stride_h), start, q_stride_s, length, D, BLOCK_Q, BLOCK_D)
    keys = _head(k_ptr, row, head // group, k_stride_b, k_stride_h)
    values = _head(v_ptr, row, head // group, v_stride_b, v_stride_h)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    low = _first(start, begin_ptr, length, window)
    for at in range(low, tl.minimum(start + BLOCK_Q, length), BLOCK_K):
        k = _tile(keys, at, k_stride_s, length, D, BLOCK_K, BLOCK_D)
        v = _tile(values, at, v_stride_s, length, V, BLOCK_K, BLOCK_V)
        key = at + tl.arange(0, BLOCK_K)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= token[:, None])
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * (scale * LOG2_E), HIDDEN)
        weights = tl.exp2(scores - lse_log2[:, None])
        dscores = weights * (tl.dot(grad, tl.trans(v)) - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq)
    _store_tile(
        _head(dq_ptr, row, head, length * heads * D, D), dq * scale, start, heads * D, length, D, BLOCK_Q, BLOCK_D
    )


@jit
def _key_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    bounds_ptr,
    dk_ptr,
    dv_ptr,
    length,
    window,
    group,
    scale,
    grad_stride_b,
    grad_stride_s,
    grad_stride_h,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    parts,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    """The gradients of a block of keys and values, by a part of the query heads that read them, transposed: keys down,
    tokens to the right."""
    key_head, part, row = tl.program_id(1) // parts, tl.program_id(1) % parts, tl.program_id(2)
    rows, key_heads = tl.num_programs(2), tl.num_programs(1) // parts
    start = tl.program_id(0) * BLOCK_K  # those that most tokens see first
    end_ptr = bounds_ptr
    if bounds_ptr is not None:
        end_ptr += (rows + row) * length
    key = start + tl.arange(0, BLOCK_K)
    past = _past(key, end_ptr, length, window)
    k = _tile(_head(k_ptr, row, key_head, k_stride_b, k_stride_h), start, k_stride_s, length, D, BLOCK_K, BLOCK_D)
    v = _tile(_head(v_ptr, row, key_head, v_stride_b, v_stride_h), start, v_stride_s, length, V, BLOCK_K, BLOCK_V)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    high = _past(tl.minimum(start + BLOCK_K, length) - 1, end_ptr, length, window)
    blocks = tl.cdiv(high - start, BLOCK_Q)
    heads = group // parts  # of this program
    for step in range(heads * blocks):
        head = key_head * group + part * heads + step // blocks
        at = start + step % blocks * BLOCK_Q
        token = at + tl.arange(0, BLOCK_Q)
        q = _tile(_head(q_ptr, row, head, q_stride_b, q_stride_h), at, q_stride_s, length, D, BLOCK_Q, BLOCK_D)
        grad = _head(grad_ptr, row, head, grad_stride_b, grad_stride_h)
        grad = _tile(grad, at, grad_stride_s, length, V, BLOCK_Q, BLOCK_V)
        at_token = (row * key_heads * group + head) * length + token
        lse_log2 = tl.load(lse_ptr + at_token, mask=token < length, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + at_token, mask=token < length, other=0.0)
        seen = (token[None, :] >= key[:, None]) & (token[None, :] < past[:, None])
        scores = tl.where(seen, tl.dot(k, tl.trans(q)) * (scale * LOG2_E), HIDDEN)
        weights = tl.exp2(scores - lse_log2[None, :])
        dv = tl.dot(weights.to(grad.dtype), grad, dv)
        dscores = weights * (tl.dot(v, tl.trans(grad)) - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk)
    place = part * rows + row
    dk_at = _head(dk_ptr, place, key_head, length * key_heads * D, D)
    _store_tile(dk_at, dk * scale, start, key_heads * D, length, D, BLOCK_K, BLOCK_D)
    dv_at = _head(dv_ptr, place, key_head, length * key_heads * V, V)
    _store_tile(dv_at, dv, start, key_heads * V, length, V, BLOCK_K, BLOCK_V)
