"""Keeping the documents of a packed row apart inside a Transformers model.

What Transformers 5.23 does on its own, and what is missing:

- Softmax attention: a mask is cut at document boundaries when `create_causal_mask` receives `position_ids` that
  restart, no `attention_mask` and no cache. Some families (gpt_oss, afmoe, granitemoehybrid) do not pass the
  positions on, so nothing is cut.
- Flash attention: boundaries are read from `position_ids` for batches of one row only; larger batches need
  `cu_seq_lens_q` and its companions.
- Mamba, linear attention and short convolutions: the plain PyTorch paths know no boundaries and refuse `seq_idx`.
- It looks on the device whether positions restart, which waits for the GPU.

`isolate_documents` closes all of them from outside the modelling code, with `seq_idx` of the batch as the only input.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks

from moetrain import attention as our_attention
from moetrain.backends.mamba import reads_seq_idx

# B rows, S tokens in a row, D hidden size, N documents.

# Families whose layers depend on the place in the row in a way that no mask and no cut of a layer undoes.
_CANNOT_ISOLATE = {
    "deepseek_v4": "its compressed attention pools windows of the whole row",
    "minimax_m3_vl": "its sparse attention selects blocks that span documents",
    "qwen4_exp": "its n-gram embeddings read tokens across documents",
    "inkling": "its attention scales logits by the position in the row",
    "inkling2": "its attention scales logits by the position in the row",
}
_MASKED_ATTENTION = ("eager", "sdpa", "flex_attention", *our_attention.NAMES.values())
_RECURRENT = ("linear_attention", "conv", "mamba")
_FLASH_KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Documents:
    """Where the documents of a batch lie. `seq_idx_BS` is equal inside a document, and different in the next one; no
    row has more than `max_documents` of them (None: unknown)."""

    def __init__(self, seq_idx_BS: Tensor, max_documents: int | None = None) -> None:
        self.seq_idx_BS = seq_idx_BS
        self.max_documents = max_documents

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Where the documents begin in the flattened batch, and its length: int32 [N + 1] on the device of `seq_idx`.

        With `max_documents` N is that of every row, the last documents are empty, and nothing waits for the device;
        a batch with more fails there. Without, N is counted, which reads the device once.
        """
        rows, length = self.seq_idx_BS.shape
        is_first_BS = self.seq_idx_BS.diff(prepend=self.seq_idx_BS[:, :1]) != 0
        is_first_BS[:, 0] = True
        document_T = is_first_BS.flatten().cumsum(0)  # from 1
        num_documents = int(document_T[-1]) if self.max_documents is None else rows * self.max_documents
        bounds = torch.arange(1, num_documents + 2, device=document_T.device)
        cu_seqlens = torch.searchsorted(document_T, bounds, out_int32=True)
        torch._assert_async(cu_seqlens[-1] == rows * length, "a row holds more documents than max_documents")
        return cu_seqlens

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(row, first token, one past the last token) of every document, in reading order. Reads the device once."""
        return [
            (row, start, end)
            for row, seq_idx_S in enumerate(self.seq_idx_BS.tolist())
            for start, end in pairwise(_boundaries(seq_idx_S))
        ]

    def flash_kwargs(self) -> dict[str, Any]:
        """Cumulative document lengths over the flattened batch (int32), as flash attention takes them."""
        length = self.seq_idx_BS.shape[1]
        ends = [row * length + end for row, _, end in self.spans]
        cumulative = torch.tensor([0, *ends], dtype=torch.int32, device=self.seq_idx_BS.device)
        longest = max(end - start for _, start, end in self.spans)
        return dict(zip(_FLASH_KWARGS, (cumulative, cumulative, longest, longest), strict=True))


def _boundaries(values: list[int]) -> list[int]:
    return [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]


# The documents of the model whose forward is running: mask functions are looked up by name in a table of
# Transformers and receive no reference to the model.
_running: ContextVar[Documents | None] = ContextVar("moetrain_documents", default=None)


class _Latest:
    """The documents of a model's latest forward. It outlives the forward: recomputation in the backward needs it."""

    documents: Documents | None = None


_isolated: WeakSet[nn.Module] = WeakSet()


def packing_support(model: PreTrainedModel) -> str | None:
    """Why `model` cannot keep the documents of a packed row apart; None when `isolate_documents` makes it exact."""
    config = model.config.get_text_config()
    for model_type in (model.config.model_type, config.model_type):
        if reason := _CANNOT_ISOLATE.get(model_type.removesuffix("_text")):
            return f"{model_type} cannot keep the documents of a packed row apart: {reason}"
    attention = config._attn_implementation or "eager"
    if attention not in _MASKED_ATTENTION and "flash" not in attention:
        return (
            f"attn_implementation={attention!r} has no document mask; "
            f"choose one of {', '.join(_MASKED_ATTENTION)}, flash_attention_2"
        )
    kinds = set(getattr(config, "layer_types", None) or []) & set(_RECURRENT)
    if kinds and not recurrent_mixers(model):
        return f"{config.model_type} has {', '.join(sorted(kinds))} layers whose modules are not recognised"
    return None


def isolate_documents(model: PreTrainedModel, max_documents: int | None = None) -> PreTrainedModel:
    """Make `model` treat every document of a packed row as if it were alone, for batches that carry `seq_idx`.

    After this call `model(input_ids, position_ids, seq_idx)` gives each token the logits and gradients of a forward
    over its document alone; `seq_idx` is int [B, S], equal inside a document, and `position_ids` restart with each
    document. A batch without `seq_idx` runs as before. Such a batch must have no `attention_mask`, and runs without
    a key-value cache. The model is changed in place (hooks and wrapped forwards; no parameters) and returned.

    Recurrent layers (Mamba, linear attention, short convolutions) run once per document. Mamba-2 with the packages
    `mamba_ssm` and `causal_conv1d` runs once, its kernels read `seq_idx`. Under activation checkpointing, families
    that pass `seq_idx` to their layers but not to these modules (Jamba, Zaya) need the backward of a batch before the
    forward of the next.

    Args:
        max_documents: most documents in a row, padding counted as one. With it, `moetrain` attention waits for nothing
            and can be captured in a CUDA graph that later batches replay.

    Raises:
        ValueError: the family or its attention implementation cannot do it; see `packing_support`.
    """
    if model in _isolated:
        return model
    if reason := packing_support(model):
        raise ValueError(f"{reason}. Set data.packing=false, or data.document_mask=false to let documents mix")
    _isolated.add(model)
    latest = _Latest()
    flash = "flash" in (model.config.get_text_config()._attn_implementation or "")

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        seq_idx_BS, running = kwargs.get("seq_idx"), _running.get()
        if seq_idx_BS is None or (running is not None and running.seq_idx_BS is seq_idx_BS):
            latest.documents = running  # not None in a decoder, whose outer model may keep seq_idx to itself
        else:  # in every forward: one that replays in a graph has other documents in the same tensor
            latest.documents = Documents(seq_idx_BS, max_documents)
        _running.set(latest.documents)
        if latest.documents is not None:
            our_attention.packing.note(latest.documents.seq_idx_BS)
            if isinstance(kwargs.get("attention_mask"), Tensor):
                raise ValueError("a packed batch has no attention_mask: its rows hold documents, not padding")
            kwargs["use_cache"] = False  # with a cache Transformers does not look for packed documents
            if flash:
                kwargs.update(latest.documents.flash_kwargs())
        return args, kwargs

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        _running.set(None)
        our_attention.packing.forget()

    # Masks are made in the decoder, or around it in models that also see images; losses without logits call it alone.
    decoder = model.get_decoder()
    for module in {model, decoder}:
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True, always_call=True)
    mixer: Any
    for mixer in recurrent_mixers(decoder):
        mixer.forward_document, mixer.latest = mixer.forward, latest
        mixer.forward = types.MethodType(_forward_per_document, mixer)  # a partial object would be compiled for each
    _mask_by_document()
    return model


def recurrent_mixers(model: nn.Module) -> list[nn.Module]:
    """Modules that carry state from token to token: they hold a grouped causal convolution or a recurrent state."""
    return [module for module in model.modules() if _is_recurrent(module)]


def _is_recurrent(module: nn.Module) -> bool:
    if any(isinstance(child, nn.Conv1d) and child.groups > 1 for child in module.children()):
        return True
    parameters = inspect.signature(module.forward).parameters
    linear = getattr(module, "layer_type", None) in _RECURRENT and "past_key_values" in parameters
    return "hidden_states" in parameters and ("cache_params" in parameters or (linear and not hasattr(module, "mlp")))


def _forward_per_document(mixer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a mixer on each document of `hidden_states` [B, S, D] alone and join the results.

    A mixer returns one tensor, or a tuple; of a tuple, tensors with the axes of the tokens are joined and others
    (such as a final state, meaningless over several documents) become None.
    """
    forward, latest = mixer.forward_document, mixer.latest
    kwargs = {name: value for name, value in kwargs.items() if name not in _FLASH_KWARGS}
    seq_idx_BS = kwargs.pop("seq_idx", None)
    documents = latest.documents
    if seq_idx_BS is not None and (documents is None or documents.seq_idx_BS is not seq_idx_BS):
        documents = Documents(seq_idx_BS)  # a layer of an earlier forward, recomputed
    if documents is None:
        return forward(hidden_states, *args, **kwargs)
    assert hidden_states.shape[:2] == documents.seq_idx_BS.shape, "seq_idx does not belong to this batch"
    if reads_seq_idx(mixer, hidden_states):
        return forward(hidden_states, *args, seq_idx=documents.seq_idx_BS, **kwargs)
    parts = [forward(hidden_states[row : row + 1, start:end], *args, **kwargs) for row, start, end in documents.spans]
    if isinstance(parts[0], Tensor):
        return _join(parts, documents)
    return tuple(_join(list(column), documents) for column in zip(*parts, strict=True))


def _join(parts: list[Any], documents: Documents) -> Tensor | None:
    """[1, s, ...] of each document -> [B, S, ...]; None for values without the axis of the tokens."""
    for part, (_, start, end) in zip(parts, documents.spans, strict=True):
        if not isinstance(part, Tensor) or part.shape[:2] != (1, end - start):
            return None
    joined: Tensor = torch.cat(parts, dim=1)
    return joined.reshape(*documents.seq_idx_BS.shape, *joined.shape[2:])


def _mask_by_document() -> None:
    """Let Transformers' mask functions also cut at the documents of the model that is running."""
    for name in _MASKED_ATTENTION:
        original = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(original, "by_document"):
            wrapped = functools.partial(_document_mask, original)
            wrapped.by_document = True  # type: ignore[attr-defined]
            AttentionMaskInterface.register(name, wrapped)


def _document_mask(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    documents = _running.get()
    if documents is None:
        return original(*args, **kwargs)
    seq_idx_BS = documents.seq_idx_BS
    if (kwargs["batch_size"], kwargs["q_length"], kwargs["kv_length"]) != (*seq_idx_BS.shape, seq_idx_BS.shape[1]):
        return original(*args, **kwargs)  # not the mask of the text: an image tower of the same model

    def same_document(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return seq_idx_BS[batch_idx, q_idx] == seq_idx_BS[batch_idx, kv_idx]

    same_document.documents = documents  # type: ignore[attr-defined]
    kwargs["mask_function"] = and_masks(kwargs["mask_function"], same_document)
    kwargs["allow_is_causal_skip"] = False
    return original(*args, **kwargs)
