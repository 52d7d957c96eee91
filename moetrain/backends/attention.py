"""What attention, linear layers and norms can run on, and the choice among it.

A choice depends on nothing but what is known before any data is seen, so it is the same in every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moetrain.backends import transformer_engine
from moetrain.backends.transformer_engine import HALF
from moetrain.kernels._triton import triton
from moetrain.kernels.attention_triton import LARGEST_HEAD


class Case(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    window: int | None = None
    documents: bool = False
    sinks: bool = False
    special: str = ""
    """What no kernel here computes, in words; empty for plain causal attention."""

    def __str__(self) -> str:
        size = f"head size {self.head_dim}" + (f"/{self.value_dim}" if self.value_dim != self.head_dim else "")
        window = f"window {self.window}" if self.window else "full"
        parts = [window, size, "documents" * self.documents, "sinks" * self.sinks, self.special]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Backend:
    """One way to compute attention. `missing(case)` says why it cannot, or None."""

    name: str
    missing: Callable[[Case], str | None]


def _misses_gpu(case: Case) -> str | None:
    if case.special:
        return f"no kernel for {case.special}"
    if case.device.type != "cuda":
        return f"needs a CUDA device, not {case.device.type}"
    if case.dtype not in HALF:
        return f"needs bfloat16 or float16, not {str(case.dtype).removeprefix('torch.')}"
    if _capability(case.device) < (8, 0):
        return "needs compute capability 8.0, Ampere or newer"
    if case.head_dim % 8 or case.value_dim % 8:
        return "needs head sizes that 8 divides"
    return None


def _misses_cudnn(case: Case) -> str | None:
    if reason := _misses_gpu(case):
        return reason
    if case.documents or case.window:
        return "torch hands cuDNN neither documents nor a window"
    if _capability(case.device)[0] not in (9, 10):
        return "not the fastest but on Hopper and Blackwell (9.x, 10.x)"
    if (torch.backends.cudnn.version() or 0) < 91501:
        return "cuDNN before 9.15.1 errs on lengths that 128 does not divide"
    if case.value_dim > min(case.head_dim, 128) or (
        case.head_dim > 128 and (case.head_dim, case.value_dim) != (192, 128)
    ):
        return "takes head sizes up to 128, values not larger than keys, and 192/128"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "switched off by torch.backends.cuda.enable_cudnn_sdp"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "its backward is not deterministic"
    return None


def _misses_flash(case: Case) -> str | None:
    if reason := _misses_gpu(case):
        return reason
    if case.head_dim > 256 or case.value_dim > case.head_dim:
        return "takes head sizes up to 256, values not larger than keys"
    if case.head_dim > 192 and _capability(case.device) not in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return "takes head sizes up to 192 in training on this GPU"
    return _misses_flash_switch()


def _misses_triton(case: Case) -> str | None:
    if reason := _misses_gpu(case):
        return reason
    if triton is None:
        return "Triton is not installed (it comes with torch for CUDA)"
    if max(case.head_dim, case.value_dim) > LARGEST_HEAD:
        return f"takes head sizes up to {LARGEST_HEAD}"
    return _misses_flash_switch()


def _misses_flash_switch() -> str | None:
    on = torch.backends.cuda.flash_sdp_enabled()
    return None if on else "switched off by torch.backends.cuda.enable_flash_sdp"


def _misses_transformer_engine(case: Case) -> str | None:
    if reason := _misses_gpu(case) or transformer_engine.missing():
        return reason
    return "keeps sinks as parameters of its own module" if case.sinks else None


def _misses_nothing(case: Case) -> str | None:
    return None


_TE, _TORCH = "transformer_engine", Backend("torch", _misses_nothing)

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "attention": (
        Backend("cudnn", _misses_cudnn),
        Backend("flash", _misses_flash),
        Backend("triton", _misses_triton),
        Backend(_TE, _misses_transformer_engine),
        _TORCH,
    ),
    "linear": (Backend(_TE, lambda case: transformer_engine.missing()), _TORCH),
    "norm": (Backend(_TE, lambda case: transformer_engine.missing()), _TORCH),
    "fp8": (Backend(_TE, lambda case: "no recipe for FP8 products is wired up"), _TORCH),
}
"""Operation to its backends. Attention goes to the first that takes the case; `transformer_engine` is used where the
user chose it, and then comes first. `torch` is what Transformers would have called. `flash` is the flash attention
inside torch, or what `torch.nn.attention.activate_flash_attention_impl` has put in its place; `triton` is
kernels/attention_triton.py."""


def choose_backend(case: Case, kernels: str = "auto") -> tuple[str, dict[str, str]]:
    """The backend of attention that `case` runs on, and why each one before it is passed over.

    Args:
        kernels: `auto`, or `transformer_engine` to take that one first.
    """
    chosen = [backend for backend in BACKENDS["attention"] if backend.name == kernels]
    others = [backend for backend in BACKENDS["attention"] if backend.name not in (kernels, _TE)]
    reasons: dict[str, str] = {}
    for backend in (*chosen, *others):
        reason = backend.missing(case)
        if reason is None:
            return backend.name, reasons
        reasons[backend.name] = reason
    raise AssertionError("the last backend takes everything")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
