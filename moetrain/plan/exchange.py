"""What a dispatcher sends and what it keeps buffers for, from a layer's sizes and a layout.

Shapes: T tokens of a rank, K choices of a token, H hidden, W ranks of an expert group. An exchange brings tokens to the
ranks of their experts, or their results back; a pass has two in its forward and two in its backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

from moetrain.plan.layout import Layout
from moetrain.plan.trace import ExpertLayer

STATIC = ("allgather", "nvlink", "deep_ep")
"""Dispatchers whose shapes do not depend on the routing."""
CAPTURED = ("local", *STATIC)
"""Dispatchers of a step that can be one CUDA graph; the others read the number of rows on the host."""
STACKED = ("allgather", "nvlink")
"""Dispatchers that lay the rows of all layers into one buffer (`moetrain.kernels.RowStack`)."""
OF_ALL_RANKS = ("allgather", "deep_ep")
"""Dispatchers that make room for the tokens of every rank."""


class Sent(NamedTuple):
    """Bytes that a rank sends in one exchange, on average."""

    near: float
    """Over NVLink."""
    far: float
    """Through its network port."""


class Balance(NamedTuple):
    """How a run's routers spread tokens."""

    gate: str = "learned"
    """`balance.gate`: with `sequential` a token's experts are neighbours, so it goes to fewer ranks."""
    load: float = 1.0
    """Rows of the fullest rank of a layer over the mean."""


EVEN = Balance()


def sent_bytes(layer: ExpertLayer, layout: Layout, dispatch: str, gate: str = "learned") -> Sent:
    """Bytes of one exchange.

        alltoall    each token to each of its experts
        allgather   each token to every rank; a node gets it once
        nvlink      each token to each rank that holds any of its experts
        deep_ep     the same in a node; of other nodes each gets it once, and passes it on

    Args:
        dispatch: name of the dispatcher.
        gate: `balance.gate` of the run.
    """
    ranks, near = layout.ep, layout.ep_in_node
    token = layer.tokens * layer.hidden * layer.token_bytes
    if dispatch == "allgather":
        return Sent(token * (ranks - 1), token * (ranks - near) / near)
    if dispatch == "alltoall":
        return Sent(token * layer.top_k * (near - 1) / ranks, token * layer.top_k * (ranks - near) / ranks)
    inside = token * distinct_ranks(layer, ranks, gate) * (near - 1) / near
    nodes = layout.ep_nodes
    return Sent(inside, token * distinct_ranks(layer, nodes, gate) * (nodes - 1) / nodes)


def distinct_ranks(layer: ExpertLayer, ranks: int, gate: str = "learned") -> float:
    """Ranks among `ranks` that hold any of a token's experts, on average: drawn without replacement, or, with the gate
    `sequential`, neighbours."""
    experts, top_k = layer.num_experts, layer.top_k
    if gate == "sequential":
        return max(1.0, top_k * ranks / experts)
    elsewhere = experts - experts // ranks
    return ranks * (1 - comb(elsewhere, top_k) / comb(experts, top_k))


def passed_bytes(layer: ExpertLayer, layout: Layout, dispatch: str, balance: Balance) -> float:
    """Bytes that a rank reads and writes for one exchange and its return, which a trace of a static dispatcher leaves
    out: rows are copied into their experts' order and summed by token, and what comes back from the ranks is added.
    `nvlink` sums while it sends."""
    if dispatch not in STATIC:
        return 0.0
    rows = layer.top_k * balance.load
    partial = layout.ep if dispatch == "allgather" else distinct_ranks(layer, layout.ep, balance.gate)
    numbers = 2 * rows + partial + 1 if dispatch == "nvlink" else 3 * rows + 2 * partial + 1
    return numbers * layer.tokens * layer.hidden * layer.token_bytes


def buffer_bytes(layers: Sequence[ExpertLayer], layout: Layout, dispatch: str) -> int:
    """Bytes of the buffers that other ranks store into, beside torch's allocator: one set for all layers of a shape.

    nvlink      `moetrain.kernels.exchange.NvlinkExchange`: tokens sent and sums returned, choices, weights and
                their gradients, of every rank
    deep_ep     the larger of a dispatch and a combine
    others      none; what they gather and receive comes from the allocator
    """
    shapes = {(layer.tokens, layer.hidden, layer.top_k, layer.token_bytes) for layer in layers}
    if dispatch == "nvlink":
        return sum(layout.ep * tokens * (2 * hidden * size + 3 * 4 * top_k) for tokens, hidden, top_k, size in shapes)
    if dispatch == "deep_ep":
        return sum(_deep_ep_bytes(tokens, hidden * size, layout) for tokens, hidden, _, size in shapes)
    return 0


_DEEP_EP_CHANNELS = 8 * 160
_DEEP_EP_ALIGNMENT = 2 * 2**20


_DEEP_EP_TOP_K = 32
"""What it takes where it is not told."""


def _deep_ep_bytes(tokens: int, row_bytes: int, layout: Layout) -> int:
    """`ElasticBuffer` of DeepEP 2.0 (csrc/elastic/buffer.hpp, `calculate_buffer_size`, at the pinned commit), with bf16
    rows and several reductions allowed: the larger of `get_dispatch_buffer_size` and `get_combine_buffer_size`."""
    tokens, top_k = 1 << (tokens - 1).bit_length(), _DEEP_EP_TOP_K
    near, nodes = layout.ep_in_node, layout.ep_nodes
    row = _aligned(row_bytes, 32) + _aligned(4 * (3 * _DEEP_EP_TOP_K + 1), 32)
    if nodes == 1:
        dispatch = layout.ep * tokens
        combine = min(layout.ep, top_k) * tokens
    else:
        dispatch = near * nodes * tokens + tokens + nodes * (tokens + _DEEP_EP_CHANNELS)
        combine = min(near, top_k) * nodes * tokens + min(nodes, top_k) * tokens + nodes * (tokens + _DEEP_EP_CHANNELS)
    return _aligned(max(dispatch, combine) * row, _DEEP_EP_ALIGNMENT)


def _aligned(size: int, step: int) -> int:
    return -(-size // step) * step
