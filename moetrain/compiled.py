"""The small operations around attention and experts, fused by torch.compile, one decoder layer at a time.

Norms, rotary embeddings, residual sums, routers and activations are memory passes; run one by one they took 30 % of
the kernel time of a Qwen3-30B-A3B layer (H200). Experts and communication stay outside: they are kernels already.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from transformers import PreTrainedModel

from moetrain.families import experts_modules, outermost_layers
from moetrain.kernels import top_k

VARIANTS = 64
"""Compiled forms of one function before dynamo runs it eagerly: layers of different kinds share their class's code."""


def compile_layers(model: PreTrainedModel, mode: str = "auto", backend: str = "inductor") -> str:
    """Let every decoder layer run compiled from its next call on. The first calls take longer.

    A layer's hooks stay outside, so sharding and counting see it as before, and so does activation checkpointing: what
    is recomputed is compiled.

    Args:
        mode: `auto` compiles on GPUs; `on`; `off`.

    Returns:
        What was chosen, for people.
    """
    if mode == "off" or (mode == "auto" and model.device.type != "cuda"):
        return "layers: not compiled, " + ("as asked" if mode == "off" else "since this is no GPU")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)
    for _, experts in experts_modules(model):
        cls: Any = type(experts)
        experts.__class__ = _called_outside(cls)
    layers = outermost_layers(model)
    for layer in layers:
        cls = type(layer)
        layer.__class__ = _with_compiled_forward(cls, backend)
    return f"layers: {len(layers)} compiled"


@functools.cache
def _with_compiled_forward(cls: type, backend: str) -> type:
    """The class with its forward compiled; Transformers puts activation checkpointing around that of every subclass."""
    options: Any = {"post_grad_custom_pre_pass": _OwnTopK()} if backend == "inductor" else None
    plain: Any = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    forward: Any = torch.compile(plain, backend=backend, dynamic=False, options=options)
    return _by_the_same_name(cls, {"forward": forward})


@functools.cache
def _called_outside(cls: type) -> type:
    """The class with a call, hooks included, that runs as it is in the middle of compiled code."""
    return _by_the_same_name(cls, {"__call__": torch.compiler.disable(cls.__call__)})  # type: ignore[operator]


def _by_the_same_name(cls: type, namespace: dict[str, Any]) -> type:
    return type(cls.__name__, (cls,), namespace | {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


class _OwnTopK(CustomGraphPass):
    """Replaces `torch.topk` over a router's scores by a kernel for short rows, in the graph of a layer's forward."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default):
            if _fits_top_k(*node.args, **node.kwargs):
                node.target, node.args, node.kwargs = torch.ops.moetrain.top_k.default, node.args[:2], {}

    def uuid(self) -> Any:
        """What compiled code that is kept on disk depends on."""
        return get_hash_for_files((__file__, top_k.__file__))


def _fits_top_k(scores: fx.Node, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> bool:
    value = scores.meta["val"]
    last = dim in (-1, value.dim() - 1)
    small = isinstance(k, int) and k <= top_k.MOST_CHOICES and value.shape[-1] <= top_k.MOST_EXPERTS
    return value.is_cuda and value.dtype in top_k.DTYPES and largest and last and small
