"""Dispatchers: how tokens reach the ranks of their experts.

`local` (one rank), `alltoall` (torch collectives on NCCL or gloo).
"""

from __future__ import annotations

import torch.distributed as dist

from moetrain.moe.dispatch.alltoall import AllToAllDispatcher
from moetrain.moe.dispatch.base import Dispatched, Dispatcher
from moetrain.moe.dispatch.collectives import keep_received
from moetrain.moe.dispatch.local import LocalDispatcher

DISPATCHERS = ("local", "alltoall")

__all__ = ["DISPATCHERS", "Dispatched", "Dispatcher", "build_dispatcher", "keep_received"]


def build_dispatcher(name: str, num_experts: int, group: dist.ProcessGroup | None) -> Dispatcher:
    """The dispatcher called `name`, or for `auto` the fastest that the group allows.

    Raises:
        ValueError: an unknown name, or `local` for experts that are spread over several ranks.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if name == "auto":
        name = "local" if ranks == 1 else "alltoall"
    if name == "local":
        if ranks > 1:
            raise ValueError(f"dispatch='local' needs all experts on one rank, but ep_size is {ranks}; use 'alltoall'")
        return LocalDispatcher(num_experts)
    if name == "alltoall":
        if group is None:
            raise ValueError("dispatch='alltoall' needs several ranks; use 'local' or 'auto' in one process")
        return AllToAllDispatcher(num_experts, group)
    raise ValueError(f"unknown dispatch {name!r}; valid: auto, {', '.join(DISPATCHERS)}")
