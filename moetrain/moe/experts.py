"""The experts' arithmetic on rows that are already in expert order.

Reads the contract of Transformers' `@use_experts_implementation` from the module: the names and layout of its weights
(`has_gate`, `is_transposed`, `has_bias`), its gate (`_apply_gate`), activation and optional norm. No family is named.

Shapes: R rows, H hidden size, I intermediate size, e experts of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.backends.peft import adapted, is_adapted
from moetrain.kernels import (
    ExpertWeights,
    Place,
    expert_rows,
    expert_weights,
    experts_forward,
    recognise_activation,
    scale_gradients,
)

_ACTIVATION = "_moetrain_activation"


def run_experts(
    experts: Any,
    rows_RH: Tensor,
    offsets_e: Tensor,
    weights_R: Tensor,
    place: Place | None = None,
    outputs: bool = True,
) -> Tensor:
    """Weighted output of each row's expert, [R, H] in the type of the rows; rows past `offsets_e[-1]` are undefined.

    Args:
        experts: an experts module with this rank's experts as plain tensors.
        offsets_e: int32 ends of the experts' rows.
        weights_R: routing weights.
        place: where the rows lie, as in `Dispatched`.
        outputs: False may leave the result unwritten: only its backward matters.
    """
    if experts.has_post_expert_norm or _implementation(experts) == "eager":
        return looped_experts(experts, rows_RH, offsets_e, weights_R)
    weights = weights_of(experts)
    # autocast hands over rows in another type than the weights
    assert place is None or rows_RH.dtype == weights.up.dtype
    out = expert_rows(rows_RH.to(weights.up.dtype), offsets_e, weights_R, weights, gate_of(experts), place, outputs)
    return out.to(rows_RH.dtype)


def run_all_experts(
    experts: Any, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, outputs: bool = True
) -> Tensor | None:
    """Weighted sum over each token's experts, all of them on this rank, in one operator that keeps no copy of the
    tokens for the backward; None where the module needs the steps one by one."""
    if experts.has_post_expert_norm or _implementation(experts) == "eager":
        return None
    weights = weights_of(experts)
    rows_TH = tokens_TH.to(weights.up.dtype)
    out = experts_forward(rows_TH, expert_ids_TK, weights_TK, weights, gate_of(experts), outputs)
    return out.to(tokens_TH.dtype)


def looped_experts(experts: Any, rows_RH: Tensor, offsets_e: Tensor, weights_R: Tensor) -> Tensor:
    """`run_experts` expert by expert with torch's operators, and a host sync: the reference."""
    weights = scale_gradients(weights_of(experts))
    ends = offsets_e.tolist()
    outputs = []
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        up, down = (weight[e] if weights.transposed else weight[e].t() for weight in (weights.up, weights.down))
        hidden = rows_RH[start:end].to(up.dtype) @ up
        if weights.up_bias is not None:
            hidden = hidden + weights.up_bias[e]
        hidden = (experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)) @ down
        if weights.down_bias is not None:
            hidden = hidden + weights.down_bias[e]
        if experts.has_post_expert_norm:
            hidden = experts.post_expert_norm(hidden)
        outputs.append((hidden * weights_R[start:end, None]).to(rows_RH.dtype))
    return torch.cat([*outputs, rows_RH.new_zeros(rows_RH.shape[0] - ends[-1], rows_RH.shape[1])])


def weights_of(experts: Any) -> ExpertWeights:
    """This rank's weights, adapters added. What an adapter gets is not the experts' own gradient, and
    is computed from at once."""
    weights = expert_weights(experts, adapted)
    return weights._replace(gradient_scale=1.0, deferrable=False) if is_adapted(experts) else weights


def gate_of(experts: Any) -> Any:
    """The kernels' row for the module's activation, or the module's own function where they have none."""
    if _ACTIVATION not in experts.__dict__:
        own = experts._apply_gate if experts.has_gate else experts.act_fn
        experts.__dict__[_ACTIVATION] = recognise_activation(experts) or own
    return experts.__dict__[_ACTIVATION]


def _implementation(experts: Any) -> str | None:
    return getattr(experts.config, "_experts_implementation", None)
