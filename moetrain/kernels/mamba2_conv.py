"""The causal convolution of a Mamba-2 layer with its SiLU, in one pass forward and one backward.

Each channel has its own filter of K taps; the last tap meets the token itself. Taps that would reach over the start of
the row, or of the token's document, meet zeros. Arithmetic in fp32, results in the dtype of x.

Shapes: B rows, S tokens, C channels, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moetrain.kernels._triton import cdiv, jit, runs_triton, tl

MAX_TAPS = 4
"""As many as the backward keeps in registers, and as Mamba's own kernels take."""
TILE_C, TILE_S, WARPS = 128, 16, 8
"""A program's tile in the forward: 8 channels (16 bytes) a thread."""
WALK_C, STEPS, UNROLL = 256, 64, 8
"""Channels of a program in the backward, 4 a thread; tokens it walks through; tokens whose loads are in flight."""


def causal_conv(
    x_BSC: torch.Tensor, weight_CK: torch.Tensor, bias_C: torch.Tensor | None, seq_idx_BS: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(bias + sum over k of weight[:, k] * x[token - (K - 1) + k]) [B, S, C]. Differentiable, no host sync.

    The backward computes the convolution again: nothing but the inputs is kept.

    Args:
        x_BSC: any strides; one whose channels are adjacent is read in place.
        seq_idx_BS: integers, equal inside a document and different in the next one; None is one document a row.
    """
    if not runs_triton(x_BSC) or x_BSC.numel() == 0:
        return causal_conv_ref(x_BSC, weight_CK, bias_C, seq_idx_BS)
    out_BSC: torch.Tensor = _conv_op(x_BSC, weight_CK, bias_C, seq_idx_BS)
    return out_BSC


def causal_conv_ref(
    x_BSC: torch.Tensor, weight_CK: torch.Tensor, bias_C: torch.Tensor | None, seq_idx_BS: torch.Tensor | None = None
) -> torch.Tensor:
    """`causal_conv` in plain torch."""
    taps = weight_CK.shape[1]
    accurate = torch.promote_types(x_BSC.dtype, torch.float32)
    x_BSC_ = x_BSC.to(accurate)
    sum_BSC = torch.zeros_like(x_BSC_) if bias_C is None else bias_C.to(accurate).expand_as(x_BSC_)
    for k in range(taps):
        back = taps - 1 - k
        shifted_BSC = F.pad(x_BSC_, (0, 0, back, 0))[:, : x_BSC.shape[1]]
        if seq_idx_BS is not None:
            before_BS = F.pad(seq_idx_BS, (back, 0), value=-1)[:, : x_BSC.shape[1]]
            shifted_BSC = shifted_BSC.masked_fill((before_BS != seq_idx_BS)[..., None], 0.0)
        sum_BSC = sum_BSC + shifted_BSC * weight_CK[:, k].to(accurate)
    return F.silu(sum_BSC).to(x_BSC.dtype)


@torch.library.custom_op("moetrain::causal_conv", mutates_args=())
def _conv_op(
    x_BSC: torch.Tensor, weight_CK: torch.Tensor, bias_C: torch.Tensor | None, seq_idx_BS: torch.Tensor | None
) -> torch.Tensor:
    rows, tokens, channels = x_BSC.shape
    x_BSC = _adjacent(x_BSC)
    out_BSC = torch.empty(rows, tokens, channels, dtype=x_BSC.dtype, device=x_BSC.device)
    _conv[(cdiv(channels, TILE_C), cdiv(tokens, TILE_S), rows)](
        x_BSC,
        weight_CK.contiguous(),
        bias_C,
        None if seq_idx_BS is None else seq_idx_BS.contiguous(),
        out_BSC,
        x_BSC.stride(0),
        x_BSC.stride(1),
        tokens,
        channels,
        TAPS=weight_CK.shape[1],
        TILE_S=TILE_S,
        TILE_C=TILE_C,
        num_warps=WARPS,
    )
    return out_BSC


@torch.library.custom_op("moetrain::causal_conv_backward", mutates_args=())
def _conv_backward_op(
    grad_BSC: torch.Tensor,
    x_BSC: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None,
    seq_idx_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x [B, S, C], of the weight [C, K] and of the bias [C], the latter two in the weight's dtype."""
    (rows, tokens, channels), taps = x_BSC.shape, weight_CK.shape[1]
    x_BSC, grad_BSC = _adjacent(x_BSC), _adjacent(grad_BSC)
    grad_x_BSC = torch.empty(rows, tokens, channels, dtype=x_BSC.dtype, device=x_BSC.device)
    spans = cdiv(tokens, STEPS - 3)
    parts = torch.empty(rows * spans, 5, channels, dtype=torch.float32, device=x_BSC.device)
    _conv_backward[(cdiv(channels, WALK_C), spans, rows)](
        grad_BSC,
        x_BSC,
        weight_CK.contiguous(),
        bias_C,
        None if seq_idx_BS is None else seq_idx_BS.contiguous(),
        grad_x_BSC,
        parts,
        grad_BSC.stride(0),
        grad_BSC.stride(1),
        x_BSC.stride(0),
        x_BSC.stride(1),
        tokens,
        channels,
        TAPS=taps,
        STEPS=STEPS,
        UNROLL=UNROLL,
        TILE_C=WALK_C,
        num_warps=WALK_C // 128,
    )
    sums_5C = parts.sum(0).to(weight_CK.dtype)
    return grad_x_BSC, sums_5C[5 - taps :].t().contiguous(), sums_5C[0].clone()


def _adjacent(x_BSC: torch.Tensor) -> torch.Tensor:
    return x_BSC if x_BSC.stride(2) == 1 else x_BSC.contiguous()


@_conv_op.register_fake
def _(x_BSC, weight_CK, bias_C, seq_idx_BS):  # type: ignore[no-untyped-def]
    return x_BSC.new_empty(x_BSC.shape)


@_conv_backward_op.register_fake
def _(grad_BSC, x_BSC, weight_CK, bias_C, seq_idx_BS):  # type: ignore[no-untyped-def]
    return x_BSC.new_empty(x_BSC.shape), weight_CK.new_empty(weight_CK.shape), weight_CK.new_empty(weight_CK.shape[0])


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_BSC):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors  # read once: activation checkpointing recomputes them for each reading
    grad_x_BSC, grad_weight_CK, grad_bias_C = _conv_backward_op(grad_BSC, *tensors)
    bias_C = tensors[2]
    return grad_x_BSC, grad_weight_CK, None if bias_C is None else grad_bias_C.to(bias_C.dtype), None


_conv_op.register_autograd(_gradients, setup_context=_save_inputs)


@jit
def _tap(  # type: ignore[no-untyped-def]
    x_SC, seq_idx_S, token_S, document_S, c_1C, back, stride, tokens, channels
):
    """x of the tokens `back` before `token_S` in fp32, zero outside of the row or of the documents `document_S`."""
    at_S = token_S - back
    here_S = (at_S >= 0) & (at_S < tokens)
    x = tl.load(x_SC + at_S[:, None] * stride + c_1C, mask=here_S[:, None] & (c_1C < channels), other=0.0)
    x = x.to(tl.float32)
    if seq_idx_S is not None:
        x = tl.where((tl.load(seq_idx_S + at_S, mask=here_S, other=-1) == document_S)[:, None], x, 0.0)
    return x


@jit
def _filtered(  # type: ignore[no-untyped-def]
    x_SC, weight_CK, bias_C, seq_idx_S, token_S, document_S, c_1C, stride, tokens, channels, TAPS: tl.constexpr
):
    """The convolution at `token_S` before its SiLU, in fp32."""
    sum_SC = tl.zeros((token_S.shape[0], c_1C.shape[1]), tl.float32)
    if bias_C is not None:
        sum_SC += tl.load(bias_C + c_1C, mask=c_1C < channels, other=0.0).to(tl.float32)
    for k in tl.static_range(TAPS):
        weight_1C = tl.load(weight_CK + c_1C * TAPS + k, mask=c_1C < channels, other=0.0).to(tl.float32)
        sum_SC += weight_1C * _tap(x_SC, seq_idx_S, token_S, document_S, c_1C, TAPS - 1 - k, stride, tokens, channels)
    return sum_SC


@jit
def _documents(seq_idx_S, token_S, tokens):  # type: ignore[no-untyped-def]
    """The document of each token, -2 outside of the row; the tokens themselves where there is one document."""
    if seq_idx_S is not None:
        return tl.load(seq_idx_S + token_S, mask=(token_S >= 0) & (token_S < tokens), other=-2)
    else:
        return token_S


@jit
def _conv(  # type: ignore[no-untyped-def]
    x_BSC,
    weight_CK,
    bias_C,
    seq_idx_BS,
    out_BSC,
    stride_b,
    stride_s,
    tokens,
    channels,
    TAPS: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_C: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    token_S = tl.program_id(1).to(tl.int64) * TILE_S + tl.arange(0, TILE_S)
    c_1C = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)[None, :]
    x_SC = x_BSC + row * stride_b
    out_SC = out_BSC + row * tokens * channels
    seq_idx_S = seq_idx_BS
    if seq_idx_BS is not None:
        seq_idx_S = seq_idx_BS + row * tokens
    document_S = _documents(seq_idx_S, token_S, tokens)
    sum_SC = _filtered(x_SC, weight_CK, bias_C, seq_idx_S, token_S, document_S, c_1C, stride_s, tokens, channels, TAPS)
    out = (sum_SC * tl.sigmoid(sum_SC)).to(out_BSC.dtype.element_ty)
    mask_SC = (token_S < tokens)[:, None] & (c_1C < channels)
    tl.store(out_SC + token_S[:, None] * channels + c_1C, out, mask=mask_SC)


@jit
def _conv_backward(  # type: ignore[no-untyped-def]
    grad_BSC,
    x_BSC,
    weight_CK,
    bias_C,
    seq_idx_BS,
    grad_x_BSC,
    parts,
    grad_stride_b,
    grad_stride_s,
    stride_b,
    stride_s,
    tokens,
    channels,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Walks from token to token with the last three x and the gradients of the last three tokens in registers, so that
    every number is read once. The first STEPS - 3 tokens are the program's own, three more complete their gradients.
    Four taps: a shorter filter begins with zeros."""
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * (STEPS - 3)
    c = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    here = c < channels
    x_SC = x_BSC + row * stride_b + c
    grad_SC = grad_BSC + row * grad_stride_b + c
    grad_x_SC = grad_x_BSC + row * tokens * channels + c
    seq_idx_S = seq_idx_BS
    if seq_idx_BS is not None:
        seq_idx_S = seq_idx_BS + row * tokens
    w = weight_CK + c * TAPS + TAPS
    w1 = tl.load(w - 1, mask=here, other=0.0).to(tl.float32)
    w2 = tl.load(w - 2, mask=here & (TAPS >= 2), other=0.0).to(tl.float32)
    w3 = tl.load(w - 3, mask=here & (TAPS >= 3), other=0.0).to(tl.float32)
    w4 = tl.load(w - 4, mask=here & (TAPS >= 4), other=0.0).to(tl.float32)
    bias = tl.zeros((TILE_C,), tl.float32)
    if bias_C is not None:
        bias += tl.load(bias_C + c, mask=here, other=0.0).to(tl.float32)
    x1 = tl.load(x_SC + (first - 1) * stride_s, mask=here & (first >= 1), other=0.0).to(tl.float32)
    x2 = tl.load(x_SC + (first - 2) * stride_s, mask=here & (first >= 2), other=0.0).to(tl.float32)
    x3 = tl.load(x_SC + (first - 3) * stride_s, mask=here & (first >= 3), other=0.0).to(tl.float32)
    # whether the token before, two and three before are of the same document as the current one
    same1, same2, same3 = 1.0, 1.0, 1.0
    dx1, dx2, dx3 = bias * 0.0, bias * 0.0, bias * 0.0
    dw1, dw2, dw3, dw4, dbias = bias * 0.0, bias * 0.0, bias * 0.0, bias * 0.0, bias * 0.0
    for start in range(0, STEPS, UNROLL):
        for i in tl.static_range(UNROLL):
            token = first + start + i
            inside = here & (token < tokens)
            x0 = tl.load(x_SC + token * stride_s, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_SC + token * grad_stride_s, mask=inside, other=0.0).to(tl.float32)
            if seq_idx_S is not None:
                document = tl.load(seq_idx_S + tl.minimum(token, tokens - 1))
                same1 = (tl.load(seq_idx_S + tl.maximum(tl.minimum(token, tokens) - 1, 0)) == document).to(tl.float32)
                same2 = (tl.load(seq_idx_S + tl.maximum(tl.minimum(token, tokens) - 2, 0)) == document).to(tl.float32)
                same3 = (tl.load(seq_idx_S + tl.maximum(tl.minimum(token, tokens) - 3, 0)) == document).to(tl.float32)
            x1_, x2_, x3_ = x1 * same1, x2 * same2, x3 * same3
            out = bias + w1 * x0 + w2 * x1_ + w3 * x2_ + w4 * x3_
            sigma = tl.sigmoid(out)
            grad = grad * sigma * (1.0 + out * (1.0 - sigma))
            own = tl.where(start + i < STEPS - 3, grad, 0.0)
            dw1 += own * x0
            dw2 += own * x1_
            dw3 += own * x2_
            dw4 += own * x3_
            dbias += own
            done = dx3 + w4 * grad * same3
            dx3 = dx2 + w3 * grad * same2
            dx2 = dx1 + w2 * grad * same1
            dx1 = w1 * grad
            earlier = token - 3
            mask = here & (earlier >= first) & (earlier < tokens)
            tl.store(grad_x_SC + earlier * channels, done.to(grad_x_BSC.dtype.element_ty), mask=mask)
            x3, x2, x1 = x2, x1, x0
    parts += (row * tl.num_programs(1) + tl.program_id(1)) * 5 * channels + c
    tl.store(parts, dbias, mask=here)
    tl.store(parts + 1 * channels, dw4, mask=here)
    tl.store(parts + 2 * channels, dw3, mask=here)
    tl.store(parts + 3 * channels, dw2, mask=here)
    tl.store(parts + 4 * channels, dw1, mask=here)
