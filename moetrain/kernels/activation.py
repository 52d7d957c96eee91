"""The activations that a fused kernel computes, how they are recognised in a module, and their plain reference.

Shapes: R rows (capacity), I intermediate, G width of the up projection (2 I when gated, else I), E experts.
Rows from `offsets_E[-1]` on are not read, and zero in the results.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

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
    gated = bool(module.has_gate)
    interleaved = gated and not module.is_concatenated
    limits = {math.inf, *_numbers(module, "limit", "swiglu_limit")}
    alphas = {1.0, *_numbers(module, "alpha", "swiglu_alpha")}
    compute: Any = module._apply_gate if gated else module.act_fn
    probe = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).mul_(8.0)
    with torch.no_grad():
        expected = compute(probe)
    for kind in KINDS:
        for limit in limits if gated else {math.inf}:
            for alpha in alphas if kind == "silu" else {1.0}:
                for up_shift in (0.0, 1.0) if gated else (0.0,):
                    candidate = Activation(kind, gated, interleaved, alpha, limit, up_shift)
                    if torch.allclose(_apply(probe, candidate), expected, rtol=1e-4, atol=1e-4):
                        return candidate
    return None


def _numbers(module: torch.nn.Module, *names: str) -> list[float]:
    values = (getattr(module, name, None) for name in names)
    return [float(value) for value in values if isinstance(value, (int, float))]


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
