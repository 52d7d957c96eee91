"""LoRA on experts that are spread over ranks (PEFT's `target_parameters`), and on layers of a sharded model.

PEFT adds `scaling * lhs @ rhs` to the whole stack of experts, [E, ...], before the experts run. Here the stack is a
DTensor and each rank holds the rows of its own experts, so the factors are handed to the experts' arithmetic, which
takes its slice of them. The adapter itself stays replicated and is saved as PEFT saves it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

_FACTORS = "_lora_factors"
_OFFSET = "_first_local_expert"
_DATA_AXES = {"dp_replicate", "fsdp"}
"""Axes over which a layer's weight is stored in parts and used whole."""


def support_sharded_experts(experts: nn.Module, first_local_expert: int) -> None:
    """Let PEFT adapt the parameters of an experts module whose rank holds the experts from `first_local_expert` on."""
    setattr(experts, _OFFSET, first_local_expert)


def adapted(experts: nn.Module, name: str) -> Tensor:
    """The parameter `name` of this rank's experts with the active adapters' updates added: [e, ...]."""
    weight: Tensor = getattr(experts, name)
    for lhs, rhs, scaling in getattr(experts, _FACTORS, {}).get(name, ()):
        local = slice(getattr(experts, _OFFSET), getattr(experts, _OFFSET) + weight.shape[0])
        # the sum keeps the weight's type, as in PEFT: autocast would round the weight to bf16 before the update
        with torch.autocast(weight.device.type, enabled=False):
            weight = torch.baddbmm(weight, lhs[local], rhs[local], alpha=scaling)
    return weight


def is_adapted(experts: nn.Module) -> bool:
    """Whether `adapted` adds anything to a parameter of the module now."""
    return any(getattr(experts, _FACTORS, {}).values())


def lend(experts: nn.Module, name: str, factors: list[tuple[Tensor, Tensor, float]]) -> None:
    """Let `adapted` add the sum of `scaling * lhs @ rhs`, with `(lhs, rhs, scaling)` of all experts, to a parameter."""
    experts.__dict__.setdefault(_FACTORS, {})[name] = factors


def teach_dtensors() -> None:
    """Teach PEFT's LoRA, where it is installed, about DTensors. Plain tensors keep its own way."""
    if importlib.util.find_spec("peft") is None:
        return
    lora: Any = importlib.import_module("peft.tuners.lora.layer")
    if getattr(lora.ParamWrapper._activate_lora, "_knows_dtensors", False):
        return
    lora.ParamWrapper._activate_lora = _activate_sharded(lora.ParamWrapper._activate_lora)
    for layer in (lora.Linear, lora.ParamWrapper):
        layer.merge = _merge_sharded(layer.merge)
        layer.unmerge = _merge_sharded(layer.unmerge)
    lora.LoraLayer._get_in_out_features = _whole_features(lora.LoraLayer._get_in_out_features)


def _activate_sharded(original: Any) -> Any:
    """`ParamWrapper._activate_lora`, which lends the adapters to the parameter during a forward."""

    @contextlib.contextmanager
    def activate(self: Any, active_adapters: list[str]) -> Iterator[None]:
        experts, parameter = self.get_base_layer(), self.get_param()
        if not isinstance(parameter, DTensor):
            with original(self, active_adapters):
                yield
            return
        if not hasattr(experts, _OFFSET) or parameter.ndim != 3:
            raise ValueError(
                f"target_parameters cannot adapt {type(experts).__name__}.{self.parameter_name}, a sharded parameter "
                f"of shape {tuple(parameter.shape)}: only stacks of expert matrices, as in 'experts.down_proj'. "
                "Reach linear layers through target_modules."
            )
        factors = [self.get_delta_factors(name) for name in active_adapters if name in self.lora_A]
        lend(experts, self.parameter_name, factors)
        try:
            yield
        finally:
            lend(experts, self.parameter_name, [])

    activate._knows_dtensors = True  # type: ignore[attr-defined]
    return activate


def _merge_sharded(original: Any) -> Any:
    """`merge` or `unmerge` of a layer: every rank has the whole update and takes the part its shard needs."""

    @functools.wraps(original)
    def merge(*args: Any, **kwargs: Any) -> Any:
        with implicit_replication():
            return original(*args, **kwargs)

    return merge


def _whole_features(original: Any) -> Any:
    """`LoraLayer._get_in_out_features`. PEFT 0.21 takes the local shape on the mesh of FSDP with replicas."""

    def features(self: Any, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            axes = set(module.weight.device_mesh.mesh_dim_names or ())
            if axes and axes <= _DATA_AXES:
                return module.in_features, module.out_features
        found: tuple[int, int] | tuple[None, None] = original(self, module)
        return found

    return features
