"""DeepEP as the user's choice for the exchange between ranks: over NVLink in a node, over RDMA between nodes.

It has two interfaces. Which of them is there is seen from what the imported module offers, never from a version:

    ElasticBuffer   one dispatch, in which the host need not wait for the number of tokens (`do_cpu_sync`)
    Buffer          `get_dispatch_layout`, then dispatch; the host waits, unless it takes `num_worst_tokens`
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.distributed as dist

from moetrain.backends.deep_ep_links import Arrived, BufferLink, ElasticLink, Handle, Link, Sizes, node_size

__all__ = [
    "LINKS",
    "Arrived",
    "BufferLink",
    "ElasticLink",
    "Handle",
    "Link",
    "Sizes",
    "close_links",
    "link_for",
    "missing",
    "obstacle",
    "why_waits",
]

LINKS: tuple[type[Link], ...] = (ElasticLink, BufferLink)
"""The preferred one first."""
_links: dict[tuple[Any, ...], Link] = {}
"""One for each group and hidden size: between nodes there may be one `Buffer` at most in a process."""


@functools.cache
def missing() -> str | None:
    """Why DeepEP cannot be used in this process, in one line; None where it can."""
    if importlib.util.find_spec("deep_ep") is None:
        return (
            "DeepEP is not installed; build deepseek-ai/DeepEP from GitHub "
            "(the registry's package of that name is not upstream's)"
        )
    if not torch.cuda.is_available():
        return "DeepEP needs GPUs"
    try:
        importlib.import_module("deep_ep")
    except (ImportError, OSError, RuntimeError, AssertionError, TypeError) as error:
        # built for another torch, CUDA or NCCL; TypeError: torch has its NCCL inside, and DeepEP looks for a file
        return f"DeepEP does not import: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def obstacle(ranks: int, sizes: Sizes | None = None) -> str | None:
    """Why `ranks` neighbouring ranks cannot use DeepEP here, for a layer of the sizes if given; None if they can."""
    return _choose(ranks, node_size(), sizes)[1]


def why_waits(ranks: int) -> str | None:
    """Why the host waits for the GPU in every dispatch among `ranks` ranks; None if it need not, or they have none."""
    kind, _ = _choose(ranks, node_size(), None)
    return None if kind is None else kind.why_waits(_module(), ranks)


def link_for(group: dist.ProcessGroup, sizes: Sizes) -> Link:
    """The link of a group, made at its first use, which all ranks make together. The layers of a model take turns.

    Raises:
        ValueError: neither interface takes this group and these sizes, or torch fills new tensors on the stream that
            DeepEP does not wait for.
    """
    ranks = dist.get_world_size(group)
    kind, reason = _choose(ranks, node_size(), sizes)
    if kind is None:
        raise ValueError(f"dispatch='deep_ep' cannot be used: {reason}; use 'nvlink', 'alltoall' or 'auto'")
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "dispatch='deep_ep' beside deterministic algorithms needs "
            "torch.utils.deterministic.fill_uninitialized_memory = False"
        )
    key = (kind, group, sizes.hidden)
    if key not in _links:
        _links[key] = kind(_module(), group, sizes.hidden)
    return _links[key]


def close_links() -> None:
    """Free the buffers of every link, on all ranks together, before their process groups go."""
    for link in _links.values():
        link.close()
    _links.clear()


@functools.cache
def _choose(ranks: int, node: int, sizes: Sizes | None) -> tuple[type[Link] | None, str | None]:
    """The first interface that is there and takes the ranks and the sizes, or why there is none.

    Args:
        node: ranks of a node, on which the answer depends too.
    """
    if reason := missing():
        return None, reason
    reasons = []
    for kind in LINKS:
        reason = kind.obstacle(_module(), ranks)
        if reason is None and sizes is not None and (misfit := kind.misfit(ranks, sizes)):
            reason = f"{kind.name} does not take this model: {misfit}"
        if reason is None:
            return kind, None
        reasons.append(reason)
    return None, "; ".join(reasons)


def _module() -> Any:
    return importlib.import_module("deep_ep")
