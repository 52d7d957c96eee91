"""Where each (token, choice) goes: a stable counting sort of the router's choices by expert, without the host.

Shapes: T tokens, K choices of a token (top_k), N = T*K slots, E experts on this rank, R rows (capacity).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetrain.kernels._triton import cdiv, jit, next_power_of_2, runs_triton, tl

TILE = 64
"""Slots that one program of the counting sort ranks among themselves, by comparing all pairs."""


class Routing(NamedTuple):
    """Rows of the experts' input in expert order. Every tensor is int32 and stays on the device.

    A row holds one slot; rows of an expert are in slot order. Rows from `offsets_E[-1]` to R hold nothing.
    """

    counts_E: torch.Tensor
    """Slots that chose each expert, before the capacity cuts any: their sum over R is the overflow."""
    offsets_E: torch.Tensor
    """Row at which each expert ends, at most R: the `offs` of `torch._grouped_mm`."""
    row_TK: torch.Tensor
    """Row of each slot; -1 where its expert is not here or no row was left."""
    slot_R: torch.Tensor
    """Slot (t * K + k) of each row; -1 past the last."""


def route_sort(
    top_k_index_TK: torch.Tensor, num_experts: int, capacity: int | None = None, first_expert: int = 0
) -> Routing:
    """Sort slots by expert, stable and deterministic, with shapes that do not depend on the choices.

    Args:
        top_k_index_TK: chosen experts, any integer dtype; ids outside [first_expert, first_expert + num_experts)
            mean "not on this rank".
        num_experts: experts on this rank.
        capacity: rows to lay out; None takes T * K, which always suffices. Slots beyond it get row -1, the last
            ones in expert order first; `counts_E.sum() > capacity` says so on the device.
    """
    capacity = top_k_index_TK.numel() if capacity is None else capacity
    return Routing(*_route_sort_op(top_k_index_TK, num_experts, capacity, first_expert))


def route_sort_ref(top_k_index_TK: torch.Tensor, num_experts: int, capacity: int, first_expert: int = 0) -> Routing:
    """`route_sort` in plain torch."""
    index_N = top_k_index_TK.reshape(-1).long() - first_expert
    index_N = torch.where((index_N < 0) | (index_N >= num_experts), num_experts, index_N)
    order_N = torch.argsort(index_N, stable=True)
    counts_E = torch.zeros(num_experts + 1, dtype=torch.long, device=index_N.device)
    counts_E = counts_E.scatter_add(0, index_N, torch.ones_like(index_N))[:num_experts]
    offsets_E = counts_E.cumsum(0).clamp(max=capacity)

    rank_N = torch.arange(index_N.numel(), device=index_N.device)
    row_N = torch.empty_like(index_N).index_copy(0, order_N, rank_N)
    row_N = torch.where((index_N < num_experts) & (row_N < capacity), row_N, -1)
    slot_R = torch.full((capacity + 1,), -1, dtype=torch.long, device=index_N.device)
    slot_R = slot_R.index_copy(0, torch.where(row_N < 0, capacity, row_N), rank_N)[:capacity]
    return Routing(counts_E.int(), offsets_E.int(), row_N.int().view(top_k_index_TK.shape), slot_R.int())


@torch.library.custom_op("moetrain::route_sort", mutates_args=())
def _route_sort_op(
    top_k_index_TK: torch.Tensor, num_experts: int, capacity: int, first_expert: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not runs_triton(top_k_index_TK) or top_k_index_TK.numel() == 0:
        counts_E, offsets_E, row_TK, slot_R = route_sort_ref(top_k_index_TK, num_experts, capacity, first_expert)
        return counts_E, offsets_E, row_TK, slot_R
    index_N = top_k_index_TK.contiguous()
    slots = index_N.numel()
    tiles = cdiv(slots, TILE)
    pad_E = max(next_power_of_2(num_experts), 16)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=index_N.device)

    before_EP, counts_E, offsets_E = empty(num_experts, tiles), empty(num_experts), empty(num_experts)
    row_TK, slot_R = empty(*index_N.shape), empty(capacity)
    _count_tiles[(tiles,)](
        index_N, before_EP, slots, tiles, first_expert, num_experts, TILE=TILE, PAD_E=pad_E, num_warps=2
    )
    _scan_tiles[(num_experts,)](before_EP, counts_E, tiles, PAD_P=next_power_of_2(tiles), num_warps=4)
    _place_slots[(tiles,)](
        index_N,
        before_EP,
        counts_E,
        offsets_E,
        row_TK,
        slot_R,
        slots,
        tiles,
        first_expert,
        num_experts,
        capacity,
        TILE=TILE,
        PAD_E=pad_E,
        CHUNK_E=min(pad_E, 64),
        num_warps=4,
    )
    return counts_E, offsets_E, row_TK, slot_R


@_route_sort_op.register_fake
def _(
    top_k_index_TK: torch.Tensor, num_experts: int, capacity: int, first_expert: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def empty(*shape: int) -> torch.Tensor:
        return top_k_index_TK.new_empty(shape, dtype=torch.int32)

    return empty(num_experts), empty(num_experts), empty(*top_k_index_TK.shape), empty(capacity)


@jit
def _count_tiles(index_N, counts_EP, slots, tiles, first_expert, experts, TILE: tl.constexpr, PAD_E: tl.constexpr):  # type: ignore[no-untyped-def]
    """Histogram of each tile of slots: counts_EP[e, tile]."""
    tile = tl.program_id(0)
    slot = tile * TILE + tl.arange(0, TILE)
    expert = tl.load(index_N + slot, mask=slot < slots, other=-1).to(tl.int32) - first_expert
    here = (expert >= 0) & (expert < experts)
    count = tl.histogram(tl.where(here, expert, 0), PAD_E, mask=here)
    e = tl.arange(0, PAD_E)
    tl.store(counts_EP + e * tiles + tile, count, mask=e < experts)


@jit
def _scan_tiles(counts_EP, counts_E, tiles, PAD_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Turn the counts of each expert (one program) into the count of all earlier tiles, in place; write the total."""
    expert = tl.program_id(0)
    p = tl.arange(0, PAD_P)
    count = tl.load(counts_EP + expert * tiles + p, mask=p < tiles, other=0)
    tl.store(counts_EP + expert * tiles + p, tl.cumsum(count, 0) - count, mask=p < tiles)
    tl.store(counts_E + expert, tl.sum(count, 0))


@jit
def _place_slots(  # type: ignore[no-untyped-def]
    index_N,
    before_EP,
    counts_E,
    offsets_E,
    row_N,
    slot_R,
    slots,
    tiles,
    first_expert,
    experts,
    capacity,
    TILE: tl.constexpr,
    PAD_E: tl.constexpr,
    CHUNK_E: tl.constexpr,
):
    """Row of a slot = rows of smaller experts + its expert's slots in earlier tiles + those before it in this tile."""
    tile = tl.program_id(0)
    slot = tile * TILE + tl.arange(0, TILE)
    expert = tl.load(index_N + slot, mask=slot < slots, other=-1).to(tl.int32) - first_expert
    here = (expert >= 0) & (expert < experts)
    earlier = (expert[:, None] == expert[None, :]) & (slot[:, None] > slot[None, :])
    row = tl.sum(earlier.to(tl.int32), 1)
    row += tl.load(before_EP + expert * tiles + tile, mask=here, other=0)
    for start in tl.static_range(0, PAD_E, CHUNK_E):
        e = start + tl.arange(0, CHUNK_E)
        count = tl.load(counts_E + e, mask=e < experts, other=0)
        row += tl.sum(tl.where(e[None, :] < expert[:, None], count[None, :], 0), 1)

    row = tl.where(here & (row < capacity), row, -1)
    tl.store(row_N + slot, row, mask=slot < slots)
    tl.store(slot_R + row, slot, mask=(slot < slots) & (row >= 0))

    e = tl.arange(0, PAD_E)
    ends = tl.cumsum(tl.load(counts_E + e, mask=e < experts, other=0), 0)
    used = tl.max(ends, 0)
    if tile == 0:
        tl.store(offsets_E + e, tl.minimum(ends, capacity), mask=e < experts)
    for start in range(used + tile * TILE, capacity, tiles * TILE):
        free = start + tl.arange(0, TILE)
        tl.store(slot_R + free, tl.full((TILE,), -1, tl.int32), mask=free < capacity)
