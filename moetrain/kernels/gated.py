"""The experts' activation times the routing weight, forward and backward, in one pass each.

y = w * (act @ down) = (w * act) @ down: the weight goes in here, where rows are I wide, and not on rows H wide.

Shapes: R rows (capacity), I intermediate, G width of the up projection (2 I when gated, else I), E experts.
Rows from `offsets_E[-1]` on are neither read nor written.
"""

from __future__ import annotations

import torch

from moetrain.kernels._triton import cdiv, jit, next_power_of_2, runs_triton, tl
from moetrain.kernels.activation import (
    KINDS,
    Activation,
    gated_activation_backward_ref,
    gated_activation_ref,
)
from moetrain.kernels.row_stack import rows_at


def gated_activation(
    up_RG: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    bias_EG: torch.Tensor | None,
    activation: Activation,
    up_at: torch.Tensor | None = None,
) -> torch.Tensor:
    """w * act(up + bias) [R, I], computed in fp32 and rounded once. Not differentiable by itself.

    Args:
        up_at: the rows of up are this many further on in memory (`RowStack`).
    """
    if not runs_triton(up_RG) or up_RG.numel() == 0:
        return gated_activation_ref(rows_at(up_RG, up_at), weights_R, offsets_E, bias_EG, activation)
    num_rows, width = up_RG.shape
    inner = width // 2 if activation.gated else width
    out_RI = up_RG.new_empty(num_rows, inner)
    block_r, block_i, warps = _block(inner)
    _activate[(cdiv(num_rows, block_r),)](
        up_RG,
        up_at,
        weights_R,
        offsets_E,
        bias_EG,
        out_RI,
        inner,
        offsets_E.numel(),
        *_constants(activation, offsets_E),
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        num_warps=warps,
    )
    return out_RI


def gated_activation_backward(
    grad_RI: torch.Tensor,
    up_RG: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    bias_EG: torch.Tensor | None,
    activation: Activation,
    up_at: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of `gated_activation`'s output: that of up [R, G], of the weights [R] in fp32, and the output
    again [R, I], which the down projection's weight gradient needs: recomputing it here costs its write, keeping it
    from the forward I numbers a row."""
    if not runs_triton(up_RG) or up_RG.numel() == 0:
        return gated_activation_backward_ref(grad_RI, rows_at(up_RG, up_at), weights_R, offsets_E, bias_EG, activation)
    num_rows, width = up_RG.shape
    inner = width // 2 if activation.gated else width
    grad_up_RG, out_RI = torch.empty_like(up_RG), up_RG.new_empty(num_rows, inner)
    grad_weights_R = torch.empty(num_rows, dtype=torch.float32, device=up_RG.device)
    block_r, block_i, warps = _block(inner)
    _activate_backward[(cdiv(num_rows, block_r),)](
        grad_RI,
        up_RG,
        up_at,
        weights_R,
        offsets_E,
        bias_EG,
        grad_up_RG,
        grad_weights_R,
        out_RI,
        inner,
        offsets_E.numel(),
        *_constants(activation, offsets_E),
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        num_warps=warps,
    )
    return grad_up_RG, grad_weights_R, out_RI


def _block(inner: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: 8 numbers (16 bytes) a thread for each tensor. More cost
    registers and with them the loads in flight: 16 a thread in the backward run at 2.5 TB/s, 8 at 3.9 (H200)."""
    block_i = min(next_power_of_2(inner), 1024)
    if inner % block_i == 0 or inner > 1024:
        return 1, block_i, max(block_i // 256, 1)
    return 4, min(block_i, 256), 4


def _constants(activation: Activation, offsets_E: torch.Tensor) -> tuple[float | int | bool, ...]:
    """ALPHA, LIMIT, UP_SHIFT, KIND, GATED, INTERLEAVED, PAD_E of the kernels."""
    kind, gated, interleaved, alpha, limit, up_shift = activation
    return alpha, limit, up_shift, KINDS.index(kind), gated, interleaved, next_power_of_2(offsets_E.numel())


@jit
def _f(x, alpha, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Value and derivative of the nonlinearity (KIND indexes KINDS)."""
    if KIND == 0:
        sigma = tl.sigmoid(alpha * x)
        value = x * sigma
        slope = sigma + alpha * value * (1.0 - sigma)
    elif KIND == 1:
        cubic = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 2.0 * tl.sigmoid(2.0 * cubic) - 1.0
        value = 0.5 * x * (1.0 + tanh)
        slope = 0.5 * (1.0 + tanh)
        slope += 0.5 * x * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        positive = tl.maximum(x, 0.0)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@jit
def _load_up(  # type: ignore[no-untyped-def]
    up_RG,
    row_R1,
    here_R1,
    inner,
    start,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Gate and up tiles in fp32, columns `start` to `start + BLOCK_I` of each (both are up without a gate)."""
    i_1I = start + tl.arange(0, BLOCK_I)[None, :]
    mask_RI = here_R1 & (i_1I < inner)
    if INTERLEAVED:
        g_1G = 2 * start + tl.arange(0, 2 * BLOCK_I)[None, :]
        pairs = tl.load(up_RG + row_R1 * (2 * inner) + g_1G, mask=here_R1 & (g_1G < 2 * inner), other=0.0)
        gate_RI, up_RI = tl.split(pairs.to(tl.float32).reshape(BLOCK_R, BLOCK_I, 2))
    elif GATED:
        at_RI = row_R1 * (2 * inner) + i_1I
        gate_RI = tl.load(up_RG + at_RI, mask=mask_RI, other=0.0).to(tl.float32)
        up_RI = tl.load(up_RG + at_RI + inner, mask=mask_RI, other=0.0).to(tl.float32)
    else:
        up_RI = tl.load(up_RG + row_R1 * inner + i_1I, mask=mask_RI, other=0.0).to(tl.float32)
        gate_RI = up_RI
    return gate_RI, up_RI


@jit
def _store_up(  # type: ignore[no-untyped-def]
    up_RG,
    gate_RI,
    up_RI,
    row_R1,
    here_R1,
    inner,
    start,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The reverse of `_load_up`."""
    i_1I = start + tl.arange(0, BLOCK_I)[None, :]
    mask_RI = here_R1 & (i_1I < inner)
    gate_RI = gate_RI.to(up_RG.dtype.element_ty)
    up_RI = up_RI.to(up_RG.dtype.element_ty)
    if INTERLEAVED:
        g_1G = 2 * start + tl.arange(0, 2 * BLOCK_I)[None, :]
        pairs = tl.join(gate_RI, up_RI).reshape(BLOCK_R, 2 * BLOCK_I)
        tl.store(up_RG + row_R1 * (2 * inner) + g_1G, pairs, mask=here_R1 & (g_1G < 2 * inner))
    elif GATED:
        at_RI = row_R1 * (2 * inner) + i_1I
        tl.store(up_RG + at_RI, gate_RI, mask=mask_RI)
        tl.store(up_RG + at_RI + inner, up_RI, mask=mask_RI)
    else:
        tl.store(up_RG + row_R1 * inner + i_1I, up_RI, mask=mask_RI)


@jit
def experts_of(row_R, offsets_E, experts, PAD_E: tl.constexpr):  # type: ignore[no-untyped-def]
    """Expert of each row: how many experts end at or before it (`experts` for a row past the last)."""
    e = tl.arange(0, PAD_E)
    ends = tl.load(offsets_E + e, mask=e < experts, other=2147483647)
    return tl.sum((ends[None, :] <= row_R[:, None]).to(tl.int32), 1)


@jit
def _activate(  # type: ignore[no-untyped-def]
    up_RG,
    up_at,
    weights_R,
    offsets_E,
    bias_EG,
    out_RI,
    inner,
    experts,
    alpha,
    limit,
    up_shift,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAD_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    used = tl.load(offsets_E + experts - 1)
    first = tl.program_id(0) * BLOCK_R
    if first >= used:
        return
    row_R = first + tl.arange(0, BLOCK_R)
    weight_R1 = tl.load(weights_R + row_R, mask=row_R < used, other=0.0)[:, None].to(tl.float32)
    expert_R1 = row_R[:, None]
    if bias_EG is not None:
        expert_R1 = experts_of(row_R, offsets_E, experts, PAD_E)[:, None]
    row_R1 = row_R[:, None].to(tl.int64)
    here_R1 = row_R1 < used
    if up_at is not None:
        up_RG += tl.load(up_at) * (2 * inner if GATED else inner)
    for start in range(0, inner, BLOCK_I):
        i_1I = start + tl.arange(0, BLOCK_I)[None, :]
        mask_RI = here_R1 & (i_1I < inner)
        gate_RI, up_RI = _load_up(up_RG, row_R1, here_R1, inner, start, GATED, INTERLEAVED, BLOCK_R, BLOCK_I)
        if bias_EG is not None:
            gate_bias_RI, up_bias_RI = _load_up(
                bias_EG, expert_R1, here_R1, inner, start, GATED, INTERLEAVED, BLOCK_R, BLOCK_I
            )
            gate_RI += gate_bias_RI
            up_RI += up_bias_RI
        if GATED:
            value_RI, _ = _f(tl.minimum(gate_RI, limit), alpha, KIND)
            value_RI *= tl.minimum(tl.maximum(up_RI, -limit), limit) + up_shift
        else:
            value_RI, _ = _f(up_RI, alpha, KIND)
        out = (value_RI * weight_R1).to(out_RI.dtype.element_ty)
        tl.store(out_RI + row_R1 * inner + i_1I, out, mask=mask_RI)


@jit
def _activate_backward(  # type: ignore[no-untyped-def]
    grad_RI,
    up_RG,
    up_at,
    weights_R,
    offsets_E,
    bias_EG,
    grad_up_RG,
    grad_weights_R,
    out_RI,
    inner,
    experts,
    alpha,
    limit,
    up_shift,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAD_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    used = tl.load(offsets_E + experts - 1)
    first = tl.program_id(0) * BLOCK_R
    if first >= used:
        return
    row_R = first + tl.arange(0, BLOCK_R)
    weight_R1 = tl.load(weights_R + row_R, mask=row_R < used, other=0.0)[:, None].to(tl.float32)
    expert_R1 = row_R[:, None]
    if bias_EG is not None:
        expert_R1 = experts_of(row_R, offsets_E, experts, PAD_E)[:, None]
    row_R1 = row_R[:, None].to(tl.int64)
    here_R1 = row_R1 < used
    if up_at is not None:
        up_RG += tl.load(up_at) * (2 * inner if GATED else inner)
    grad_weight_R = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, inner, BLOCK_I):
        i_1I = start + tl.arange(0, BLOCK_I)[None, :]
        mask_RI = here_R1 & (i_1I < inner)
        gate_RI, up_RI = _load_up(up_RG, row_R1, here_R1, inner, start, GATED, INTERLEAVED, BLOCK_R, BLOCK_I)
        if bias_EG is not None:
            gate_bias_RI, up_bias_RI = _load_up(
                bias_EG, expert_R1, here_R1, inner, start, GATED, INTERLEAVED, BLOCK_R, BLOCK_I
            )
            gate_RI += gate_bias_RI
            up_RI += up_bias_RI
        g_RI = tl.load(grad_RI + row_R1 * inner + i_1I, mask=mask_RI, other=0.0).to(tl.float32)
        if GATED:
            value_RI, slope_RI = _f(tl.minimum(gate_RI, limit), alpha, KIND)
            scale_RI = tl.minimum(tl.maximum(up_RI, -limit), limit) + up_shift
            grad_gate_RI = tl.where(gate_RI <= limit, g_RI * weight_R1 * scale_RI * slope_RI, 0.0)
            grad_up_RI = tl.where(tl.abs(up_RI) <= limit, g_RI * weight_R1 * value_RI, 0.0)
            value_RI *= scale_RI
        else:
            value_RI, slope_RI = _f(up_RI, alpha, KIND)
            grad_up_RI = g_RI * weight_R1 * slope_RI
            grad_gate_RI = grad_up_RI
        _store_up(
            grad_up_RG,
            grad_gate_RI,
            grad_up_RI,
            row_R1,
            here_R1,
            inner,
            start,
            GATED,
            INTERLEAVED,
            BLOCK_R,
            BLOCK_I,
        )
        out = (value_RI * weight_R1).to(out_RI.dtype.element_ty)
        tl.store(out_RI + row_R1 * inner + i_1I, out, mask=mask_RI)
        grad_weight_R += tl.sum(g_RI * value_RI, 1)
    tl.store(grad_weights_R + row_R, grad_weight_R, mask=row_R < used)
