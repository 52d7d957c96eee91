"""Random weights for a sharded model that never exists whole.

Transformers' `_init_weights` of a family is called module by module, as it is. A module's parameters and those of its
children, which some families set from above, are whole while its turn lasts, and each rank keeps its shard: the dense
weights do not depend on the layout. Experts, the one part that would not fit, are drawn shard by shard.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from moetrain import families


def initialize_weights(model: PreTrainedModel, shard: int) -> None:
    """Fill the parameters and buffers of a materialised model, from torch's current seed.

    Args:
        shard: this rank's number among those that hold different experts; ranks with equal shards give the same.
    """
    names = {module: name for name, module in model.named_modules()}
    experts = {module for _, module in families.experts_modules(model)}
    seed = torch.initial_seed()

    def wrap(init: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def init_module(module: nn.Module) -> None:
            apart = module in experts
            # on accelerators DTensor draws the shards of one tensor apart by itself, from equal seeds
            with _seeded(seed, names[module], shard if apart and not torch.cuda.is_available() else 0):
                if apart:
                    init(module)
                else:
                    children = [child for child in module.children() if child not in experts]
                    with _whole_parameters(module, children):
                        init(module)

        return init_module

    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in parts:
        part._init_weights = wrap(part._init_weights)
    # FSDP2's subclass is of torch's module, and of code not its own Transformers skips modules without parameters
    model.is_custom_code = lambda: False  # type: ignore[method-assign]
    try:
        model.initialize_weights()
    finally:
        for part in parts:
            del part._init_weights
        del model.is_custom_code
    model.tie_weights(recompute_mapping=False)


@contextlib.contextmanager
def _seeded(seed: int, *what: Any) -> Iterator[None]:
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        yield


@contextlib.contextmanager
def _whole_parameters(module: nn.Module, children: list[nn.Module]) -> Iterator[None]:
    """Plain tensors in the place of the sharded parameters of `module` and `children` themselves; each rank keeps its
    part of their values, of children where they were written."""
    replaced: list[tuple[nn.Module, str, Any, nn.Parameter]] = []
    for owner in (module, *children):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                whole = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                owner._parameters[name] = whole
                replaced.append((owner, name, parameter, whole))
    versions = [whole._version for *_, whole in replaced]
    try:
        yield
    finally:
        for (owner, name, parameter, whole), version in zip(replaced, versions, strict=True):
            owner._parameters[name] = parameter
            if owner is module or whole._version != version:
                _keep_shard(parameter, whole)


@torch.no_grad()
def _keep_shard(parameter: DTensor, whole: Tensor) -> None:
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if all(shape):
        region = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        parameter.to_local().copy_(whole[region])
