"""The experts' activation times the routing weight, forward and backward, in one pass each.

y = w * (act @ down) = (w * act) @ down: the weight goes in here, where rows are I wide, and not on rows H wide.

Shapes: R rows (capacity), I intermediate, G width of the up projection (2 I when gated, else I), E experts.
Rows from `offsets_E[-1]` on are neither read nor written.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moetrain.kernels._triton import cdiv, jit, next_power_of_2, runs_triton, tl

KINDS = ("silu", "gelu_tanh", "relu2")


class Activation(NamedTuple):
    """f(gate) * (up + up_shift), with gate <= limit and |up| <= limit; f(up) when there is no gate."""

    kind: str
    """`silu`: x * sigmoid(alpha * x); `gelu_tanh`: GELU by tanh; `relu2`: max(x, 0)^2."""
    gated: bool = True
    interleaved: bool = False
    """Gate and up alternate (gate0, up0, gate1, up1, ...) instead of following each other."""
    alpha: float = 1.0
    limit: float = math.inf
    up_shift: float = 0.0

    def key(self) -> str:
        """The activation as a string, which a torch operator can take; `parse` reads it back."""
        return ",".join(str(value) for value in (self.kind, int(self.gated), int(self.interleaved), *self[3:]))

    @classmethod
    def parse(cls, key: str) -> Activation:
        kind, gated, interleaved, *numbers = key.split(",")
        return cls(kind, gated == "1", interleaved == "1", *(float(number) for number in numbers))


def recognise_activation(module: torch.nn.Module) -> Activation | None:
    """The row of this file's table that computes what the experts module computes, or None.

    Candidates are tried on random numbers against the module's own `_apply_gate` (or `act_fn` without a gate), so a
    class that overrides it is matched by what it computes and not by its name.
    """
    gated, interleaved = module.has_gate, module.has_gate and not module.is_concatenated
    limits = {_number(module, name) for name in ("limit", "swiglu_limit")} - {None} | {math.inf}
    alphas = {_number(module, name) for name in ("alpha", "swiglu_alpha")} - {None} | {1.0}
    probe = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).mul_(8.0)
    with torch.no_grad():
        expected = module._apply_gate(probe) if gated else module.act_fn(probe)
    for kind in KINDS:
        for limit in limits if gated else {math.inf}:
            for alpha in alphas if kind == "silu" else {1.0}:
                for up_shift in (0.0, 1.0) if gated else (0.0,):
                    candidate = Activation(kind, gated, interleaved, alpha, limit, up_shift)
                    if torch.allclose(_apply(probe, candidate), expected, rtol=1e-4, atol=1e-4):
                        return candidate
    return None


def _number(module: torch.nn.Module, name: str) -> float | None:
    value = getattr(module, name, None)
    return float(value) if isinstance(value, (int, float)) else None


def gated_activation_ref(
    up_RG: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    bias_EG: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """`gated_activation` in plain torch, differentiable; rows past the last are zero."""
    values_RG, used_R1 = _up_values(up_RG, offsets_E, bias_EG)
    act_RI = _apply(values_RG, activation) * weights_R.to(values_RG.dtype)[:, None]
    return act_RI.masked_fill(~used_R1, 0.0).to(up_RG.dtype)


def _up_values(
    up_RG: torch.Tensor, offsets_E: torch.Tensor, bias_EG: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """up + bias in at least fp32, zero in rows past the last, and which rows are not past it [R, 1]."""
    rows = torch.arange(up_RG.shape[0], device=up_RG.device)
    used_R1 = (rows < offsets_E[-1])[:, None]
    values_RG = up_RG.to(torch.promote_types(up_RG.dtype, torch.float32))
    if bias_EG is not None:
        values_RG = values_RG + bias_EG.to(values_RG.dtype)[row_experts(offsets_E, up_RG.shape[0])]
    return values_RG.masked_fill(~used_R1, 0.0), used_R1


def row_experts(offsets_E: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Expert of each row [R]; rows past the last get the last expert."""
    rows = torch.arange(num_rows, device=offsets_E.device, dtype=offsets_E.dtype)
    return torch.searchsorted(offsets_E, rows, right=True).clamp(max=offsets_E.numel() - 1)


def _apply(values: torch.Tensor, activation: Activation) -> torch.Tensor:
    kind, gated, interleaved, alpha, limit, up_shift = activation
    if not gated:
        return _nonlinearity(values, kind, alpha)
    gate, up = (values[..., ::2], values[..., 1::2]) if interleaved else values.chunk(2, dim=-1)
    if limit != math.inf:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return _nonlinearity(gate, kind, alpha) * (up + up_shift)


def _nonlinearity(x: torch.Tensor, kind: str, alpha: float) -> torch.Tensor:
    if kind == "silu":
        return x * torch.sigmoid(alpha * x)
    return F.gelu(x, approximate="tanh") if kind == "gelu_tanh" else F.relu(x).square()


def gated_activation(
    up_RG: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    bias_EG: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """w * act(up + bias) [R, I], computed in fp32 and rounded once. Not differentiable by itself."""
    if not runs_triton(up_RG) or up_RG.numel() == 0:
        return gated_activation_ref(up_RG, weights_R, offsets_E, bias_EG, activation)
    num_rows, width = up_RG.shape
    inner = width // 2 if activation.gated else width
    out_RI = up_RG.new_empty(num_rows, inner)
    block_r, block_i, warps = _block(inner)
    _activate[(cdiv(num_rows, block_r),)](
        up_RG,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of `gated_activation`'s output: that of up [R, G], of the weights [R] in fp32, and the output
    again [R, I], which the down projection's weight gradient needs: recomputing it here costs its write, keeping it
    from the forward I numbers a row."""
    if not runs_triton(up_RG) or up_RG.numel() == 0:
        return gated_activation_backward_ref(grad_RI, up_RG, weights_R, offsets_E, bias_EG, activation)
    num_rows, width = up_RG.shape
    inner = width // 2 if activation.gated else width
    grad_up_RG, out_RI = torch.empty_like(up_RG), up_RG.new_empty(num_rows, inner)
    grad_weights_R = torch.empty(num_rows, dtype=torch.float32, device=up_RG.device)
    block_r, block_i, warps = _block(inner)
    _activate_backward[(cdiv(num_rows, block_r),)](
        grad_RI,
        up_RG,
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


def gated_activation_backward_ref(
    grad_RI: torch.Tensor,
    up_RG: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    bias_EG: torch.Tensor | None,
    activation: Activation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gated_activation_backward` in plain torch; rows past the last are zero."""
    kind, gated, interleaved, alpha, limit, up_shift = activation
    values_RG, used_R1 = _up_values(up_RG, offsets_E, bias_EG)
    weights_R1 = weights_R.to(values_RG.dtype)[:, None]
    grad_RI = grad_RI.to(values_RG.dtype).masked_fill(~used_R1, 0.0)
    if gated:
        gate, up = (values_RG[:, ::2], values_RG[:, 1::2]) if interleaved else values_RG.chunk(2, dim=1)
        value, slope = _nonlinearity_and_slope(gate.clamp(max=limit), kind, alpha)
        scale = up.clamp(min=-limit, max=limit) + up_shift
        grad_gate = (grad_RI * weights_R1 * scale * slope).masked_fill(gate > limit, 0.0)
        grad_up = (grad_RI * weights_R1 * value).masked_fill(up.abs() > limit, 0.0)
        value = value * scale
        joined = torch.stack((grad_gate, grad_up), 2).flatten(1) if interleaved else torch.cat((grad_gate, grad_up), 1)
    else:
        value, slope = _nonlinearity_and_slope(values_RG, kind, alpha)
        joined = grad_RI * weights_R1 * slope
    out_RI = (value * weights_R1).masked_fill(~used_R1, 0.0)
    return joined.to(up_RG.dtype), (grad_RI * value).sum(1), out_RI.to(up_RG.dtype)


def _nonlinearity_and_slope(x: torch.Tensor, kind: str, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    value = _nonlinearity(x, kind, alpha)
    if kind == "silu":
        sigma = torch.sigmoid(alpha * x)
        return value, sigma + alpha * value * (1.0 - sigma)
    if kind == "relu2":
        return value, 2.0 * F.relu(x)
    scale = math.sqrt(2.0 / math.pi)
    tanh = torch.tanh(scale * (x + 0.044715 * x**3))
    return value, 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh**2) * scale * (1.0 + 0.134145 * x**2)


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
