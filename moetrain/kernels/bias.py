"""What the biases of experts need beyond a matrix product.

Shapes: R rows in expert order, E experts, C columns; rows from `offsets_E[-1]` on are neither read nor written.
"""

from __future__ import annotations

import torch

from moetrain.kernels._triton import cdiv, jit, next_power_of_2, runs_triton, tl
from moetrain.kernels.activation import row_experts
from moetrain.kernels.gated import experts_of


def add_row_bias_(
    rows_RC: torch.Tensor, weights_R: torch.Tensor, offsets_E: torch.Tensor, bias_EC: torch.Tensor
) -> None:
    """rows += weight of the row * bias of its expert, in place."""
    if not runs_triton(rows_RC) or rows_RC.numel() == 0:
        rows_RC.copy_(add_row_bias_ref(rows_RC, weights_R, offsets_E, bias_EC))
        return
    num_rows, columns = rows_RC.shape
    experts = offsets_E.numel()
    block = min(next_power_of_2(columns), 1024)
    _add_bias[(cdiv(num_rows, 4),)](
        rows_RC, weights_R, offsets_E, bias_EC, columns, experts, next_power_of_2(experts), 4, block, num_warps=8
    )


def row_bias_backward(grad_RC: torch.Tensor, offsets_E: torch.Tensor, bias_EC: torch.Tensor) -> torch.Tensor:
    """Gradient of `add_row_bias_`'s weights [R] in fp32: each row's product with its expert's bias."""
    if not runs_triton(grad_RC) or grad_RC.numel() == 0:
        return row_bias_backward_ref(grad_RC, offsets_E, bias_EC)
    num_rows, columns = grad_RC.shape
    experts = offsets_E.numel()
    out_R = torch.empty(num_rows, dtype=torch.float32, device=grad_RC.device)
    block = min(next_power_of_2(columns), 1024)
    _dot_bias[(cdiv(num_rows, 4),)](
        grad_RC, out_R, offsets_E, bias_EC, columns, experts, next_power_of_2(experts), 4, block, num_warps=8
    )
    return out_R


def expert_sum(rows_RC: torch.Tensor, weights_R: torch.Tensor | None, offsets_E: torch.Tensor) -> torch.Tensor:
    """Sum of each expert's rows [E, C], times their weights where given, accumulated in fp32: a bias's gradient."""
    if not runs_triton(rows_RC) or rows_RC.numel() == 0:
        return expert_sum_ref(rows_RC, weights_R, offsets_E)
    columns = rows_RC.shape[1]
    out_EC = rows_RC.new_empty(offsets_E.numel(), columns)
    _sum_experts[(offsets_E.numel(), cdiv(columns, 64))](
        rows_RC, weights_R, offsets_E, out_EC, columns, BLOCK_R=128, BLOCK_C=64, num_warps=4
    )
    return out_EC


def add_row_bias_ref(
    rows_RC: torch.Tensor, weights_R: torch.Tensor, offsets_E: torch.Tensor, bias_EC: torch.Tensor
) -> torch.Tensor:
    """`add_row_bias_` in plain torch, not in place."""
    bias_RC = bias_EC[row_experts(offsets_E, rows_RC.shape[0])] * weights_R[:, None]
    return torch.where(_used(rows_RC, offsets_E), rows_RC + bias_RC, rows_RC).to(rows_RC.dtype)


def row_bias_backward_ref(grad_RC: torch.Tensor, offsets_E: torch.Tensor, bias_EC: torch.Tensor) -> torch.Tensor:
    """`row_bias_backward` in plain torch."""
    dtype = torch.promote_types(grad_RC.dtype, torch.float32)
    grad_RC = grad_RC.to(dtype).masked_fill(~_used(grad_RC, offsets_E), 0.0)
    return (grad_RC * bias_EC.to(dtype)[row_experts(offsets_E, grad_RC.shape[0])]).sum(1)


def expert_sum_ref(rows_RC: torch.Tensor, weights_R: torch.Tensor | None, offsets_E: torch.Tensor) -> torch.Tensor:
    """`expert_sum` in plain torch."""
    dtype = torch.promote_types(rows_RC.dtype, torch.float32)
    values_RC = rows_RC.to(dtype) if weights_R is None else rows_RC.to(dtype) * weights_R[:, None]
    values_RC = values_RC.masked_fill(~_used(rows_RC, offsets_E), 0.0)
    out_EC = torch.zeros(offsets_E.numel(), rows_RC.shape[1], dtype=dtype, device=rows_RC.device)
    return out_EC.index_add(0, row_experts(offsets_E, rows_RC.shape[0]), values_RC).to(rows_RC.dtype)


def _used(rows_RC: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return (torch.arange(rows_RC.shape[0], device=rows_RC.device) < offsets_E[-1])[:, None]


@jit
def _add_bias(  # type: ignore[no-untyped-def]
    rows_RC,
    weights_R,
    offsets_E,
    bias_EC,
    columns,
    experts,
    PAD_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    used = tl.load(offsets_E + experts - 1)
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert_R1 = experts_of(row_R, offsets_E, experts, PAD_E)[:, None]
    weight_R1 = tl.load(weights_R + row_R, mask=row_R < used, other=0.0)[:, None].to(tl.float32)
    row_R1 = row_R[:, None].to(tl.int64)
    for start in range(0, columns, BLOCK_C):
        c_1C = start + tl.arange(0, BLOCK_C)[None, :]
        mask_RC = (row_R1 < used) & (c_1C < columns)
        value_RC = tl.load(rows_RC + row_R1 * columns + c_1C, mask=mask_RC, other=0.0).to(tl.float32)
        bias_RC = tl.load(bias_EC + expert_R1 * columns + c_1C, mask=mask_RC, other=0.0).to(tl.float32)
        out = (value_RC + weight_R1 * bias_RC).to(rows_RC.dtype.element_ty)
        tl.store(rows_RC + row_R1 * columns + c_1C, out, mask=mask_RC)


@jit
def _dot_bias(  # type: ignore[no-untyped-def]
    grad_RC,
    out_R,
    offsets_E,
    bias_EC,
    columns,
    experts,
    PAD_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    used = tl.load(offsets_E + experts - 1)
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert_R1 = experts_of(row_R, offsets_E, experts, PAD_E)[:, None]
    row_R1 = row_R[:, None].to(tl.int64)
    sum_R = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, columns, BLOCK_C):
        c_1C = start + tl.arange(0, BLOCK_C)[None, :]
        mask_RC = (row_R1 < used) & (c_1C < columns)
        grad = tl.load(grad_RC + row_R1 * columns + c_1C, mask=mask_RC, other=0.0).to(tl.float32)
        bias = tl.load(bias_EC + expert_R1 * columns + c_1C, mask=mask_RC, other=0.0).to(tl.float32)
        sum_R += tl.sum(grad * bias, 1)
    tl.store(out_R + row_R, sum_R, mask=row_R < used)


@jit
def _sum_experts(  # type: ignore[no-untyped-def]
    rows_RC, weights_R, offsets_E, out_EC, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program sums one expert's rows over a strip of columns, in order: no atomics."""
    expert = tl.program_id(0)
    c_1C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    begin = tl.load(offsets_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_E + expert)
    sum_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_R):
        row_R1 = (start + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
        mask_RC = (row_R1 < end) & (c_1C < columns)
        value_RC = tl.load(rows_RC + row_R1 * columns + c_1C, mask=mask_RC, other=0.0).to(tl.float32)
        if weights_R is not None:
            value_RC *= tl.load(weights_R + row_R1, mask=row_R1 < end, other=0.0).to(tl.float32)
        sum_RC += value_RC
    sum_1C = tl.sum(sum_RC, 0)[None, :]
    tl.store(out_EC + expert * columns + c_1C, sum_1C.to(out_EC.dtype.element_ty), mask=c_1C < columns)
