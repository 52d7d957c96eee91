"""LoRA on experts that are spread over ranks (PEFT's `target_parameters`).

PEFT adds `scaling * lhs @ rhs` to the whole stack of experts, [E, ...], before the experts run. Here the stack is a
DTensor and each rank holds the rows of its own experts, so the factors are handed to the experts' arithmetic, which
takes its slice of them. The adapter itself stays replicated and is saved as PEFT saves it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_FACTORS = "_lora_factors"
_OFFSET = "_first_local_expert"


def support_sharded_experts(experts: nn.Module, first_local_expert: int) -> None:
    """Let PEFT adapt the parameters of an experts module whose rank holds the experts from `first_local_expert` on."""
    setattr(experts, _OFFSET, first_local_expert)
    if importlib.util.find_spec("peft") is not None:
        _install()


def adapted(experts: nn.Module, name: str) -> Tensor:
    """The parameter `name` of this rank's experts with the active adapters' updates added: [e, ...]."""
    weight: Tensor = getattr(experts, name)
    for lhs, rhs, scaling in getattr(experts, _FACTORS, {}).get(name, ()):
        local = slice(getattr(experts, _OFFSET), getattr(experts, _OFFSET) + weight.shape[0])
        weight = torch.baddbmm(weight, lhs[local], rhs[local], alpha=scaling)
    return weight


def _install() -> None:
    """Teach PEFT's wrapper of a parameter about DTensors. Plain tensors keep its own way."""
    from peft.tuners.lora.layer import ParamWrapper

    original = ParamWrapper._activate_lora
    if getattr(original, "_knows_dtensors", False):
        return

    @contextlib.contextmanager
    def activate(self: Any, active_adapters: list[str]) -> Iterator[None]:
        experts = self.get_base_layer()
        if not isinstance(self.get_param(), DTensor) or not hasattr(experts, _OFFSET):
            with original(self, active_adapters):
                yield
            return
        factors = [self.get_delta_factors(name) for name in active_adapters if name in self.lora_A]
        table = experts.__dict__.setdefault(_FACTORS, {})
        table[self.parameter_name] = factors
        try:
            yield
        finally:
            del table[self.parameter_name]

    activate._knows_dtensors = True  # type: ignore[attr-defined]
    ParamWrapper._activate_lora = activate
