"""The experts' arithmetic on rows in expert order, forward and backward, without autograd.

Shapes: R rows, E experts on this rank, H hidden, I intermediate, G width of the up projection (2 I when gated, else I).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moetrain.kernels.activation import Activation
from moetrain.kernels.bias import add_row_bias_, expert_sum, row_bias_backward
from moetrain.kernels.gated import gated_activation, gated_activation_backward
from moetrain.kernels.grouped import multiply_outer, multiply_rows
from moetrain.kernels.row_stack import Place

GRADIENTS = "_moetrain_gradients"
"""Attribute of an experts module: `gradient_scale` and `deferrable` of its `ExpertWeights`."""


class ExpertWeights(NamedTuple):
    """Parameters of the experts on this rank, in Transformers' layout."""

    up: torch.Tensor
    """[E, G, H], or [E, H, G] when transposed."""
    down: torch.Tensor
    """[E, H, I], or [E, I, H] when transposed."""
    up_bias: torch.Tensor | None = None
    """[E, G]"""
    down_bias: torch.Tensor | None = None
    """[E, H]"""
    transposed: bool = False
    gradient_scale: float = 1.0
    """What the gradients of these parameters are multiplied by."""
    deferrable: bool = False
    """The parameters are leaves, and nothing reads their gradients before the backward has ended or `join_aside`."""


def expert_weights(module: Any, read: Callable[[Any, str], torch.Tensor] = getattr) -> ExpertWeights:
    """Parameters of an experts module of Transformers, as its attributes hold them.

    Args:
        read: how a matrix is read off the module by its name; `adapted` adds the updates of adapters.
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    up_bias, down_bias = (getattr(module, f"{n}_bias") if module.has_bias else None for n in (up, "down_proj"))
    matrices = read(module, up), read(module, "down_proj")
    scale, deferrable = getattr(module, GRADIENTS, (1.0, False))
    return ExpertWeights(*matrices, up_bias, down_bias, module.is_transposed, scale, deferrable)


def forward_rows(
    rows_RH: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    weights: ExpertWeights,
    activation: Activation,
    place: Place | None = None,
    outputs: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the result [R, H], and the up projection [R, G] without its bias, which the backward needs.

    Args:
        place: where the rows lie and the up projection goes, `place.at` rows after either tensor.
        outputs: False leaves the result unwritten: only a backward will follow.
    """
    up, down, up_bias, down_bias, transposed = weights[:5]
    up = up if transposed else up.transpose(1, 2)
    at = kept_RG = None
    if place is not None:
        at, kept_RG = place.at, place.rows("up", rows_RH.shape[0], up.shape[2], rows_RH.dtype)
    up_RG = multiply_rows(rows_RH, up, offsets_E, at=at, out_RN=kept_RG, out_at=at)
    if not outputs:
        return torch.empty_like(rows_RH), up_RG
    act_RI = gated_activation(up_RG, weights_R, offsets_E, up_bias, activation, at)
    out_RH = multiply_rows(act_RI, down if transposed else down.transpose(1, 2), offsets_E)
    if down_bias is not None:
        add_row_bias_(out_RH, weights_R, offsets_E, down_bias)
    return out_RH, up_RG


class RowGradients(NamedTuple):
    """What `backward_rows` computes."""

    rows_RH: torch.Tensor | None
    """Gradient of the rows, where asked for."""
    weights_R: torch.Tensor
    """Gradient of the routing weights, fp32."""
    up_RG: torch.Tensor
    """Gradient of the up projection's output."""
    act_RI: torch.Tensor
    """The activation times the routing weight, again."""


def backward_rows(
    grad_RH: torch.Tensor,
    up_RG: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    weights: ExpertWeights,
    activation: Activation,
    needs_rows: bool = True,
    at: torch.Tensor | None = None,
) -> RowGradients:
    """The backward of `forward_rows` up to its rows; the parameters' follows in `backward_parameters`.

    Args:
        at: rows that the up projection is further on in memory.
    """
    up, down, up_bias, down_bias, transposed = weights[:5]
    grad_act_RI = multiply_rows(grad_RH, down.transpose(1, 2) if transposed else down, offsets_E)
    grad_up_RG, grad_weights_R, act_RI = gated_activation_backward(
        grad_act_RI, up_RG, weights_R, offsets_E, up_bias, activation, at
    )
    if down_bias is not None:
        grad_weights_R += row_bias_backward(grad_RH, offsets_E, down_bias)
    grad_rows_RH = None
    if needs_rows:
        grad_rows_RH = multiply_rows(grad_up_RG, up.transpose(1, 2) if transposed else up, offsets_E)
    return RowGradients(grad_rows_RH, grad_weights_R, grad_up_RG, act_RI)


def backward_parameters(
    rows_RH: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    grad_RH: torch.Tensor,
    gradients: RowGradients,
    weights: ExpertWeights,
    at: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Gradients of up, down, up_bias and down_bias (None without biases).

    Args:
        at: rows that `rows_RH` are further on in memory.
    """
    scale = weights.gradient_scale
    if weights.transposed:
        up = multiply_outer(rows_RH, gradients.up_RG, offsets_E, scale, left_at=at)
        down = multiply_outer(gradients.act_RI, grad_RH, offsets_E, scale)
    else:
        up = multiply_outer(gradients.up_RG, rows_RH, offsets_E, scale, right_at=at)
        down = multiply_outer(grad_RH, gradients.act_RI, offsets_E, scale)
    up_bias = down_bias = None
    if weights.up_bias is not None:
        up_bias = expert_sum(gradients.up_RG, None, offsets_E) * scale
    if weights.down_bias is not None:
        down_bias = expert_sum(grad_RH, weights_R, offsets_E) * scale
    return [up, down, up_bias, down_bias]
