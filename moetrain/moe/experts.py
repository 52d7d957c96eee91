"""The experts' arithmetic on rows that are already in expert order.

Reads the contract of Transformers' `@use_experts_implementation` from the module: the names and layout of its weights
(`has_gate`, `is_transposed`, `has_bias`), its gate (`_apply_gate`), activation and optional norm. No family is named.

Shapes: R rows, H hidden size, I intermediate size, e experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.backends.peft import adapted


def grouped_mm(rows_RX: Tensor, weight_eXY: Tensor, offsets_e: Tensor) -> Tensor:
    """One matrix product per group of rows: [R, Y]. Rows past the last offset are left unwritten."""
    return nn.functional.grouped_mm(rows_RX, weight_eXY, offs=offsets_e)


def looped_mm(rows_RX: Tensor, weight_eXY: Tensor, offsets_e: Tensor) -> Tensor:
    """The same, expert by expert, with a host sync: for types and devices that grouped_mm refuses."""
    ends = offsets_e.tolist()
    groups = [rows_RX[start:end] @ weight_eXY[i] for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    rest = rows_RX.new_zeros(rows_RX.shape[0] - ends[-1], weight_eXY.shape[2])
    return torch.cat([*groups, rest])


MATMULS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"grouped_mm": grouped_mm, "eager": looped_mm}


def run_experts(experts: Any, rows_RH: Tensor, offsets_e: Tensor, weights_R: Tensor, matmul: str) -> Tensor:
    """Weighted output of each row's expert: [R, H] in the type of the rows.

    Args:
        experts: an experts module with this rank's experts as plain tensors.
        offsets_e: int32 ends of the experts' rows; rows past the last come back undefined.
        weights_R: routing weights.
        matmul: a name in `MATMULS`.
    """
    mm = MATMULS[matmul]
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    expert_of_row = _expert_of_row(rows_RH, offsets_e) if experts.has_bias else None

    hidden = _linear(mm, experts, up_name, rows_RH, offsets_e, expert_of_row)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    out = _linear(mm, experts, "down_proj", hidden, offsets_e, expert_of_row)
    if experts.has_post_expert_norm:
        out = experts.post_expert_norm(out)
    return (out * weights_R.unsqueeze(1)).to(rows_RH.dtype)


def _linear(
    mm: Callable[[Tensor, Tensor, Tensor], Tensor],
    experts: Any,
    name: str,
    rows: Tensor,
    offsets_e: Tensor,
    expert_of_row: Tensor | None,
) -> Tensor:
    weight = adapted(experts, name)
    # autocast hands over rows in another type than the weights
    out = mm(rows.to(weight.dtype), weight if experts.is_transposed else weight.transpose(1, 2), offsets_e)
    return out if expert_of_row is None else out + getattr(experts, f"{name}_bias")[expert_of_row]


def _expert_of_row(rows: Tensor, offsets_e: Tensor) -> Tensor:
    """Local expert of each row, the last one for rows past the end: int64 [R]."""
    positions = torch.arange(rows.shape[0], device=rows.device, dtype=offsets_e.dtype)
    return torch.searchsorted(offsets_e, positions, right=True).clamp_(max=offsets_e.shape[0] - 1)
