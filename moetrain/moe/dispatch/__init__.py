"""Dispatchers: how tokens reach the ranks of their experts.

`local`      one rank
`alltoall`   each (token, expert) row to its expert's rank, torch collectives; reads the number of rows on the host
`allgather`  every token to every rank, torch collectives; static shapes
`nvlink`     each token once to each rank that needs it, by stores over NVLink; static shapes
`deep_ep`    the same by DeepEP, between nodes too; static shapes where its interface allows
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moetrain.backends.deep_ep import why_waits as why_deep_ep_waits
from moetrain.families import experts_modules
from moetrain.moe.dispatch.alltoall import AllToAllDispatcher
from moetrain.moe.dispatch.base import Dispatched, Dispatcher, RankedDispatcher
from moetrain.moe.dispatch.deep_ep import DeepEpDispatcher
from moetrain.moe.dispatch.local import LocalDispatcher
from moetrain.moe.dispatch.static import AllGatherDispatcher, NvlinkDispatcher, StaticDispatcher, exchanges

DISPATCHERS = ("local", "alltoall", "allgather", "nvlink", "deep_ep")
_ON_RANKS: dict[str, type[Any]] = {
    "alltoall": AllToAllDispatcher,
    "allgather": AllGatherDispatcher,
    "nvlink": NvlinkDispatcher,
    "deep_ep": DeepEpDispatcher,
}

__all__ = [
    "DISPATCHERS",
    "Dispatched",
    "Dispatcher",
    "RankedDispatcher",
    "StaticDispatcher",
    "build_dispatcher",
    "dispatchers_of",
    "exchanges",
    "fastest_dispatch",
    "nvlink_obstacle",
    "why_waits",
]


def build_dispatcher(name: str, num_experts: int, group: dist.ProcessGroup | None) -> Dispatcher:
    """The dispatcher called `name`, or for `auto` the fastest that any use of the group allows.

    Raises:
        ValueError: an unknown name, `local` for experts that are spread over several ranks, `nvlink` for ranks that do
            not reach each other's memory, or `deep_ep` where it cannot be used.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if name == "auto":
        name = "local" if ranks == 1 else "alltoall"
    if name == "local":
        if ranks > 1:
            raise ValueError(f"dispatch='local' needs all experts on one rank, but ep_size is {ranks}; use 'alltoall'")
        return LocalDispatcher(num_experts)
    if name not in DISPATCHERS:
        raise ValueError(f"unknown dispatch {name!r}; valid: auto, {', '.join(DISPATCHERS)}")
    if group is None:
        raise ValueError(f"dispatch={name!r} needs several ranks; use 'local' or 'auto' in one process")
    if name == "nvlink" and (reason := nvlink_obstacle(ranks)):
        raise ValueError(f"dispatch='nvlink' cannot be used: {reason}; use 'allgather', 'alltoall' or 'auto'")
    dispatcher: Dispatcher = _ON_RANKS[name](num_experts, group)
    return dispatcher


def fastest_dispatch(ep_size: int) -> str:
    """What `auto` means where all ranks step together with equal numbers of tokens."""
    if ep_size == 1:
        return "local"
    return "alltoall" if nvlink_obstacle(ep_size) else "nvlink"


def nvlink_obstacle(ep_size: int) -> str | None:
    """Why `ep_size` neighbouring ranks cannot store into each other's memory; None if they can."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local % ep_size:
        return f"an expert group of {ep_size} ranks does not lie within a node of {local}"
    here, first = torch.cuda.current_device(), torch.cuda.current_device() // ep_size * ep_size
    others = [peer for peer in range(first, min(first + ep_size, torch.cuda.device_count())) if peer != here]
    if len(others) < ep_size - 1:
        return f"this process sees {torch.cuda.device_count()} GPUs, not those of its {ep_size} ranks"
    unreachable = [peer for peer in others if not torch.cuda.can_device_access_peer(here, peer)]
    return f"GPU {here} does not reach the memory of GPU {unreachable[0]}" if unreachable else None


def why_waits(name: str, ep_size: int) -> str | None:
    """Why the host waits for the GPU in every call of the dispatcher called `name`; None if it need not."""
    if name == "deep_ep":
        return why_deep_ep_waits(ep_size)
    return _ON_RANKS[name].waits if name in _ON_RANKS else None


def dispatchers_of(model: nn.Module) -> list[tuple[str, Dispatcher]]:
    """Name and dispatcher of each expert-parallel experts module, in module order."""
    found = [(name, getattr(experts, "_moetrain_dispatcher", None)) for name, experts in experts_modules(model)]
    return [(name, dispatcher) for name, dispatcher in found if dispatcher is not None]
