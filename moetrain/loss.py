"""Cross entropy that never holds the logits of all tokens, and the seam that puts it into a Transformers model.

Shape suffixes: N tokens, C tokens of a chunk, H hidden size, V vocabulary.

With 150k entries the logits of 32k tokens take 20 GB in fp32 and their gradient as much again. Here the head, the
loss and its gradient run chunk by chunk in the forward; what stays is the gradient of the hidden states [N, H] and
of the head [V, H], which the backward only scales.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

IGNORED = -100
CHUNK_LOGITS = {"cuda": 2**28, "cpu": 2**23}
"""Logits of a chunk by device. On an H200 (4,096 tokens, 2,048 x 151,936, bf16, Liger's kernel) 2**26 takes 19 ms,
2**28 14 ms and 1.6 GiB, most of it the weight's gradient; all logits at once 18 ms and 6.4 GiB. A CPU does not care."""


def install_loss(model: PreTrainedModel, mode: str = "auto") -> str:
    """Let a model compute its training loss without the logits of all tokens.

    The loss is computed inside the head's forward, where FSDP2 has its weight gathered, and `model.loss_function`
    hands it on, divided as Transformers does: by `num_items_in_batch`, or by the label tokens without it. This is so
    while the model is in training mode, or inside `without_logits`, and gets labels; `output.logits` is None then.
    Otherwise (generation, evaluation, `logits_to_keep`, `return_dict=False`) nothing changes.

    What the model does between head and loss is found by a trial of its forward without weights: a constant factor
    (Granite, Cohere) and a soft cap (Gemma) are carried over.

    Args:
        mode: `fused`; `plain`, which also takes out an earlier installation; or `auto`, fused where possible.

    Returns:
        What was chosen and why, for people.

    Raises:
        ValueError: an unknown mode, or `fused` for a model where it would be wrong.
    """
    if mode not in ("auto", "fused", "plain"):
        raise ValueError(f"unknown loss {mode!r}; valid: auto, fused, plain")
    if (earlier := getattr(model, "_moetrain_loss", None)) is not None:
        earlier.remove()
    if mode == "plain":
        return "loss: plain, as asked"
    reason = _head_obstacle(model)
    between = None if reason else _between_head_and_loss(model)
    if isinstance(between, _Between):
        model._moetrain_loss = _Seam(model, between)  # type: ignore[assignment]
        return f"loss: fused linear cross entropy{between.describe()}"
    reason = reason or between
    if mode == "fused":
        raise ValueError(f"train.loss=fused does not fit {type(model).__name__}: {reason}; use auto or plain")
    return f"loss: plain, since {reason}"


@contextlib.contextmanager
def without_logits(model: PreTrainedModel) -> Iterator[None]:
    """Inside, an installed loss serves evaluation too: with labels given, `output.logits` is None."""
    seam = getattr(model, "_moetrain_loss", None)
    if seam is None:
        yield
        return
    seam.in_evaluation = True
    try:
        yield
    finally:
        seam.in_evaluation = False


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


class _Seam:
    """The fused loss in one model. Between two hooks around the model's forward it holds the labels and the loss."""

    def __init__(self, model: PreTrainedModel, between: _Between) -> None:
        self.model, self.between = model, between
        self.head = model.get_output_embeddings()
        self.plain_loss = model.loss_function
        self.in_evaluation = False
        self.targets_N: Tensor | None = None
        self.total: Tensor | None = None
        self.argument_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        self.head.forward = self.head_forward
        model.loss_function = self.loss

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        del self.head.forward
        self.model.loss_function = self.plain_loss
        del self.model._moetrain_loss

    def before(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.argument_names, args, strict=False)) | kwargs
        labels, keep = given.get("labels"), given.get("logits_to_keep", 0)
        all_logits = isinstance(keep, int) and keep == 0
        if labels is None or not (model.training or self.in_evaluation) or not all_logits:
            return
        as_tuple = given.get("return_dict") is False or not model.config.return_dict
        if as_tuple or given.get("ignore_index", IGNORED) != IGNORED:
            return
        targets = given.get("shift_labels")
        if targets is None:
            targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        self.targets_N = targets.reshape(-1)

    def head_forward(self, hidden: Tensor) -> Tensor:
        """The logits; or, with labels at hand, the sum of the losses in the place of the logits, [1, 1, 1]."""
        weight, bias = self.head.weight, self.head.bias
        if self.targets_N is None:
            return F.linear(hidden, weight, bias)
        assert not isinstance(weight, DTensor), "the head's weight is not gathered"
        hidden_NH = hidden.reshape(-1, hidden.shape[-1])
        assert len(hidden_NH) == len(self.targets_N), "labels and hidden states differ in number"
        targets_N = self.targets_N.to(hidden.device)
        total = chunked_linear_cross_entropy(
            hidden_NH, weight, targets_N, bias, self.between.logit_scale, self.between.softcap
        )
        # the loss goes through the head's output, so that FSDP2 sees an ordinary backward of the head
        self.total = total.view(1, 1, 1)
        return self.total

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Takes the place of `model.loss_function`."""
        if self.total is None or self.targets_N is None:
            plain: Tensor = self.plain_loss(logits, labels, vocab_size, num_items_in_batch, **kwargs)
            return plain
        if num_items_in_batch is None:
            num_items_in_batch = (self.targets_N != IGNORED).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(self.total.device)
        return self.total.sum() / num_items_in_batch

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        fused = self.total is not None
        self.targets_N = self.total = None
        if not fused or not isinstance(output, ModelOutput):
            return None
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})


@dataclass(frozen=True)
class _Between:
    """What a model does to its logits before the loss: `softcap * tanh(logit_scale * logits / softcap)`."""

    logit_scale: float
    softcap: float | None

    def describe(self) -> str:
        scale = "" if self.logit_scale == 1.0 else f", logits times {self.logit_scale:g}"
        return scale + ("" if self.softcap is None else f", soft cap {self.softcap:g}")


def _head_obstacle(model: PreTrainedModel) -> str | None:
    """Why the head cannot be fused, as far as the head alone tells."""
    head = model.get_output_embeddings()
    if head is None:
        return "it has no output head"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return f"its head is a {type(head).__name__} with a forward of its own, not a plain nn.Linear"
    if model.loss_function is not ForCausalLMLoss:
        return f"its loss is {getattr(model.loss_function, '__name__', model.loss_function)}, not ForCausalLMLoss"
    if model.base_model is model:
        return "it has no base model under its head"
    return None


def _between_head_and_loss(model: PreTrainedModel) -> _Between | str:
    """Find what happens between head and loss, by calling the forward with stand-ins for base model, head and loss.

    No weight is touched and nothing is communicated, so it works on sharded models and on the meta device.

    Returns:
        Factor and soft cap, or the reason why they do not describe the model.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    # linear part, soft-cap's bend, saturation, and ordinary values
    magnitudes = torch.tensor([1e-4, 30.0, 1e6, 1.0])
    logits = torch.randn(1, 4, vocabulary, generator=torch.Generator().manual_seed(0)) * magnitudes[:, None]
    labels = torch.zeros(1, 4, dtype=torch.int64)
    total = torch.ones(1, 1, 1)
    try:
        received = _trial(model, logits.clone(), labels)
        received_total = _trial(model, total, labels)
    except Exception as error:  # any code of the model runs here; where it fails, the seam must keep out
        return f"a trial of its forward failed ({type(error).__name__}: {error})"
    if len(received) != 1 or received[0][1] is not labels:
        return "it does not call its loss once with its logits and labels"
    if len(received_total) != 1 or received_total[0][0].numel() != 1 or total.item() != 1.0:
        return "it needs the shape of its logits, or writes into them, before the loss"
    found = received[0][0].detach().double()
    if found.shape != logits.shape:
        return f"its loss gets logits of another shape, {tuple(found.shape)} for {tuple(logits.shape)}"
    given = logits.double()
    scale = ((found[:, 0] * given[:, 0]).sum() / given[:, 0].square().sum()).item()
    if torch.allclose(found, scale * given, rtol=1e-5):
        return _Between(_exact(scale), None)
    softcap = found[:, 2].abs().max().item()
    if torch.allclose(found, softcap * torch.tanh(scale * given / softcap), rtol=1e-5):
        return _Between(_exact(scale), _exact(softcap))
    return "it changes its logits before the loss by more than a factor and a soft cap"


def _exact(value: float) -> float:
    """The short decimal fraction that fp32 arithmetic blurred, if there is one within 1e-6."""
    short = float(f"{value:.5g}")
    return short if abs(short - value) <= 1e-6 * abs(value) else value


def _trial(model: PreTrainedModel, logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the loss of a model receives when its head returns `logits`: a list of (logits, labels)."""
    received: list[tuple[Tensor, Tensor]] = []

    def loss(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        received.append((logits, labels))
        return torch.zeros(())

    def head_answer(hidden: Tensor) -> Tensor:
        assert hidden.shape[:2] == labels.shape, "the head gets other tokens than the labels belong to"
        return logits

    real_loss = model.loss_function
    base = _StandIn(model.base_model, lambda *args, **kwargs: _BaseOutput(torch.zeros(*labels.shape, 1)))
    head = _StandIn(model.get_output_embeddings(), head_answer)
    with torch.no_grad(), _replaced(model, base), _replaced(model, head):
        model.loss_function = loss
        try:
            model.forward(input_ids=labels, labels=labels, use_cache=False, output_router_logits=False)
        finally:
            model.loss_function = real_loss
    return received


class _StandIn(nn.Module):
    """Answers calls with a function, and questions about attributes as the module it stands for."""

    def __init__(self, real: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["real"] = real
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)


class _BaseOutput:
    """Output of a base model that has hidden states and nothing else, by index, by name or unpacked."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


@contextlib.contextmanager
def _replaced(model: nn.Module, stand_in: _StandIn) -> Iterator[None]:
    """Put a stand-in into the module tree for a while."""
    real = stand_in.__dict__["real"]
    parent, name = next(
        (parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is real
    )
    parent._modules[name] = stand_in
    try:
        yield
    finally:
        parent._modules[name] = real
