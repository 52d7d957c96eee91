"""Kernels of the expert layer, each beside its plain reference `_ref`, and the table of what runs where.

routing.py      route_sort: choices of the router to rows in expert order
top_k.py        top_k: the router's choices
permutation.py  permute, unpermute_reduce: tokens to rows, and their sum back
grouped.py      grouped_mm: products with each expert's weight (grouped_hopper.py, grouped_triton.py: its kernels)
gated.py        activation * routing weight (activation.py: the table of activations)
bias.py         biases of experts
rows.py         the experts' arithmetic made of them
row_stack.py    RowStack: the rows that the backward needs of all layers in one buffer
experts.py      experts_forward, expert_rows: the layer, differentiable
exchange.py     Exchange: tokens to other ranks and back, static in shape (nvlink.py: kernels of NvlinkExchange)
attention.py    attend: causal attention by cuDNN, flash or Triton, with documents, windows and sinks
attention_triton.py    its kernels whose cost does not depend on the number of documents
mamba2.py       chunk_scan, and in mamba2_*.py the convolution before it, the norm after it and the scan's kernels
aside.py        work on a second stream
linear_cross_entropy.py    the head and its loss, without the logits of all tokens
adamw.py        the optimizer's update of all tensors in one pass (tensor_list.py: lists of tensors on the device)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moetrain.kernels._triton import triton
from moetrain.kernels.activation import Activation, recognise_activation
from moetrain.kernels.exchange import Exchange, GatherExchange, NvlinkExchange
from moetrain.kernels.experts import expert_rows, experts_forward, scale_gradients
from moetrain.kernels.grouped import grouped_mm
from moetrain.kernels.permutation import permute, unpermute_reduce
from moetrain.kernels.routing import Routing, route_sort
from moetrain.kernels.row_stack import Place, RowStack
from moetrain.kernels.rows import GRADIENTS, ExpertWeights, expert_weights

__all__ = [
    "GRADIENTS",
    "KERNELS",
    "Activation",
    "Backend",
    "Exchange",
    "ExpertWeights",
    "GatherExchange",
    "NvlinkExchange",
    "Place",
    "Routing",
    "RowStack",
    "expert_rows",
    "expert_weights",
    "experts_forward",
    "grouped_mm",
    "permute",
    "recognise_activation",
    "route_sort",
    "scale_gradients",
    "select_backend",
    "unpermute_reduce",
]


@dataclass(frozen=True)
class Backend:
    """One way to run an operation. `missing(device, dtype)` says why it cannot run there, or None."""

    name: str
    missing: Callable[[torch.device, torch.dtype], str | None]


def _misses_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if triton is None:
        return "Triton is not installed (it comes with torch for CUDA)"
    if device.type != "cuda":
        return f"Triton needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{dtype} is not among bfloat16, float16, float32"
    return None


def _misses_tma(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _misses_triton(device, dtype):
        return reason
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "the copy engine (TMA) needs compute capability 9.0, Hopper or newer"
    return None if dtype.itemsize == 2 else f"{dtype} has no 16-bit tensor core product"


def _misses_grouped_mm(device: torch.device, dtype: torch.dtype) -> str | None:
    return "torch._grouped_mm has no float64" if dtype == torch.float64 else None


def _misses_nothing(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


_TRITON, _TORCH = Backend("triton", _misses_triton), Backend("torch", _misses_nothing)

KERNELS: dict[str, tuple[Backend, ...]] = {
    "route_sort": (_TRITON, _TORCH),
    "permute": (_TRITON, _TORCH),
    "gated_activation": (_TRITON, _TORCH),
    "bias": (_TRITON, _TORCH),
    "grouped_mm": (
        Backend("triton_tma", _misses_tma),
        Backend("torch_grouped_mm", _misses_grouped_mm),
        Backend("torch_loop", _misses_nothing),
    ),
    "adamw": (_TRITON, _TORCH),
}
"""Operation to its backends, the preferred one first. A tensor goes to the first that can take it."""


def select_backend(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The backend that `op` uses there, and why each preferred one is passed over.

    Raises:
        ValueError: no such operation; the message lists them.
    """
    if op not in KERNELS:
        raise ValueError(f"no kernel {op!r}; valid: {', '.join(KERNELS)}")
    reasons: dict[str, str] = {}
    for backend in KERNELS[op]:
        reason = backend.missing(device, dtype)
        if reason is None:
            return backend.name, reasons
        reasons[backend.name] = reason
    raise AssertionError("the last backend of every operation takes everything")
