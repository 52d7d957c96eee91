"""The gradient norm over parameters of any mix of device meshes, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.kernels.tensor_list import sum_of_squares


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Global L2 norm of the gradients, and scaling of the gradients by `clip_factor` in place.

    The scaling reads and writes every gradient once more; `AdamW.step(grad_factor=...)` does it on the way.

    Args:
        max_norm: None only measures.

    Returns:
        `grad_norm` before clipping.
    """
    parameters = list(parameters)
    norm = grad_norm(parameters)
    factor = clip_factor(norm, max_norm)
    grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if factor is not None and grads:
        torch._foreach_mul_(grads, factor)
    return norm


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor | None:
    """What gradients of this norm are multiplied by so that it is at most `max_norm`: min(1, max_norm / (norm + 1e-6)),
    a scalar where `norm` is; None for no clipping."""
    return None if max_norm is None else torch.clamp(max_norm / (norm + 1e-6), max=1.0)


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global L2 norm of the gradients.

    Right for parameters of different device meshes: sums of squares are reduced over the mesh dimensions that shard a
    parameter and not over those that replicate it. Every rank of those meshes must call it. No host sync.

    Returns:
        A scalar in fp32 on the parameters' device, equal on all ranks.
    """
    parameters = list(parameters)
    assert parameters, "no parameters"
    # keyed by parameter, not by gradient: a rank without gradients must still join the collectives of the others
    grads_by_groups: dict[tuple[str, ...], list[Tensor]] = {}
    groups_by_name: dict[str, dist.ProcessGroup] = {}
    names_by_layout: dict[Any, tuple[str, ...]] = {}
    for parameter in parameters:
        layout = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        if layout not in names_by_layout:
            groups = _sharding_groups(parameter)
            groups_by_name.update({group.group_name: group for group in groups})
            names_by_layout[layout] = tuple(group.group_name for group in groups)
        grads = grads_by_groups.setdefault(names_by_layout[layout], [])
        if parameter.grad is not None:
            grads.append(local(parameter.grad))

    total = torch.zeros((), dtype=torch.float64, device=local(parameters[0]).device)
    for names, grads in grads_by_groups.items():
        squares = sum_of_squares(grads) if grads else torch.zeros_like(total)
        for name in names:
            dist.all_reduce(squares, group=groups_by_name[name])
        total = total + squares
    return total.sqrt().float()


def _sharding_groups(parameter: Tensor) -> list[dist.ProcessGroup]:
    """Process groups of the mesh dimensions that split a parameter, those of one rank left out."""
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    assert not any(placement.is_partial() for placement in parameter.placements), "gradients are not reduced"
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    ]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
