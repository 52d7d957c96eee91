"""What a step on a GPU keeps and computes, for the meta device, where its kernels do not run.

A trace (`trace.py`) runs the model's own forward and backward on tensors without memory. Torch's operators and this
package's know there what they would return, so this package's attention, Mamba-2, experts, loss and dispatchers run as
they are, told that they are on a Hopper GPU. What is missing is filled in here, and keeps what the kernels keep:

    attention            where this package's does not apply, torch's flash kernel, or its memory-efficient one
    recurrent layers     beside Mamba-2 the packages mamba_ssm, causal_conv1d and fla
    loss                 Liger's kernel
    dispatch             what other ranks send (`spread.py`)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import moetrain.attention as attention
import moetrain.backends.attention as attention_backends
import moetrain.backends.mamba as mamba
import moetrain.kernels.linear_cross_entropy as head
import moetrain.kernels.mamba2 as mamba2
import moetrain.kernels.mamba2_conv as mamba2_conv
import moetrain.kernels.mamba2_norm as mamba2_norm
from moetrain.data.isolation import Documents
from moetrain.plan.operators import scan_flops
from moetrain.plan.spread import EXCHANGED

HOPPER = torch.device("cuda")


def use_kernels(model: PreTrainedModel, kernels: str) -> None:
    """Put this package's attention and Mamba-2 kernels into a model on the meta device, as on a GPU.

    Args:
        kernels: `torch` leaves attention to Transformers.
    """
    with _patched(
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (attention, "choose_backend", _choose_on_gpu),
        (mamba, "triton", object()),
        (mamba, "_packages", lambda: False),
        *_GPU_PROPERTIES,
    ):
        attention.select_attention(model, "torch" if kernels == "torch" else "auto")
        mamba.use_mamba_kernels(model)


@contextlib.contextmanager
def gpu_kernels(model: nn.Module) -> Iterator[None]:
    """Inside, a model on the meta device keeps and computes what CUDA's kernels would."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    recurrent = [(module, name, _RECURRENT[name]) for module in modules for name in _RECURRENT if hasattr(module, name)]
    with _patched(*_REPLACED, *_GPU_PROPERTIES, *recurrent):
        yield


@contextlib.contextmanager
def _patched(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(patch.object(owner, name, value))
        yield


_choose_backend = attention.choose_backend


def _choose_on_gpu(case: attention_backends.Case, kernels: str) -> Any:
    return _choose_backend(case._replace(device=HOPPER), kernels)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the kernel that CUDA would take; the meta device takes the unfused one."""
    aten: Any = torch.ops.aten
    out: Tensor
    if attn_mask is None and value.shape[-1] == query.shape[-1] <= 256:
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if attn_mask is not None:  # the kernel adds numbers to every head's scores; for the heads a view is enough
        bias = attn_mask if attn_mask.is_floating_point() else torch.empty_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.expand(*query.shape[:3], key.shape[2])
    out = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
    return out


@torch.library.custom_op("moetrain_plan::kernel", mutates_args=())
def _kernel_op(
    inputs: Sequence[Tensor], out: Sequence[int], kept: Sequence[int], scratch: int, scan: int, dense: int
) -> tuple[Tensor, Tensor]:
    """A kernel of another package: its result, and one more tensor that it keeps beside its inputs.

    Args:
        scratch: bytes that it writes besides, in the forward; twice as many in the backward.
        scan, dense: operations of the forward's scan and of its dense products; twice as many in the backward.
    """
    raise AssertionError("only for the meta device")


@_kernel_op.register_fake
def _(inputs, out, kept, scratch, scan, dense):  # type: ignore[no-untyped-def]
    return inputs[0].new_empty(out), inputs[0].new_empty(kept)


@torch.library.custom_op("moetrain_plan::kernel_backward", mutates_args=())
def _kernel_backward_op(
    grad: Tensor, inputs: Sequence[Tensor], kept: Tensor, scratch: int, scan: int, dense: int
) -> list[Tensor]:
    raise AssertionError("only for the meta device")


@_kernel_backward_op.register_fake
def _(grad, inputs, kept, scratch, scan, dense):  # type: ignore[no-untyped-def]
    return [torch.empty_like(value) for value in inputs]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, _, _, *ctx.cost = inputs
    ctx.save_for_backward(output[1], *tensors)


def _kernel_backward(ctx: Any, grad: Tensor, _: Any) -> Any:
    kept, *inputs = ctx.saved_tensors
    cost = [2 * number for number in ctx.cost]
    return _kernel_backward_op(grad, inputs, kept, *cost), None, None, None, None, None


_kernel_op.register_autograd(_kernel_backward, setup_context=_keep)


def kernel(
    inputs: Sequence[Tensor | None],
    out: Sequence[int],
    kept: Sequence[int] = (0,),
    scratch: int = 0,
    scan: int = 0,
    dense: int = 0,
) -> Tensor:
    given = [x for x in inputs if x is not None]
    result: Tensor = _kernel_op(given, list(out), list(kept), scratch, scan, dense)[0]
    return result


def _conv1d(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return kernel([hidden_states, weight, bias], hidden_states.shape)


def _mamba2(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    *,
    outproj_weight: Tensor,
    ngroups: int,
    rmsnorm_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """mamba_ssm's `mamba_split_conv1d_scan_combined`: convolution, scan, norm and output projection. Of what lies
    between them it keeps the scan's result alone."""
    tokens = zxbcdt.shape[0] * zxbcdt.shape[1]
    (width, inner), conv = outproj_weight.shape, conv1d_weight.shape[0]
    state = (conv - inner) // (2 * ngroups)
    states = 4 * tokens // chunk_size * inner * state  # fp32
    scratch = zxbcdt.itemsize * tokens * (conv + inner) + states
    inputs = [zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, outproj_weight, outproj_bias]
    scan, dense = scan_flops(tokens * inner, state, chunk_size), 2 * tokens * inner * width
    return kernel(inputs, (*zxbcdt.shape[:2], width), (*zxbcdt.shape[:2], inner), scratch, scan, dense)


def _mamba2_scan(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **kw: Any) -> Any:
    batch, length, heads, width = hidden_states.shape
    states = 4 * batch * -(-length // chunk_size) * heads * width * B.shape[-1]
    flops = scan_flops(hidden_states.numel(), B.shape[-1], chunk_size)
    inputs = [hidden_states, dt, A, B, C, kw.get("D"), kw.get("dt_bias")]
    out = kernel(inputs, hidden_states.shape, hidden_states.shape, states, flops)
    return (out, None) if kw.get("return_final_states") else out


def _mamba1_scan(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kw: Any) -> Any:
    inputs = [hidden_states, dt, A, B, C, kw.get("D"), kw.get("z"), kw.get("delta_bias")]
    out = kernel(inputs, hidden_states.shape, hidden_states.shape, 0, 9 * hidden_states.numel() * A.shape[-1])
    return (out, None) if kw.get("return_last_state") else out


def _delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **kw: Any) -> Any:
    """fla's chunked delta rules, which keep query and key normalised and a 64 x 64 matrix a chunk and head."""
    batch, length, heads, _ = value.shape
    kept = (query.numel() + key.numel() + batch * length * heads * 64,)
    flops = scan_flops(value.numel(), key.shape[-1], 64)
    return kernel([query, key, value, g, beta], value.shape, kept, value.nbytes, flops), None


_RECURRENT: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _conv1d,
    "mamba2_split_conv1d_scan_combined": _mamba2,
    "mamba2_chunk_scan": _mamba2_scan,
    "mamba_selective_scan": _mamba1_scan,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
}
"""Functions of Transformers' modeling files that call a kernel where its package is installed, and what it does."""


def _liger_cross_entropy(
    logits_CV: Tensor, labels_C: Tensor, logit_scale: float, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy.liger_cross_entropy`: the gradient is written over the logits."""
    return torch.empty(logits_CV.shape[0], device="meta").sum(), logits_CV.mul_(1.0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _whole_rows(documents: Documents) -> list[tuple[int, int, int]]:
    """A document a row: layers that run document by document keep as much for many."""
    rows, length = documents.seq_idx_BS.shape
    return [(row, 0, length) for row in range(rows)]


_GPU_PROPERTIES: tuple[tuple[Any, str, Any], ...] = (
    (attention_backends, "_capability", lambda device: (9, 0)),
    (torch.backends.cudnn, "version", lambda: 91_900),
)
"""What the choice of a kernel asks of the GPU."""

_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (attention, "choose_backend", _choose_on_gpu),
    (attention, "_on_gpu", lambda device, dtype: dtype in attention_backends.HALF),
    *((module, "runs_triton", lambda tensor: True) for module in (mamba, mamba2, mamba2_conv, mamba2_norm)),
    (Documents, "spans", property(_whole_rows)),
    (F, "scaled_dot_product_attention", _attention),
    (head, "use_liger", lambda device: True),
    (head, "liger_cross_entropy", _liger_cross_entropy),
    (head, "_add_product", _add_product),
    (head, "CHUNK_LOGITS", head.CHUNK_LOGITS | {"meta": head.CHUNK_LOGITS["cuda"]}),
    *EXCHANGED,
)
