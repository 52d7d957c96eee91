"""The small operations around attention and experts, fused by torch.compile, one decoder layer at a time.

Norms, rotary embeddings, residual sums, routers and activations are memory passes; run one by one they took 30 % of
the kernel time of a Qwen3-30B-A3B layer (H200). Experts and communication stay outside: they are kernels already.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moetrain.families import experts_modules

VARIANTS = 64
"""Compiled forms of one function before dynamo runs it eagerly: layers of different kinds share their class's code."""


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> int:
    """Let every decoder layer run compiled from its next call on; the number of layers.

    Hooks stay outside, so sharding and counting see the layers as before. The first calls take longer.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if not any(layer is not other and _holds(other, layer) for other in layers)]
    for _, experts in experts_modules(model):
        _keep_outside(experts)
    for layer in layers:
        _compile_forward(layer, backend)
    return len(layers)


def _compile_forward(module: nn.Module, backend: str) -> None:
    forward: Any = torch.compile(type(module).forward.__get__(module), backend=backend, dynamic=False)
    module.forward = forward


def _keep_outside(module: nn.Module) -> None:
    """Let a module's call, its hooks included, run as it is in the middle of compiled code."""
    module.__class__ = _outside(type(module))


@functools.cache
def _outside(cls: type) -> type:
    """A class by the same name whose call is not compiled; one for each, since compiled code is bound to it."""
    namespace = {
        "__call__": torch.compiler.disable(cls.__call__),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (cls,), namespace)


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())
