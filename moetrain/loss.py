"""The seam that puts the chunked cross entropy of `kernels/linear_cross_entropy.py` into a Transformers model."""

from __future__ import annotations

import contextlib
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

from moetrain.kernels.linear_cross_entropy import IGNORED, chunked_linear_cross_entropy


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
