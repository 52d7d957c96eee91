"""The state-space scan of a Mamba-2 layer (SSD, arXiv 2405.21060), and its other two parts.

Each head keeps a state of P x N numbers. A token decays it, adds its own x B^T to it and reads it with C:

    dt = clip(softplus(dt + dt_bias));  state = exp(dt A) state + dt x B^T;  y = state C + D x

The first token of a document finds an empty state.

    mamba2_conv.py       causal_conv: the convolution and SiLU before the scan
    mamba2_scan.py       the scan's kernels forward, mamba2_scan_backward.py backward
    mamba2_norm.py       gated_norm: the norm after the scan

Flash-linear-attention 0.6 has the same recurrence as `simple_gla`. It wants B and C repeated for every head (at
Nemotron-3-Nano's shape 67 MB each, and their gradients as much), and chunks listed by the documents' lengths, a shape
that changes from batch to batch and keeps the step out of a CUDA graph.

Shapes: B rows, S tokens, H heads, P numbers a head (head_dim), G groups of heads that share B and C, N state size,
K chunks, L tokens of a chunk (target t, source s).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moetrain.kernels._triton import runs_triton
from moetrain.kernels.mamba2_conv import causal_conv
from moetrain.kernels.mamba2_norm import gated_norm
from moetrain.kernels.mamba2_scan import scan_forward, tiles
from moetrain.kernels.mamba2_scan_backward import scan_backward

__all__ = ["causal_conv", "chunk_scan", "chunk_scan_ref", "gated_norm"]


def chunk_scan(
    x_BSHP: torch.Tensor,
    dt_BSH: torch.Tensor,
    A_H: torch.Tensor,
    B_BSGN: torch.Tensor,
    C_BSGN: torch.Tensor,
    D_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    seq_idx_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scan's y [B, S, H, P] in the dtype of x, from an empty state. Differentiable, deterministic, no host sync.

    The backward computes the states again: nothing but the inputs is kept.

    Args:
        x_BSHP, B_BSGN, C_BSGN: one dtype; read in place where their last two dimensions are dense.
        dt_BSH: time steps before bias and softplus.
        A_H: negative; exp(dt A) is a head's decay.
        dt_limit: bounds of the time step after the softplus.
        seq_idx_BS: integers, rising from document to document; None is one document a row.
    """
    if not runs_triton(x_BSHP) or x_BSHP.numel() == 0:
        return chunk_scan_ref(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H, dt_limit, seq_idx_BS)
    low, high = dt_limit
    y_BSHP: torch.Tensor = _scan_op(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H, seq_idx_BS, low, high)
    return y_BSHP


def chunk_scan_ref(
    x_BSHP: torch.Tensor,
    dt_BSH: torch.Tensor,
    A_H: torch.Tensor,
    B_BSGN: torch.Tensor,
    C_BSGN: torch.Tensor,
    D_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    seq_idx_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """`chunk_scan` without chunks: every token weighs every earlier one, S x S numbers a head."""
    accurate = torch.promote_types(x_BSHP.dtype, torch.float32)
    x, B, C = (tensor.to(accurate) for tensor in (x_BSHP, B_BSGN, C_BSGN))
    dt = F.softplus(dt_BSH.to(accurate) + dt_bias_H.to(accurate)).clamp(*dt_limit)
    ends_BHS = torch.cumsum(dt * A_H.to(accurate), 1).transpose(1, 2)
    sees_Bts = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[None]
    if seq_idx_BS is not None:
        sees_Bts = sees_Bts & (seq_idx_BS[:, :, None] == seq_idx_BS[:, None, :])
    decay_BHts = (ends_BHS[..., :, None] - ends_BHS[..., None, :]).masked_fill(~sees_Bts[:, None], -torch.inf).exp()
    scores_BHts = torch.einsum("btgn,bsgn->bgts", C, B).repeat_interleave(x.shape[2] // B.shape[2], 1) * decay_BHts
    y = torch.einsum("bhts,bsh,bshp->bthp", scores_BHts, dt, x) + D_H.to(accurate)[:, None] * x
    return y.to(x_BSHP.dtype)


@torch.library.custom_op("moetrain::chunk_scan", mutates_args=())
def _scan_op(
    x_BSHP: torch.Tensor,
    dt_BSH: torch.Tensor,
    A_H: torch.Tensor,
    B_BSGN: torch.Tensor,
    C_BSGN: torch.Tensor,
    D_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    seq_idx_BS: torch.Tensor | None,
    low: float,
    high: float,
) -> torch.Tensor:
    size = tiles(x_BSHP, B_BSGN)
    return scan_forward(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H, seq_idx_BS, low, high, size)


@torch.library.custom_op("moetrain::chunk_scan_backward", mutates_args=())
def _scan_backward_op(
    grad_BSHP: torch.Tensor,
    x_BSHP: torch.Tensor,
    dt_BSH: torch.Tensor,
    A_H: torch.Tensor,
    B_BSGN: torch.Tensor,
    C_BSGN: torch.Tensor,
    D_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    seq_idx_BS: torch.Tensor | None,
    low: float,
    high: float,
) -> list[torch.Tensor]:
    """Gradients of x, dt, A, B, C, D and dt_bias, each in the dtype of what it belongs to."""
    size = tiles(x_BSHP, B_BSGN)
    return scan_backward(grad_BSHP, x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H, seq_idx_BS, low, high, size)


@_scan_op.register_fake
def _(x_BSHP, *args):  # type: ignore[no-untyped-def]
    return x_BSHP.new_empty(x_BSHP.shape)


@_scan_backward_op.register_fake
def _(grad_BSHP, x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H, *args):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H)]


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.low, ctx.high = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad_BSHP):  # type: ignore[no-untyped-def]
    return *_scan_backward_op(grad_BSHP, *ctx.saved_tensors, ctx.low, ctx.high), None, None, None


_scan_op.register_autograd(_gradients, setup_context=_save_inputs)
