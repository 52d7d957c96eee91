"""Causal attention on the kernels of a GPU, with documents, sliding windows and sinks.

Shape suffixes: B rows, S tokens of a row, T = B * S, H query heads, G key heads (a divisor of H), D size of a query and
a key, V size of a value, N documents.

The sink of a head is one more logit s in its softmax, with a value of zero. No library kernel knows it, or needs to:
with the kernel's log-sum-exp L over the keys,

    L' = logaddexp(L, s)        out' = out * exp(L - L')

and the kernel's own backward is right if it is given out' and L'. It computes P = exp(scores - L'), delta = the sum of
grad * out' over V, and from them P * (grad value^T - delta), the gradient of the scores. That of the sink is the sum of
-exp(s - L') * delta over rows and tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels import attention_triton
from moetrain.kernels._triton import cdiv, jit, next_power_of_2, runs_triton, tl
from moetrain.tape import receive_copy

aten = torch.ops.aten


def attend(
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    backend: str,
    *,
    scale: float,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    sinks_H: Tensor | None = None,
    keep: bool = False,
) -> Tensor:
    """Causal attention [B, S, H, V]: each token sees itself and what precedes it in its document and its window.

    Static in shape and without a host sync, differentiable in q, k, v and the sinks.

    Args:
        backend: `cudnn` (no window, no documents), `flash`, `triton` (head sizes up to 128), or `reference` (any
            device, S x S scores).
        scale: factor on the scores.
        window: keys that a token sees, itself included.
        cu_seqlens: int32 [N + 1], where the documents begin in the flattened rows, ending with T. None of them spans
            two rows; the last ones may be empty.
        sinks_H: one more logit of each head, any float type.
        keep: a recomputation takes the result of the forward (`moetrain.tape`).
    """
    size = v_BSGV.shape[-1]
    if backend == "cudnn" and sinks_H is None and not keep:
        # torch's own operator and derivative: its compiler knows the strides, and copies nothing before or after it
        tensors = (tensor.transpose(1, 2) for tensor in (q_BSHD, k_BSGD, v_BSGV))
        plain: Tensor = aten._scaled_dot_product_cudnn_attention(
            *tensors, None, torch.is_grad_enabled(), 0.0, True, False, scale=scale
        )[0]
        contiguous: Tensor = _ContiguousGradient.apply(plain.transpose(1, 2))
        return contiguous
    if backend == "flash" and size < q_BSHD.shape[-1]:  # the kernel has one size for keys and values
        v_BSGV = F.pad(v_BSGV, (0, q_BSHD.shape[-1] - size))
    out: Tensor = _attention_op(q_BSHD, k_BSGD, v_BSGV, sinks_H, cu_seqlens, scale, window, backend, keep)[0]
    return out[..., :size]


def attend_ref(
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    *,
    scale: float,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The definition, in the type of its inputs and with autograd: the sink is a column of the scores."""
    scores_BHSS = _scores(q_BSHD, k_BSGD, cu_seqlens, scale, window)
    if sinks_H is not None:
        column_BHS1 = sinks_H[:, None, None].expand(*scores_BHSS.shape[:3], 1)
        scores_BHSS = torch.cat([scores_BHSS, column_BHS1], dim=-1)
    weights_BHSS = scores_BHSS.softmax(-1)[..., : k_BSGD.shape[1]]
    return (weights_BHSS @ _per_query_head(v_BSGV, q_BSHD)).transpose(1, 2)


def visible_keys(rows: int, length: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Which keys (last axis) each query sees: bool [rows, 1, length, length], or [1, ...] where the rows agree."""
    position = torch.arange(length, device=device)
    distance_SS = position[:, None] - position
    seen = (distance_SS >= 0)[None, None]
    if window is not None:
        seen = seen & (distance_SS < window)
    if cu_seqlens is not None:
        token_T = torch.arange(rows * length, dtype=cu_seqlens.dtype, device=device)
        document_BS = torch.searchsorted(cu_seqlens, token_T, right=True).view(rows, length)
        seen = seen & (document_BS[:, None, :, None] == document_BS[:, None, None, :])
    return seen


def sink_gradient(grad_BSHV: Tensor, out_BSHV: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """Gradient of the sinks [H] in fp32; `out` and `lse` count them in, `grad` is contiguous."""
    if not runs_triton(grad_BSHV):
        return sink_gradient_ref(grad_BSHV, out_BSHV, lse_BHS, sinks_H)
    rows, length, heads, size = grad_BSHV.shape
    block_s, block_v = 64, next_power_of_2(size)
    blocks = cdiv(length, block_s)
    parts = grad_BSHV.new_empty(rows * blocks, heads, dtype=torch.float32)
    _sink_gradient_kernel[(rows * blocks, heads)](
        grad_BSHV,
        out_BSHV,
        lse_BHS,
        sinks_H,
        parts,
        length,
        heads,
        size,
        blocks,
        *out_BSHV.stride()[:3],
        *lse_BHS.stride(),
        BLOCK_S=block_s,
        BLOCK_V=block_v,
    )
    return parts.sum(0)


def sink_gradient_ref(grad_BSHV: Tensor, out_BSHV: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """`sink_gradient` by torch's operators, in the type of the log-sum-exp."""
    delta_BHS = (grad_BSHV.to(lse_BHS.dtype) * out_BSHV).sum(-1).transpose(1, 2)
    return -((sinks_H[:, None] - lse_BHS).exp() * delta_BHS).sum((0, 2))


@jit
def _sink_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    parts_ptr,
    length,
    heads,
    size,
    blocks,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    lse_stride_b,
    lse_stride_h,
    lse_stride_s,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One head of one block of tokens: its part of the sum."""
    block, head = tl.program_id(0), tl.program_id(1)
    row = (block // blocks).to(tl.int64)
    s = (block % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    v = tl.arange(0, BLOCK_V)
    valid = (s[:, None] < length) & (v[None, :] < size)
    grad_at = ((row * length + s[:, None]) * heads + head) * size + v[None, :]
    out_at = row * out_stride_b + s[:, None] * out_stride_s + head * out_stride_h + v[None, :]
    grad = tl.load(grad_ptr + grad_at, mask=valid, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + out_at, mask=valid, other=0.0).to(tl.float32)
    lse_at = row * lse_stride_b + head * lse_stride_h + s * lse_stride_s
    lse = tl.load(lse_ptr + lse_at, mask=s < length, other=float("inf"))
    weight = tl.exp(tl.load(sinks_ptr + head).to(tl.float32) - lse)
    tl.store(parts_ptr + block * heads + head, -tl.sum(weight * tl.sum(grad * out, axis=1), axis=0))


@torch.library.custom_op("moetrain::attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks_H: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, S, H, V] and the log-sum-exp with the sinks in it: [B, H, S]; flash's with documents is [H, T]."""

    def compute() -> tuple[Tensor, Tensor]:
        if backend == "triton":  # it begins its sums with the sink
            return attention_triton.forward(q, k, v, sinks_H, cu_seqlens, scale, window)
        out, lse = _FORWARD[backend](q, k, v, cu_seqlens, scale, window)
        if sinks_H is not None:
            with_sink = torch.logaddexp(lse, sinks_H.to(lse.dtype)[:, None])
            out.mul_((_per_row(lse, q) - _per_row(with_sink, q)).exp().transpose(1, 2)[..., None])
            lse = with_sink
        return out, lse

    return receive_copy(compute) if keep else compute()


@torch.library.custom_op("moetrain::attention_backward", mutates_args=())
def _attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks_H: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sinks (empty without sinks)."""
    grad = grad.contiguous()  # see _ContiguousGradient
    grads = _BACKWARD[backend](grad, q, k, v, out, lse, cu_seqlens, scale, window)
    if sinks_H is None:
        return *grads, lse.new_empty(0)
    return *grads, sink_gradient(grad, out, _per_row(lse, q), sinks_H).to(sinks_H.dtype)


class _ContiguousGradient(torch.autograd.Function):
    """Identity. Torch keeps cuDNN's plans by the strides of q, k and v alone: those of the gradient must always be the
    same, or a plan for others reads it wrongly."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def _per_row(lse: Tensor, q: Tensor) -> Tensor:
    """A log-sum-exp as [B, H, S]."""
    return lse if lse.dim() == 3 else lse.unflatten(1, q.shape[:2]).transpose(0, 1)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    rows, length = q.shape[:2]
    if cu_seqlens is not None:
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, length, length, 0.0, True, False, scale=scale, **_flash_window(window)
    )
    return (out if cu_seqlens is None else out.unflatten(0, (rows, length))), lse


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length = q.shape[:2]
    if cu_seqlens is not None:
        grad, q, k, v, out = (tensor.flatten(0, 1) for tensor in (grad, q, k, v, out))
    random = q.new_empty(2, dtype=torch.uint64)  # the state of a dropout that there is not
    grads = aten._flash_attention_backward(
        *(grad, q, k, v, out, lse, cu_seqlens, cu_seqlens, length, length, 0.0, True, random, random),
        scale=scale,
        **_flash_window(window),
    )
    whole = (tensor if cu_seqlens is None else tensor.unflatten(0, (rows, length)) for tensor in grads)
    dq, dk, dv = (tensor.contiguous() for tensor in whole)
    return dq, dk, dv


def _flash_window(window: int | None) -> dict[str, int | None]:
    """The kernel counts the keys before the token's own."""
    if window is None:
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": window - 1, "window_size_right": 0}


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    assert cu_seqlens is None and window is None, "torch hands cuDNN neither documents nor a window"
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    return out.transpose(1, 2), lse.squeeze(-1)


def _cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    length = q.shape[1]
    random = q.new_empty((), dtype=torch.int64)  # the state of a dropout that there is not
    grad, q, k, v, out = (tensor.transpose(1, 2) for tensor in (grad, q, k, v, out))
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *(grad, q, k, v, out, lse.unsqueeze(-1), random, random, None, None, None, length, length, 0.0, True),
        scale=scale,
    )
    dq, dk, dv = (tensor.transpose(1, 2) for tensor in grads)
    return dq, dk, dv


def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    scores_BHSS = _scores(_at_least_fp32(q), _at_least_fp32(k), cu_seqlens, scale, window)
    lse_BHS = scores_BHSS.logsumexp(-1)
    out_BHSV = scores_BHSS.softmax(-1) @ _per_query_head(_at_least_fp32(v), q)
    lse = lse_BHS if cu_seqlens is None else lse_BHS.transpose(0, 1).flatten(1)
    return out_BHSV.transpose(1, 2).to(q.dtype).contiguous(), lse


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of the flash kernels, which know the softmax only by its log-sum-exp."""
    grad, out, q32, k32, v32 = (_at_least_fp32(tensor) for tensor in (grad, out, q, k, v))
    weights_BHSS = (_scores(q32, k32, cu_seqlens, scale, window) - _per_row(lse, q)[..., None]).exp()
    grad_BHSV = grad.transpose(1, 2)
    delta_BHS1 = (grad * out).sum(-1).transpose(1, 2)[..., None]
    grad_scores_BHSS = weights_BHSS * (grad_BHSV @ _per_query_head(v32, q).mT - delta_BHS1) * scale
    grad_q_BHSD = grad_scores_BHSS @ _per_query_head(k32, q)
    grad_k_BHSD = grad_scores_BHSS.mT @ q32.transpose(1, 2)
    grad_v_BHSV = weights_BHSS.mT @ grad_BHSV
    groups = (k.shape[2], q.shape[2] // k.shape[2])
    grad_k_BGSD, grad_v_BGSV = (tensor.unflatten(1, groups).sum(2) for tensor in (grad_k_BHSD, grad_v_BHSV))
    dq, dk, dv = (tensor.transpose(1, 2).to(q.dtype) for tensor in (grad_q_BHSD, grad_k_BGSD, grad_v_BGSV))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _scores(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float, window: int | None) -> Tensor:
    """Scaled scores [B, H, S, S], -inf where a key is not seen."""
    scores_BHSS = q.transpose(1, 2) @ _per_query_head(k, q).mT * scale
    seen = visible_keys(q.shape[0], q.shape[1], window, cu_seqlens, q.device)
    return scores_BHSS.masked_fill(~seen, -torch.inf)


def _per_query_head(k_BSGD: Tensor, q_BSHD: Tensor) -> Tensor:
    """Keys or values [B, H, S, D], each repeated for the query heads that share it."""
    return k_BSGD.repeat_interleave(q_BSHD.shape[2] // k_BSGD.shape[2], dim=2).transpose(1, 2)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


_FORWARD = {"cudnn": _cudnn_forward, "flash": _flash_forward, "reference": _reference_forward}
_BACKWARD = {
    "cudnn": _cudnn_backward,
    "flash": _flash_backward,
    "triton": attention_triton.backward,
    "reference": _reference_backward,
}


@_attention_op.register_fake
def _(q, k, v, sinks_H, cu_seqlens, scale, window, backend, keep):  # type: ignore[no-untyped-def]
    lse_type = torch.promote_types(q.dtype, torch.float32)
    rows, length, heads, _ = q.shape
    if cu_seqlens is not None and backend != "triton":
        out = torch.empty_like(q.flatten(0, 1)[..., : v.shape[-1]]).unflatten(0, (rows, length))
        return out, q.new_empty(heads, rows * length, dtype=lse_type)
    lse = q.new_empty(rows, heads, length, dtype=lse_type)
    if backend in ("triton", "reference"):
        return q.new_empty(*q.shape[:3], v.shape[-1]), lse
    return torch.empty_like(q[..., : v.shape[-1]]), lse


@_attention_backward_op.register_fake
def _(grad, q, k, v, sinks_H, cu_seqlens, out, lse, scale, window, backend):  # type: ignore[no-untyped-def]
    grad_sinks = lse.new_empty(0) if sinks_H is None else torch.empty_like(sinks_H)
    if backend in ("flash", "triton"):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), grad_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.window, ctx.backend, _keep = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _run_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    dq, dk, dv, dsinks = _attention_backward_op(grad, *ctx.saved_tensors, ctx.scale, ctx.window, ctx.backend)
    return dq, dk, dv, dsinks if ctx.needs_input_grad[3] else None, *[None] * 5


_attention_op.register_autograd(_run_backward, setup_context=_setup_context)
