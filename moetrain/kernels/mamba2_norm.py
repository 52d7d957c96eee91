"""RMSNorm of a gated value, as a Mamba-2 layer ends: each group of channels is normed by itself.

Arithmetic in fp32, rounded once.

Shapes: R rows (tokens), D channels in G groups of W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moetrain.kernels._triton import cdiv, jit, next_power_of_2, runs_triton, tl

SPAN_R = 32
"""Rows that a program of the backward walks through before it writes its part of the weight's gradient."""


def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight_D: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """weight * v / sqrt(mean(v^2) + eps) with v = x * silu(gate), the mean over each of `groups` groups of channels.

    Differentiable, no host sync. x and gate [..., D] have one shape and any strides: tensors whose channels are
    adjacent and whose tokens follow each other evenly are read in place. The result has the dtype of x.
    """
    if not runs_triton(x) or x.numel() == 0:
        return gated_norm_ref(x, gate, weight_D, groups, eps)
    out: torch.Tensor = _norm_op(x, gate, weight_D, groups, eps)
    return out


def gated_norm_ref(
    x: torch.Tensor, gate: torch.Tensor, weight_D: torch.Tensor, groups: int, eps: float
) -> torch.Tensor:
    """`gated_norm` in plain torch."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    gated = (x.to(accurate) * F.silu(gate.to(accurate))).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    out: torch.Tensor = (normed.flatten(-2) * weight_D.to(accurate)).to(x.dtype)
    return out


@torch.library.custom_op("moetrain::gated_norm", mutates_args=())
def _norm_op(x: torch.Tensor, gate: torch.Tensor, weight_D: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    x_RD, gate_RD = _rows(x), _rows(gate)
    num_rows, width = x_RD.shape[0], x_RD.shape[1] // groups
    out_RD = torch.empty(x_RD.shape, dtype=x.dtype, device=x.device)
    tile_r, tile_w, warps = _tile(width)
    _norm[(cdiv(num_rows, tile_r), groups)](
        x_RD,
        gate_RD,
        weight_D,
        out_RD,
        x_RD.stride(0),
        gate_RD.stride(0),
        num_rows,
        width,
        eps,
        TILE_R=tile_r,
        TILE_W=tile_w,
        num_warps=warps,
    )
    return out_RD.view(x.shape)


@torch.library.custom_op("moetrain::gated_norm_backward", mutates_args=())
def _norm_backward_op(
    grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, weight_D: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_RD, gate_RD, grad_RD = _rows(x), _rows(gate), _rows(grad)
    num_rows, channels = x_RD.shape
    grad_x_RD = torch.empty(x_RD.shape, dtype=x.dtype, device=x.device)
    grad_gate_RD = torch.empty(x_RD.shape, dtype=gate.dtype, device=x.device)
    parts = torch.empty(cdiv(num_rows, SPAN_R), channels, dtype=torch.float32, device=x.device)
    tile_r, tile_w, warps = _tile(channels // groups)
    _norm_backward[(parts.shape[0], groups)](
        grad_RD,
        x_RD,
        gate_RD,
        weight_D,
        grad_x_RD,
        grad_gate_RD,
        parts,
        grad_RD.stride(0),
        x_RD.stride(0),
        gate_RD.stride(0),
        num_rows,
        channels // groups,
        eps,
        SPAN_R=SPAN_R,
        TILE_R=tile_r,
        TILE_W=tile_w,
        num_warps=warps,
    )
    return grad_x_RD.view(x.shape), grad_gate_RD.view(x.shape), parts.sum(0).to(weight_D.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as [R, D] with adjacent channels, a view where the strides allow it."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and channels of a program's tile, and its warps: 8 numbers (16 bytes) a thread for each tensor, as far as
    1,024 threads go."""
    tile_w = next_power_of_2(width)
    tile_r = max(1024 // tile_w, 1)
    return tile_r, tile_w, min(max(tile_r * tile_w // 256, 1), 16)


@_norm_op.register_fake
def _(x, gate, weight_D, groups, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@_norm_backward_op.register_fake
def _(grad, x, gate, weight_D, groups, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), gate.new_empty(x.shape), torch.empty_like(weight_D)


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    return *_norm_backward_op(grad, *ctx.saved_tensors, ctx.groups, ctx.eps), None, None


_norm_op.register_autograd(_gradients, setup_context=_save_inputs)


@jit
def _norm(  # type: ignore[no-untyped-def]
    x_RD,
    gate_RD,
    weight_D,
    out_RD,
    stride,
    gate_stride,
    num_rows,
    width,
    eps,
    TILE_R: tl.constexpr,
    TILE_W: tl.constexpr,
):
    group = tl.program_id(1)
    row_R1 = (tl.program_id(0) * TILE_R + tl.arange(0, TILE_R))[:, None].to(tl.int64)
    w_1W = tl.arange(0, TILE_W)[None, :]
    mask = (row_R1 < num_rows) & (w_1W < width)
    c_1W = group * width + w_1W
    x = tl.load(x_RD + row_R1 * stride + c_1W, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_RD + row_R1 * gate_stride + c_1W, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_D + c_1W, mask=w_1W < width, other=0.0).to(tl.float32)
    gated = x * gate * tl.sigmoid(gate)
    scale_R1 = tl.rsqrt(tl.sum(gated * gated, 1) / width + eps)[:, None]
    out = (gated * scale_R1 * weight).to(out_RD.dtype.element_ty)
    tl.store(out_RD + row_R1 * (tl.num_programs(1) * width) + c_1W, out, mask=mask)


@jit
def _norm_backward(  # type: ignore[no-untyped-def]
    grad_RD,
    x_RD,
    gate_RD,
    weight_D,
    grad_x_RD,
    grad_gate_RD,
    parts,
    grad_stride,
    stride,
    gate_stride,
    num_rows,
    width,
    eps,
    SPAN_R: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_W: tl.constexpr,
):
    channels = tl.num_programs(1) * width
    w_1W = tl.arange(0, TILE_W)[None, :]
    c_1W = tl.program_id(1) * width + w_1W
    weight = tl.load(weight_D + c_1W, mask=w_1W < width, other=0.0).to(tl.float32)
    weight_grad = tl.zeros((TILE_R, TILE_W), tl.float32)
    for start in range(0, SPAN_R, TILE_R):
        row_R1 = (tl.program_id(0) * SPAN_R + start + tl.arange(0, TILE_R))[:, None].to(tl.int64)
        mask = (row_R1 < num_rows) & (w_1W < width)
        x = tl.load(x_RD + row_R1 * stride + c_1W, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_RD + row_R1 * gate_stride + c_1W, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_RD + row_R1 * grad_stride + c_1W, mask=mask, other=0.0).to(tl.float32)
        sigma = tl.sigmoid(gate)
        silu = gate * sigma
        gated = x * silu
        scale_R1 = tl.rsqrt(tl.sum(gated * gated, 1) / width + eps)[:, None]
        normed = gated * scale_R1
        weight_grad += grad * normed
        grad *= weight
        grad = scale_R1 * (grad - normed * (tl.sum(grad * normed, 1) / width)[:, None])
        at = row_R1 * channels + c_1W
        tl.store(grad_x_RD + at, (grad * silu).to(grad_x_RD.dtype.element_ty), mask=mask)
        slope = sigma + silu * (1.0 - sigma)
        tl.store(grad_gate_RD + at, (grad * x * slope).to(grad_gate_RD.dtype.element_ty), mask=mask)
    part_1W = tl.sum(weight_grad, 0)[None, :]
    tl.store(parts + tl.program_id(0).to(tl.int64) * channels + c_1W, part_1W, mask=w_1W < width)
