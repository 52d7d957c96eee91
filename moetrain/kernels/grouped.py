"""Grouped matrix products of the experts: one launch for all experts, no host, any split of the rows.

Shapes: R rows in expert order, E experts, K and N the weight's inputs and outputs, M and N two widths of rows.
Rows from `offsets_E[-1]` on are neither read nor written, here and in the references' results zero.

    grouped_hopper.py    where experts have enough rows, on Hopper: warps with roles, in Gluon
    grouped_triton.py    any split, on Hopper and later, and under Triton's interpreter
    torch._grouped_mm    elsewhere
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from moetrain.kernels import grouped_triton
from moetrain.kernels._triton import INTERPRETED, runs_triton
from moetrain.kernels.aside import runs_aside
from moetrain.kernels.row_stack import rows_at

ENOUGH_ROWS = 128
"""Rows of an expert, in the mean, from which grouped_hopper.py's tiles of as many are full enough: with 256 its six
products take 5 % less than those of grouped_triton.py, which has narrower tiles too (H200, docs/perf-notes.md)."""


def grouped_mm(rows_RK: torch.Tensor, weight_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Product of each row with its expert's weight [R, N]. Differentiable.

    Args:
        weight_EKN: contiguous, or the transposed view of a contiguous [E, N, K].
        offsets_E: row at which each expert ends, int32, not above R.
    """
    result: torch.Tensor = _grouped_mm_op(rows_RK, weight_EKN, offsets_E)
    return result


def multiply_rows(
    rows_RK: torch.Tensor,
    weight_EKN: torch.Tensor,
    offsets_E: torch.Tensor,
    *,
    at: torch.Tensor | None = None,
    out_RN: torch.Tensor | None = None,
    out_at: torch.Tensor | None = None,
) -> torch.Tensor:
    """`grouped_mm` without autograd.

    Args:
        at: the rows are this many further on in memory than `rows_RK` (`RowStack`).
        out_RN: where the result goes, `out_at` rows further on; None makes room.
    """
    if rows_RK.dtype == torch.float64 or rows_RK.numel() == 0 or not _runs_here(rows_RK, weight_EKN):
        rows_RK = rows_at(rows_RK, at)
        plain = multiply_rows_ref if rows_RK.dtype == torch.float64 or rows_RK.numel() == 0 else torch._grouped_mm
        result_RN: torch.Tensor = plain(rows_RK, weight_EKN, offsets_E)
        if out_RN is None:
            return result_RN
        rows_at(out_RN, out_at).copy_(result_RN)
        return out_RN
    if out_RN is None:
        out_RN = rows_RK.new_empty(rows_RK.shape[0], weight_EKN.shape[2])
    _kernels(rows_RK, offsets_E).multiply_rows((rows_RK, at), weight_EKN, offsets_E, (out_RN, out_at))
    return out_RN


def multiply_outer(
    left_RM: torch.Tensor,
    right_RN: torch.Tensor,
    offsets_E: torch.Tensor,
    scale: float = 1.0,
    *,
    left_at: torch.Tensor | None = None,
    right_at: torch.Tensor | None = None,
) -> torch.Tensor:
    """`scale` times the sum over each expert's rows of the outer products of left and right [E, M, N], in fp32: a
    weight's gradient. Zero for an expert without rows.

    Args:
        left_at: the rows of left are this many further on in memory (`RowStack`); likewise `right_at`.
    """
    if left_RM.dtype == torch.float64 or left_RM.numel() == 0 or not _runs_here(left_RM, right_RN):
        left_RM, right_RN = rows_at(left_RM, left_at), rows_at(right_RN, right_at)
        if left_RM.dtype == torch.float64 or left_RM.numel() == 0:
            return multiply_outer_ref(left_RM, right_RN, offsets_E, scale)
        out_EMN = torch._grouped_mm(left_RM.t(), right_RN, offs=offsets_E)
        return out_EMN if scale == 1.0 else out_EMN.mul_(scale)
    out: torch.Tensor = _kernels(left_RM, offsets_E).multiply_outer(
        (left_RM, left_at), (right_RN, right_at), offsets_E, scale
    )
    return out


def multiply_rows_ref(rows_RK: torch.Tensor, weight_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """`multiply_rows` as a loop over experts. Reads the offsets on the host."""
    out_RN = rows_RK.new_zeros(rows_RK.shape[0], weight_EKN.shape[2])
    ends = offsets_E.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        out_RN[start:end] = rows_RK[start:end] @ weight_EKN[expert]
    return out_RN


def multiply_outer_ref(
    left_RM: torch.Tensor, right_RN: torch.Tensor, offsets_E: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """`multiply_outer` as a loop over experts. Reads the offsets on the host."""
    out_EMN = left_RM.new_zeros(offsets_E.numel(), left_RM.shape[1], right_RN.shape[1])
    ends = offsets_E.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        out_EMN[expert] = left_RM[start:end].T @ right_RN[start:end] * scale
    return out_EMN


def _runs_here(*tensors: torch.Tensor) -> bool:
    """True where the Triton kernels can: 16-bit operands, rows of a multiple of 16 bytes, and a GPU with TMA."""
    if not all(runs_triton(t) and t.element_size() == 2 and t.data_ptr() % 16 == 0 for t in tensors):
        return False
    if any(s != 1 and s % 8 for t in tensors for s in t.stride()) or any(1 not in t.stride()[-2:] for t in tensors):
        return False
    return INTERPRETED or torch.cuda.get_device_capability(tensors[0].device) >= (9, 0)


def _kernels(rows_RC: torch.Tensor, offsets_E: torch.Tensor) -> ModuleType:
    """Which of the two files. A program of grouped_hopper.py takes all registers of its multiprocessor, and what would
    run beside it waits: Qwen3-30B-A3B's weight gradients on 4 GPUs, put aside, took 32.5 ms in place of 29.2, and the
    exchange beside them 1.6 more."""
    hopper = _hopper(rows_RC.device)
    if hopper is None or runs_aside() or rows_RC.shape[0] < ENOUGH_ROWS * offsets_E.numel():
        return grouped_triton
    return hopper


@functools.cache
def _hopper(device: torch.device) -> ModuleType | None:
    """grouped_hopper.py, where it runs: on that GPU, with a Triton that has Gluon."""
    if INTERPRETED or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from moetrain.kernels import grouped_hopper
    except ImportError:
        return None
    return grouped_hopper


@torch.library.custom_op("moetrain::grouped_mm", mutates_args=())
def _grouped_mm_op(rows_RK: torch.Tensor, weight_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return multiply_rows(rows_RK.contiguous(), weight_EKN, offsets_E)


@torch.library.custom_op("moetrain::grouped_outer", mutates_args=())
def _grouped_outer_op(left_RM: torch.Tensor, right_RN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return multiply_outer(left_RM.contiguous(), right_RN.contiguous(), offsets_E)


@_grouped_mm_op.register_fake
def _(rows_RK: torch.Tensor, weight_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return rows_RK.new_empty(rows_RK.shape[0], weight_EKN.shape[2])


@_grouped_outer_op.register_fake
def _(left_RM: torch.Tensor, right_RN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return left_RM.new_empty(offsets_E.shape[0], left_RM.shape[1], right_RN.shape[1])


def _grouped_mm_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx, grad_RN):  # type: ignore[no-untyped-def]
    rows_RK, weight_EKN, offsets_E = ctx.saved_tensors
    grad_rows = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_rows = _grouped_mm_op(grad_RN, weight_EKN.transpose(1, 2), offsets_E)
    if ctx.needs_input_grad[1] and weight_EKN.stride(1) == 1:
        grad_weight = _grouped_outer_op(grad_RN, rows_RK, offsets_E).transpose(1, 2)
    elif ctx.needs_input_grad[1]:
        grad_weight = _grouped_outer_op(rows_RK, grad_RN, offsets_E)
    return grad_rows, grad_weight, None


_grouped_mm_op.register_autograd(_grouped_mm_backward, setup_context=_grouped_mm_setup)
