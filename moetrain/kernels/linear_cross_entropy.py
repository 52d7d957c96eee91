"""Cross entropy of a linear head that never holds the logits of all tokens.

Shape suffixes: N tokens, C tokens of a chunk, H hidden size, V vocabulary.

With 150k entries the logits of 32k tokens take 20 GB in fp32 and their gradient as much again. Here the head, the
loss and its gradient run chunk by chunk in the forward; what stays is the gradient of the hidden states [N, H] and
of the head [V, H], which the backward only scales.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
CHUNK_LOGITS = {"cuda": 2**28, "cpu": 2**23}
"""Logits of a chunk by device. On an H200 (4,096 tokens, 2,048 x 151,936, bf16, Liger's kernel) 2**26 takes 19 ms,
2**28 14 ms and 1.6 GiB, most of it the weight's gradient; all logits at once 18 ms and 6.4 GiB. A CPU does not care."""


def linear_cross_entropy_ref(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The definition: sum of the cross entropies over the labels that are not -100, scalar in fp32."""
    logits_NV = F.linear(hidden_NH, weight_VH, bias_V).float() * logit_scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")


def chunked_linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """`linear_cross_entropy_ref` with the logits of `chunk_tokens` tokens at a time. No host sync.

    Args:
        labels_N: int64; -100 carries no loss.
        logit_scale: factor on the logits, before the soft cap.
        chunk_tokens: None goes by `CHUNK_LOGITS`.

    Returns:
        Scalar in fp32. Gradients have the type of what they belong to; those of weight and bias are summed over the
        chunks in fp32. The backward may run once: it scales the gradients of the forward in place.
    """
    chunk_tokens = chunk_tokens or max(CHUNK_LOGITS[weight_VH.device.type] // weight_VH.shape[0], 1)
    if not torch.is_grad_enabled():
        # the function below computes gradients in its forward for whatever requires them
        hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    total: Tensor = _ChunkedLinearCrossEntropy.apply(
        hidden_NH, weight_VH, labels_N, bias_V, logit_scale, softcap, chunk_tokens
    )
    return total


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        bias_V: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        chunk_tokens: int,
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        grad_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        grad_bias_V = torch.zeros_like(weight_VH[:, 0], dtype=torch.float32) if needs_bias else None
        cross_entropy = liger_cross_entropy if use_liger(hidden_NH.device) else torch_cross_entropy
        total = torch.zeros((), device=hidden_NH.device)
        for start in range(0, hidden_NH.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden_CH = hidden_NH[chunk]
            loss, grad_CV = cross_entropy(
                F.linear(hidden_CH, weight_VH, bias_V), labels_N[chunk], logit_scale, softcap, any(ctx.needs_input_grad)
            )
            total += loss
            if grad_hidden_NH is not None:
                torch.mm(grad_CV, weight_VH, out=grad_hidden_NH[chunk])
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, grad_CV.t(), hidden_CH)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0, dtype=torch.float32)
        ctx.grads = (
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None,
            None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Any:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("the backward of the chunked cross entropy runs once; call the forward again")
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(grad_total) for grad in grads), None, None, None


def torch_cross_entropy(
    logits_CV: Tensor, labels_C: Tensor, logit_scale: float, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of a chunk in fp32, and its gradient by `logits_CV` in their type.

    The gradient is undefined without `needs_grad`.
    """
    scores_CV = logits_CV.float()
    if logit_scale != 1.0:
        scores_CV = scores_CV * logit_scale
    bent_CV = None
    if softcap is not None:
        bent_CV = torch.tanh(scores_CV / softcap)
        scores_CV = softcap * bent_CV
    counts_C1 = (labels_C != IGNORED).unsqueeze(1)
    labels_C1 = labels_C.unsqueeze(1) * counts_C1
    log_sum_C1 = scores_CV.logsumexp(1, keepdim=True)
    loss = ((log_sum_C1 - scores_CV.gather(1, labels_C1)) * counts_C1).sum()
    if not needs_grad:
        return loss, logits_CV
    grad_CV = torch.exp(scores_CV - log_sum_C1)
    grad_CV.scatter_add_(1, labels_C1, -torch.ones_like(log_sum_C1))
    grad_CV.mul_(counts_C1 * logit_scale)
    if bent_CV is not None:
        grad_CV.mul_(1 - bent_CV.square_())
    return loss, grad_CV.to(logits_CV.dtype)


def liger_cross_entropy(
    logits_CV: Tensor, labels_C: Tensor, logit_scale: float, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """`torch_cross_entropy` in one pass of Liger's kernel, which writes the gradient over the logits.

    Liger's own fused linear cross entropy around that kernel reads the number of labels back to the host.
    """
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    logits_CV = logits_CV.mul_(logit_scale) if logit_scale != 1.0 else logits_CV
    tokens, vocabulary = logits_CV.shape
    losses_C = torch.zeros(tokens, device=logits_CV.device)
    liger_cross_entropy_kernel[(tokens,)](
        X_ptr=logits_CV,
        X_stride=logits_CV.stride(0),
        Y_ptr=labels_C,
        Y_stride=labels_C.stride(0),
        weight_ptr=None,
        loss_ptr=losses_C,
        z_loss_ptr=None,
        loss_stride=1,
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocabulary,
        n_non_ignore=1,
        sum_non_ignore_weight=1,
        weight_sum=0.0,
        ignore_index=IGNORED,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=softcap,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=softcap is not None,
        HAS_GRADIENTS=needs_grad,
        BLOCK_SIZE=min(2**15, 1 << (vocabulary - 1).bit_length()),
        num_warps=32,
    )
    return losses_C.sum(), logits_CV.mul_(logit_scale) if logit_scale != 1.0 and needs_grad else logits_CV


@functools.cache
def use_liger(device: torch.device) -> bool:
    """Whether Liger's kernel computes the loss on a device: CUDA, where Liger is installed."""
    if device.type != "cuda":
        return False
    with contextlib.suppress(ImportError):
        import liger_kernel.ops.cross_entropy  # noqa: F401

        return True
    return False


def _add_product(total_fp32: Tensor, left: Tensor, right: Tensor) -> None:
    """`total_fp32 += left @ right`, without rounding the product to bf16."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total_fp32, left, right, out_dtype=torch.float32, out=total_fp32)
    else:
        total_fp32.addmm_(left.float(), right.float())
