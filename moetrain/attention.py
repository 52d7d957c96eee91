"""Attention for Transformers' models on the fastest kernel that a GPU has for the case.

Two registries of Transformers are used. The mask function says what a mask is in place of building it: nothing for a
causal one, `CausalMask` for one with a window or documents. The attention function then takes a kernel by properties
that are known before any data is seen. What no kernel takes goes to the function that Transformers would have called,
with the mask that it expects.

Shape suffixes: B rows, S tokens, H query heads, G key heads, D head size, N documents.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from moetrain.backends import transformer_engine
from moetrain.backends.attention import HALF, Case, choose_backend
from moetrain.kernels.attention import attend, visible_keys
from moetrain.tape import KEEPS

NAME = "moetrain"
NAMES = {"auto": NAME, "transformer_engine": f"{NAME}_transformer_engine"}
"""`model.kernels` to the name in Transformers' registry of attention functions."""


@dataclass(frozen=True, eq=False)
class CausalMask:
    """A causal mask that is not built: what attention gets in place of [B, 1, S, S]."""

    window: int | None = None
    """Keys that a token sees, itself included."""
    cu_seqlens: Tensor | None = None
    """Where documents begin in the flattened rows: int32 [N + 1], the last ones may be empty."""

    def dense(self, query_BHSD: Tensor) -> Tensor:
        """The same as bool [B, 1, S, S]."""
        rows, _, length, _ = query_BHSD.shape
        seen = visible_keys(rows, length, self.window, self.cu_seqlens, query_BHSD.device)
        return seen.expand(rows, 1, length, length)


def attention(
    kernels: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | CausalMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function: query [B, H, S, D], key and value [B, G, S, D] -> [B, S, H, D], contiguous.

    Args:
        kernels: `auto` or `transformer_engine`.
        attention_mask: what `attention_mask` below returned; None means what it means for `sdpa`.
        s_aux: the sinks [H].
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = CausalMask() if attention_mask is None and causal else attention_mask
    if isinstance(mask, CausalMask):
        special = _special(query, key, dropout, softcap, kwargs)
        window = mask.window if mask.window is not None and mask.window < query.shape[2] else None
        documents, sinks = mask.cu_seqlens is not None, s_aux is not None
        sizes = query.shape[3], value.shape[3]
        backend = _backend(kernels, query.device, query.dtype, *sizes, window, documents, sinks, special)
        if backend != "torch":
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            tensors = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
            if backend == "transformer_engine":
                return transformer_engine.attend(*tensors, scale=scale, window=window, cu_seqlens=mask.cu_seqlens), None
            rest: dict[str, Any] = {"scale": scale, "window": window, "cu_seqlens": mask.cu_seqlens, "sinks_H": s_aux}
            out = attend(*tensors, backend, keep=getattr(module, KEEPS, False), **rest)
            return out.contiguous(), None
    kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "s_aux": s_aux, "softcap": softcap}
    return _as_without_us(module, query, key, value, attention_mask, causal, **kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # Dynamo would stop at what it asks
def _backend(kernels: str, *case: Any) -> str:
    return choose_backend(Case(*case), kernels)[0]


def _special(query: Tensor, key: Tensor, dropout: float, softcap: float | None, kwargs: dict[str, Any]) -> str:
    """What makes a call more than causal self-attention with sinks, in words."""
    found = {
        "dropout": dropout > 0,
        "a soft cap": softcap is not None,
        "a position bias": kwargs.get("position_bias") is not None,
        "the weights as output": bool(kwargs.get("output_attentions")),
        "a cache": query.shape[2] != key.shape[2] or kwargs.get("cache") is not None,
        "a single token": query.shape[2] == 1,
    }
    return " and ".join(what for what, is_there in found.items() if is_there)


def _as_without_us(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | CausalMask | None,
    causal: bool,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The family's eager function where SDPA lacks something (sinks, a soft cap), else Transformers' SDPA."""
    if isinstance(mask, CausalMask):
        mask = mask.dense(query)
    if kwargs["s_aux"] is None and kwargs["softcap"] is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return out
    if mask is None and causal and query.shape[2] > 1:
        mask = CausalMask().dense(query)
    if mask is not None and mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    result: tuple[Tensor, Tensor] = eager(module, query, key, value, mask, **kwargs)
    return result


def attention_mask(*, mask_function: Callable[..., Any], **kwargs: Any) -> Tensor | CausalMask | None:
    """Transformers' mask function: a `CausalMask` where a kernel can read it (None if it is only causal), else what
    `sdpa` gets. No host sync in the first case."""
    whole = kwargs["q_length"] == kwargs["kv_length"] and kwargs.get("attention_mask") is None
    if whole and _on_gpu(kwargs.get("device"), kwargs.get("dtype")):
        mask = recognise(mask_function)
        if mask is not None:
            return None if mask.window is None and mask.cu_seqlens is None else mask
    mask_or_none: Tensor | None = sdpa_mask(mask_function=mask_function, **kwargs)
    return mask_or_none


def _on_gpu(device: torch.device | str | None, dtype: torch.dtype | None) -> bool:
    return torch.device(device or "cpu").type == "cuda" and dtype in HALF


def recognise(mask_function: Callable[..., Any]) -> CausalMask | None:
    """The `CausalMask` that a mask function of Transformers stands for, or None where it is another mask.

    A function that separates documents has them as its attribute `documents` (`moetrain.data.isolation`). What
    Transformers adds for positions that restart is the same again, and counts only beside it: their number is on the
    device.
    """
    if mask_function is causal_mask_function:
        return CausalMask()
    if torch.compiler.is_compiling():  # Dynamo does not look into closures
        return None
    parts = _parts(mask_function)
    if "causal_mask_function" not in parts or not parts.keys() <= _KNOWN_PARTS:
        return None
    documents = parts.get("documents")
    if documents is None and "packed_sequence_mask_function" in parts:
        return None
    return CausalMask(parts.get("sliding_window_overlay"), None if documents is None else documents.cu_seqlens)


_KNOWN_PARTS = {"causal_mask_function", "sliding_window_overlay", "packed_sequence_mask_function", "documents"}


def _parts(mask_function: Callable[..., Any]) -> dict[str, Any]:
    """The functions that `mask_function` is the intersection of: their makers' names in `masking_utils`, and what
    stands in each."""
    if hasattr(mask_function, "documents"):
        return {"documents": mask_function.documents}
    if mask_function is causal_mask_function:
        return {"causal_mask_function": None}
    theirs = getattr(mask_function, "__module__", "") == masking_utils.__name__
    maker = mask_function.__qualname__.split(".")[0] if theirs else ""
    values = inspect.getclosurevars(mask_function).nonlocals if maker else {}
    if maker == "and_masks":
        return {name: value for part in values["mask_functions"] for name, value in _parts(part).items()}
    if maker == "remap_positions_for_packed_sequence":  # distances inside a document stay as they are
        return _parts(values["mask_function"])
    return {maker: values.get("sliding_window")}


@dataclass
class Packing:
    """What is known of the documents in the running model's batch. (No context variable: Dynamo cannot read one.)"""

    known: bool = False
    """False where only the positions tell."""
    documents_BS: Tensor | None = None
    """A number for each document, int [B, S]; None where none are packed."""

    def note(self, documents_BS: Tensor | None) -> None:
        self.known, self.documents_BS = True, documents_BS

    def forget(self) -> None:
        self.known, self.documents_BS = False, None


packing = Packing()


_look_for_packing = masking_utils.find_packed_sequence_indices


def _find_packed(position_ids: Tensor) -> Tensor | None:
    """Transformers looks on the device whether positions restart, which waits for the GPU; and takes it for granted
    while a graph is captured, where it would build dense masks."""
    if packing.known and (packing.documents_BS is None or packing.documents_BS.shape == position_ids.shape):
        return packing.documents_BS
    found: Tensor | None = _look_for_packing(position_ids)
    return found


def register() -> None:
    """Make the names of `NAMES` known to Transformers."""
    for kernels, name in NAMES.items():
        AttentionInterface.register(name, functools.partial(attention, kernels))
        AttentionMaskInterface.register(name, attention_mask)
    masking_utils.find_packed_sequence_indices = _find_packed


def select_attention(model: PreTrainedModel, kernels: str = "auto") -> None:
    """Give a model's decoder our attention where it would have used SDPA on a GPU.

    A family whose only default is eager (attention with sinks) gets it where every layer has a kernel: eager holds
    S x S weights. A family that reads its mask itself (`_supports_flash_attn` is False) keeps its own.

    Args:
        kernels: `auto`; `transformer_engine`, to take that one first; `torch`, to undo an earlier selection.

    Raises:
        ValueError: TransformerEngine is chosen and cannot be used here.
    """
    if kernels == "transformer_engine" and (reason := transformer_engine.missing()):
        raise ValueError(f"{reason}. Or choose model.kernels=auto")
    decoder = model.get_decoder()
    default = "sdpa" if decoder._supports_sdpa else "eager"
    ours = decoder.config._attn_implementation in NAMES.values()
    if kernels == "torch" and ours:
        decoder.set_attn_implementation(default)
    if kernels == "torch" or not torch.cuda.is_available() or not decoder._supports_flash_attn:
        return
    if not ours and decoder.config._attn_implementation != default:
        return
    if default == "eager":
        device = torch.device("cuda", torch.cuda.current_device())
        choices = [choose_backend(case._replace(device=device), kernels)[0] for case, _ in attention_cases(decoder)]
        if not choices or "torch" in choices:
            return
    decoder.set_attn_implementation(NAMES[kernels])
    if _note_own_positions not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_note_own_positions, with_kwargs=True)
        decoder.register_forward_hook(_forget_positions, always_call=True)


def _note_own_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Positions that the model makes itself do not restart."""
    if kwargs.get("position_ids") is None and len(args) < 3 and not packing.known:
        packing.note(None)


def _forget_positions(module: nn.Module, args: Any, output: Any) -> None:
    packing.forget()


class AttentionChoice(NamedTuple):
    """Layers of one kind, the backend that they run on, and why those before it are passed over."""

    layers: int
    case: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        passed_over = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
        return f"attention of {self.layers} layers ({self.case}): {self.backend}" + f" ({passed_over})" * bool(
            passed_over
        )


def explain_attention(
    model: PreTrainedModel, documents: bool = False, device: torch.device | None = None
) -> list[AttentionChoice]:
    """What each kind of attention layer in the decoder runs on, and why.

    Args:
        documents: whether batches hold packed documents.
        device: where it will run, for a model on the meta device.
    """
    decoder = model.get_decoder()
    implementation = decoder.config._attn_implementation
    kernels = next((kernels for kernels, name in NAMES.items() if name == implementation), None)
    found = []
    for case, layers in attention_cases(decoder):
        case = case._replace(documents=documents, device=device or case.device)
        if kernels is None:
            found.append(AttentionChoice(layers, str(case), f"Transformers' {implementation}", {}))
        else:
            found.append(AttentionChoice(layers, str(case), *choose_backend(case, kernels)))
    return found


def attention_cases(decoder: PreTrainedModel) -> list[tuple[Case, int]]:
    """The distinct cases among a decoder's softmax attention layers, and how many layers each has."""
    counts: dict[Case, int] = {}
    modules: list[Any] = [module for module in decoder.modules() if hasattr(module, "is_causal")]
    for module in modules:
        parameter = next((p for p in module.parameters() if p.ndim > 1), None)
        head_dim = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
        if parameter is None or head_dim is None:
            continue
        case = Case(
            parameter.device,
            parameter.dtype,
            head_dim,
            getattr(module, "v_head_dim", None) or head_dim,
            _window(decoder, module),
            sinks=getattr(module, "sinks", None) is not None,
            special="" if module.is_causal else "attention in both directions",
        )
        counts[case] = counts.get(case, 0) + 1
    return list(counts.items())


def _window(decoder: PreTrainedModel, module: Any) -> int | None:
    """The window in the mask that the decoder makes for a layer; the layer's own attribute may say another."""
    window: int | None = getattr(decoder.config, "sliding_window", None)
    if "sliding_window is None" in inspect.getsource(type(decoder)):  # one mask for all layers, as in Mixtral
        return window
    kinds = getattr(decoder.config, "layer_types", None) or []
    return window if kinds and kinds[module.layer_idx] == "sliding_attention" else None


register()
