"""NVIDIA's TransformerEngine (2.x) as the user's choice for attention, linear layers and RMS norms.

Linear layers and norms stay the modules that they are: only their `forward` runs TransformerEngine's, on the module's
own parameters. So names in checkpoints, shards, optimizer states and adapters do not change.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

HALF = (torch.bfloat16, torch.float16)

PARTS = {
    "attention": "DotProductAttention",
    "linear": "Linear",
    "norm": "RMSNorm",
    "fp8": None,  # recipes for FP8 products are not wired up; products run in the type of the weights
}
"""What moetrain runs on TransformerEngine, and the class of `transformer_engine.pytorch` that it uses."""


@functools.cache
def missing() -> str | None:
    """Why TransformerEngine cannot be used here, in one line; None where it can."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed; pip install --no-build-isolation 'transformer-engine[pytorch]>=2'"
    if not torch.cuda.is_available():
        return "TransformerEngine needs a CUDA device"
    try:
        te = importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
        return f"TransformerEngine does not import: {type(error).__name__}: {str(error).splitlines()[0]}"
    lacking = [name for name in PARTS.values() if name is not None and not hasattr(te, name)]
    return f"TransformerEngine is too old: it has no {', '.join(lacking)}" if lacking else None


def _te() -> Any:
    if reason := missing():
        raise ValueError(f"{reason}. Or choose model.kernels=auto")
    return importlib.import_module("transformer_engine.pytorch")


@torch.compiler.disable  # type: ignore[untyped-decorator] # it asks the environment and its own caches in every call
def attend(
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    *,
    scale: float,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal attention [B, S, H, V], as `moetrain.kernels.attention.attend` without sinks."""
    rows, length, heads, _ = q_BSHD.shape
    sizes = (q_BSHD.shape[3], v_BSGV.shape[3])
    module = _attention_module(heads, k_BSGD.shape[2], sizes, scale, window, cu_seqlens is not None)
    out: Tensor
    if cu_seqlens is None:
        out = module(q_BSHD, k_BSGD, v_BSGV)
    else:
        out = module(
            *(tensor.flatten(0, 1) for tensor in (q_BSHD, k_BSGD, v_BSGV)),
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=length,
            max_seqlen_kv=length,
            pad_between_seqs=False,
        )
    return out.view(rows, length, heads, sizes[1])


@functools.cache
def _attention_module(
    heads: int, key_heads: int, sizes: tuple[int, int], scale: float, window: int | None, documents: bool
) -> nn.Module:
    """It holds no parameters, so one serves every layer of a kind."""
    module: nn.Module = _te().DotProductAttention(
        heads,
        sizes[0] if sizes[0] == sizes[1] else sizes,
        num_gqa_groups=key_heads,
        attention_dropout=0.0,
        qkv_format="thd" if documents else "bshd",
        attn_mask_type="padding_causal" if documents else "causal",
        window_size=(-1 if window is None else window - 1, 0),
        softmax_scale=scale,
    )
    return module


def use_transformer_engine(model: PreTrainedModel) -> dict[str, int]:
    """Run the linear layers and RMS norms of the decoder layers on TransformerEngine; how many of each.

    Layers with half-precision weights only. Routers and experts are not `nn.Linear` in Transformers and stay.

    Raises:
        ValueError: TransformerEngine cannot be used here.
    """
    te = _te()
    counts = {"linear": 0, "norm": 0}
    for layer in model.get_decoder().modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        for module in layer.modules():
            if isinstance(module.forward, functools.partial):  # lent already
                continue
            if type(module) is nn.Linear and module.weight.dtype in HALF:
                _lend(module, _linear(te, module))
                counts["linear"] += 1
            elif (centred := rms_norm_kind(module)) is not None:
                _lend(module, _norm(te, module, centred))
                counts["norm"] += 1
    return counts


def _linear(te: Any, linear: nn.Linear) -> nn.Module:
    module: nn.Module = te.Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        params_dtype=linear.weight.dtype,
        device="meta",
    )
    return module


def _norm(te: Any, norm: Any, centred: bool) -> nn.Module:
    module: nn.Module = te.RMSNorm(
        norm.weight.shape[0],
        eps=_epsilon(norm),
        dtype=norm.weight.dtype,
        device="meta",
        zero_centered_gamma=centred,
    )
    return module


def _lend(module: nn.Module, te_module: nn.Module) -> None:
    """Let `module` run the forward of `te_module` on its own parameters."""
    # held by the function alone: a registered module would add its state to the checkpoint
    module.forward = functools.partial(_forward, module, te_module)


def _forward(module: nn.Module, te_module: nn.Module, x: Tensor) -> Tensor:
    # at every call, as sharding swaps them; and left there, as TransformerEngine's backward reads them once more
    for name, parameter in module._parameters.items():
        if parameter is not None:
            te_module._parameters[name] = parameter
    out: Tensor = te_module(x)
    return out.to(x.dtype)


def rms_norm_kind(module: nn.Module) -> bool | None:
    """Whether an RMS norm multiplies by 1 + weight (True) or weight (False); None for any other module.

    Found by computing: a copy of the module with a random weight on the CPU.
    """
    if list(module._parameters) != ["weight"] or not isinstance(_epsilon(module), float) or module._modules:
        return None
    shape = module._parameters["weight"].shape  # type: ignore[union-attr]
    if len(shape) != 1 or len(inspect.signature(type(module).forward).parameters) != 2:  # a gated norm has a third
        return None
    probe: Any = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.rand(shape, generator=generator), torch.randn(3, *shape, generator=generator)
    probe._parameters = {"weight": nn.Parameter(weight)}
    with torch.no_grad():
        found = type(module).forward(probe, x)
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _epsilon(module))
    for centred in (False, True):
        if found.shape == x.shape and torch.allclose(found, scaled * (weight + centred), atol=1e-5):
            return centred
    return None


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))
