"""Mamba-2 layers of Transformers on real kernels.

Which code a Mamba-2 layer runs, the first that can:

1. Kernels of the hub, where the model was loaded with `use_kernels=True`.
2. The packages mamba-ssm and causal-conv1d, where both are installed: Transformers calls them by itself.
3. The Triton kernels of moetrain.kernels.mamba2, for tensors on a GPU.
4. Transformers' plain PyTorch: on CPU, and while generating with a cache.

The third is put under the mixer's own forward, by the names that it calls:

    causal_conv1d_fn                    causal_conv
    mamba2_chunk_scan                   chunk_scan
    mamba2_split_conv1d_scan_combined   nothing, as without mamba-ssm: the mixer then calls the other two
    its `norm`, where it has groups     gated_norm

In Transformers 5.23 six families share these functions to the letter, so no family is named: nemotron_h,
granitemoehybrid, bamba, zamba2, mamba2, and falcon_h1, which keeps its own norm.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moetrain.kernels._triton import INTERPRETED, runs_triton, triton
from moetrain.kernels.mamba2 import causal_conv, chunk_scan, gated_norm
from moetrain.kernels.mamba2_conv import MAX_TAPS
from moetrain.kernels.mamba2_scan import can_read

PACKAGES = ("mamba_ssm", "causal_conv1d")


def use_mamba_kernels(model: PreTrainedModel) -> str | None:
    """Put our kernels under the model's Mamba-2 layers, for tensors on a GPU; on CPU nothing changes.

    The mixers are changed in place: their projections, and adapters on them, are called as before.

    Returns:
        A sentence for the user if the layers will be slow on this machine's GPU, with the remedy; else None.
    """
    mixers = mamba2_mixers(model)
    on_gpu = torch.cuda.is_available()
    if not mixers or getattr(model, "use_kernels", False) or _packages() or not (on_gpu or INTERPRETED):
        return None
    reason = _cannot(mixers[0], model.dtype)
    if reason is None:
        for mixer in mixers:
            mixer.forward = types.MethodType(_rewired(type(mixer).forward), mixer)
            mixer.reads_seq_idx = True
            if hasattr(mixer.norm, "group_size"):
                mixer.norm.forward = types.MethodType(_norm, mixer.norm)
        return None
    return (
        f"the Mamba-2 layers of {model.config.model_type!r} run as plain PyTorch, many times slower than a kernel: "
        f"{reason}; install mamba-ssm and causal-conv1d"
    )


def mamba2_mixers(model: nn.Module) -> list[Any]:
    """Modules whose forward calls Transformers' Mamba-2 functions."""
    return [module for module in model.modules() if _is_mixer(module)]


def reads_seq_idx(mixer: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether a Mamba-2 layer's kernels keep the documents of a packed row apart, given `seq_idx`.

    (Mamba-1's scan takes no `seq_idx`, and Transformers drops it without a word.)
    """
    ours = getattr(mixer, "reads_seq_idx", False) and runs_triton(hidden_states)
    return ours or (_is_mixer(mixer) and _packages())


def _is_mixer(module: nn.Module) -> bool:
    return hasattr(module, "A_log") and hasattr(sys.modules[type(module).__module__], "mamba2_chunk_scan")


def _packages() -> bool:
    return all(find_spec(name) is not None for name in PACKAGES)


def _cannot(mixer: Any, dtype: torch.dtype) -> str | None:
    """Why our kernels cannot run the layer."""
    if triton is None:
        return "Triton is not installed"
    if mixer.activation not in ("silu", "swish"):
        return f"our kernels know no activation {mixer.activation!r}"
    if mixer.conv_kernel_size > MAX_TAPS:
        return f"our kernels take a convolution of {MAX_TAPS} taps at most, this one has {mixer.conv_kernel_size}"
    if not can_read(mixer.head_dim, mixer.ssm_state_size, dtype.itemsize):
        return (
            f"our kernels read 16 bytes at a time, and a head of {mixer.head_dim} or a state of "
            f"{mixer.ssm_state_size} in {dtype} is no multiple of that"
        )
    return None


@functools.cache
def _rewired(forward: Any) -> Callable[..., torch.Tensor]:
    """The forward of a mixer class, with our functions under the names that it calls.

    Its module stays as it is: models without our kernels may be in the same process.
    """
    forward = inspect.unwrap(forward)
    names = forward.__globals__.copy()
    del names["__name__"]  # torch.compile would look the names up in the module of that name
    names["causal_conv1d_fn"] = functools.partial(_conv, names["causal_conv1d_fn"])
    names["mamba2_chunk_scan"] = functools.partial(_scan, names["mamba2_chunk_scan"])
    names["mamba2_split_conv1d_scan_combined"] = _not_combined
    rewired = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    rewired.__kwdefaults__ = forward.__kwdefaults__
    return rewired


def _not_combined(*args: Any, **kwargs: Any) -> None:
    return None


def _conv(
    original: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`causal_conv1d_fn`: [B, C, S], [C, K], [C]."""
    if not runs_triton(hidden_states):
        return original(hidden_states, weight, bias, activation=activation, seq_idx=seq_idx, **kwargs)
    return causal_conv(hidden_states.transpose(1, 2), weight, bias, seq_idx).transpose(1, 2)


def _scan(
    original: Callable[..., Any],
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    seq_idx: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """`mamba2_chunk_scan`: [B, S, H, P], [B, S, H], [H], [B, S, G, N] twice, as the mixers call it."""
    if runs_triton(hidden_states) and initial_states is None and not return_final_states:
        return chunk_scan(hidden_states, dt, A, B, C, D, dt_bias, dt_limit, seq_idx)
    kwargs |= {"initial_states": initial_states, "return_final_states": return_final_states, "seq_idx": seq_idx}
    return original(hidden_states, dt, A, B, C, D=D, dt_bias=dt_bias, dt_limit=dt_limit, **kwargs)


def _norm(norm: Any, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    if gate is None or not runs_triton(hidden_states):
        original: torch.Tensor = type(norm).forward(norm, hidden_states, gate)
        return original
    groups = hidden_states.shape[-1] // norm.group_size
    return gated_norm(hidden_states, gate, norm.weight, groups, norm.variance_epsilon)
