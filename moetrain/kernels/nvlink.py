"""Tokens to the ranks of their experts and back, by stores into the other GPUs' memory over NVLink.

A token goes once to each rank that holds any of its experts, and one partial sum comes back from each: with 8 experts
of 128 on 8 ranks 5.3 copies instead of 8. Where a token lands is its own number, `[source rank, token]`, so nothing is
counted or agreed on before it is sent, every shape is static and no rank waits for a host.

Shapes: W ranks, T tokens of a rank, S = W*T tokens of all ranks, K choices of a token (top_k), H hidden, E experts of
this rank, R rows (capacity). Every rank must have the same T.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moetrain.kernels._triton import cdiv, jit, next_power_of_2, tl
from moetrain.kernels.permute import permute_rows
from moetrain.kernels.routing import Routing, route_sort

TOKEN_PROGRAMS, SUM_PROGRAMS = 132, 264
"""Programs that push tokens and sums. Of 32 to 2,112 all from 64 and 132 on are within 5 % (8 H200): the links are the
limit, and fewer programs leave more of the GPU to others."""


class Peers(NamedTuple):
    """One buffer of every rank in the group, each reachable from this one."""

    local: torch.Tensor
    """This rank's own."""
    table: torch.Tensor
    """Addresses of all ranks' buffers, int64 [W] on the device."""


class Exchange:
    """The buffers of one group of ranks, and the exchange through them. Two calls in flight would overwrite each other:
    one instance serves all layers of a model, in the order of one stream.

    Args:
        group: ranks of one NVLink domain, each with `tokens` tokens in every call.
        capacity: rows of this rank's experts that there is room for; more are cut, see `Routing.counts_E`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        tokens: int,
        hidden: int,
        top_k: int,
        num_local_experts: int,
        capacity: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.tokens, self.num_local_experts, self.capacity = tokens, num_local_experts, capacity
        everyone = self.world * tokens
        device = torch.device("cuda", torch.cuda.current_device())
        sizes = {"sent": everyone * hidden * dtype.itemsize, "returned": everyone * hidden * dtype.itemsize}
        sizes |= {name: everyone * top_k * 4 for name in ("choices", "weights", "weight_grads")}
        whole, self._handle = _rendezvous(sum(sizes.values()), device, group)
        types = {"choices": torch.int32, "weights": torch.float32, "weight_grads": torch.float32}
        peers, start = {}, 0
        for name, size in sizes.items():
            width = hidden if name in ("sent", "returned") else top_k
            local = whole[start : start + size].view(types.get(name, dtype)).view(everyone, width)
            table = [pointer + start for pointer in self._handle.buffer_ptrs]
            peers[name] = Peers(local, torch.tensor(table, dtype=torch.int64, device=device))
            start += size
        self.sent, self.returned = peers["sent"], peers["returned"]
        self.choices, self.weights, self.weight_grads = peers["choices"], peers["weights"], peers["weight_grads"]
        self.choices.local.fill_(-1)
        self._busy: str | None = None

    def dispatch(
        self, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """Rows [R, H] for this rank's experts, their routing weights [R] in fp32, and where each came from (slots of
        S * K). Differentiable."""
        rows_RH, weights_R, *routing = _Dispatch.apply(x_TH, weights_TK, index_TK, self)
        return rows_RH, weights_R, Routing(*routing)

    def combine(self, rows_RH: torch.Tensor, index_TK: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Sum of each token's rows over all ranks [T, H]: in fp32 on each rank, rounded, and again in fp32.
        Differentiable."""
        out_TH: torch.Tensor = _Combine.apply(rows_RH, index_TK, routing.row_TK, self)
        return out_TH

    def send_tokens(
        self, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """`dispatch` without autograd."""
        self._before("sent")
        index_TK = index_TK.to(torch.int32)
        push_choices(index_TK, weights_TK.float(), self.choices.table, self.weights.table, self.rank)
        push_tokens(x_TH, index_TK, self.sent.table, self.rank, self.num_local_experts)
        self._handle.barrier(0)
        first = self.rank * self.num_local_experts
        routing = route_sort(self.choices.local, self.num_local_experts, self.capacity, first)
        rows_RH, weights_R = permute_rows(self.sent.local, self.weights.local, routing.row_TK, self.capacity)
        return rows_RH, weights_R, routing

    def send_gradients(self, grad_TH: torch.Tensor, index_TK: torch.Tensor, row_SK: torch.Tensor) -> torch.Tensor:
        """Gradient of `combine`'s rows: the output's gradient travels as the tokens did."""
        self._before("sent")
        push_tokens(grad_TH, index_TK.to(torch.int32), self.sent.table, self.rank, self.num_local_experts)
        self._handle.barrier(0)
        return permute_rows(self.sent.local, None, row_SK, self.capacity)[0]

    def send_sums(
        self, rows_RH: torch.Tensor, weights_R: torch.Tensor | None, index_TK: torch.Tensor, row_SK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`combine` without autograd; with the gradients of the rows and of their weights, `dispatch`'s backward:
        gradients of x [T, H] and of the weights [T, K]."""
        self._before("returned")
        push_sums(
            rows_RH,
            weights_R,
            row_SK,
            self.returned.table,
            self.weight_grads.table,
            self.rank,
            self.world,
        )
        self._handle.barrier(0)
        return sum_partials(
            self.returned.local,
            None if weights_R is None else self.weight_grads.local,
            index_TK.to(torch.int32),
            self.num_local_experts,
            self.world,
        )

    def _before(self, buffer: str) -> None:
        """A buffer may be written once every rank has read what was in it: the barrier of a use of the other buffer
        says so; two uses of the same need one more."""
        if self._busy == buffer:
            self._handle.barrier(0)
        self._busy = buffer


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weights_TK, index_TK, exchange):  # type: ignore[no-untyped-def]
        rows_RH, weights_R, routing = exchange.send_tokens(x_TH, index_TK, weights_TK)
        ctx.exchange, ctx.weights_dtype = exchange, weights_TK.dtype
        ctx.save_for_backward(index_TK, routing.row_TK)
        ctx.mark_non_differentiable(*routing)
        return rows_RH, weights_R, *routing

    @staticmethod
    def backward(ctx, grad_RH, grad_weights_R, *_):  # type: ignore[no-untyped-def]
        index_TK, row_SK = ctx.saved_tensors
        grad_x_TH, grad_weights_TK = ctx.exchange.send_sums(grad_RH, grad_weights_R, index_TK, row_SK)
        return grad_x_TH, grad_weights_TK.to(ctx.weights_dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, index_TK, row_SK, exchange):  # type: ignore[no-untyped-def]
        ctx.exchange = exchange
        ctx.save_for_backward(index_TK, row_SK)
        return exchange.send_sums(rows_RH, None, index_TK, row_SK)[0]

    @staticmethod
    def backward(ctx, grad_TH):  # type: ignore[no-untyped-def]
        index_TK, row_SK = ctx.saved_tensors
        return ctx.exchange.send_gradients(grad_TH, index_TK, row_SK), None, None, None


def _rendezvous(num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> tuple[torch.Tensor, Any]:
    from torch.distributed import _symmetric_memory as symmetric_memory

    buffer = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    return buffer, symmetric_memory.rendezvous(buffer, group.group_name)


def push_choices(
    index_TK: torch.Tensor, weights_TK: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor, rank: int
) -> None:
    """Write this rank's choices and weights into every rank's [S, K]."""
    numbers = index_TK.numel()
    _push_choices[(choices.numel(), cdiv(numbers, 1024))](
        index_TK, weights_TK, choices, weights, rank, numbers, BLOCK=1024, num_warps=4
    )


def push_tokens(x_TH: torch.Tensor, index_TK: torch.Tensor, sent: torch.Tensor, rank: int, local_experts: int) -> None:
    """Write each token into [rank, token] of every rank that holds one of its experts."""
    tokens, hidden = x_TH.shape
    _push_tokens[(min(TOKEN_PROGRAMS, tokens),)](
        x_TH.contiguous(),
        index_TK,
        sent,
        rank,
        tokens,
        hidden,
        local_experts,
        TOP_K=index_TK.shape[1],
        PAD_K=next_power_of_2(index_TK.shape[1]),
        WORLD=sent.numel(),
        PROGRAMS=min(TOKEN_PROGRAMS, tokens),
        TILE_T=2,
        BLOCK=next_power_of_2(hidden),
        num_warps=8,
    )


def push_sums(
    rows_RH: torch.Tensor,
    weights_R: torch.Tensor | None,
    row_SK: torch.Tensor,
    returned: torch.Tensor,
    weight_grads: torch.Tensor,
    rank: int,
    world: int,
) -> None:
    """Sum the rows of each token in fp32 and write it into [this rank, token] of the rank the token is from; with
    `weights_R`, those of its rows into [this rank, token, k]."""
    hidden = rows_RH.shape[1]
    everyone, top_k = row_SK.shape
    _push_sums[(min(SUM_PROGRAMS, everyone),)](
        rows_RH.contiguous(),
        weights_R,
        row_SK,
        returned,
        weight_grads,
        rank,
        everyone // world,
        hidden,
        TOP_K=top_k,
        WORLD=world,
        PROGRAMS=min(SUM_PROGRAMS, everyone),
        BLOCK=next_power_of_2(hidden),
        num_warps=8,
    )


def sum_partials(
    returned_SH: torch.Tensor,
    weights_SK: torch.Tensor | None,
    index_TK: torch.Tensor,
    local_experts: int,
    world: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum over the ranks of each token's experts [T, H] in fp32, in the order of ranks; with `weights_SK`, the weight
    of each choice from its expert's rank [T, K]."""
    tokens, top_k = index_TK.shape
    hidden = returned_SH.shape[1]
    out_TH = returned_SH.new_empty(tokens, hidden)
    weights_TK = None if weights_SK is None else weights_SK.new_empty(tokens, top_k)
    block = min(next_power_of_2(hidden), 1024)
    _sum_partials[(tokens, cdiv(hidden, block))](
        returned_SH,
        weights_SK,
        index_TK,
        out_TH,
        weights_TK,
        tokens,
        hidden,
        local_experts,
        TOP_K=top_k,
        WORLD=world,
        BLOCK=block,
        num_warps=4,
    )
    return out_TH, weights_TK


@jit
def _peer(table, peer, like):  # type: ignore[no-untyped-def]
    """Pointer to a rank's buffer, of the type of `like`, aligned for 16-byte stores."""
    return tl.multiple_of(tl.load(table + peer).to(like.dtype), 16)


@jit
def _push_choices(index_TK, weights_TK, choices, weights, rank, numbers, BLOCK: tl.constexpr):  # type: ignore
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_TK + n, mask=n < numbers)
    tl.store(_peer(choices, tl.program_id(0), index_TK) + rank * numbers + n, index, mask=n < numbers)
    weight = tl.load(weights_TK + n, mask=n < numbers)
    tl.store(_peer(weights, tl.program_id(0), weights_TK) + rank * numbers + n, weight, mask=n < numbers)


@jit
def _ranks_of(index_TK, token, local_experts, TOP_K: tl.constexpr, WORLD: tl.constexpr):  # type: ignore
    """Bit p is set if rank p holds an expert of the token."""
    ranks = tl.full((), 0, tl.int32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(index_TK + token * TOP_K + k)
        here = (expert >= 0) & (expert < WORLD * local_experts)
        ranks |= tl.where(here, tl.full((), 1, tl.int32) << (tl.where(here, expert, 0) // local_experts), 0)
    return ranks


@jit
def _push_tokens(  # type: ignore[no-untyped-def]
    x_TH,
    index_TK,
    sent,
    rank,
    tokens,
    hidden,
    local_experts,
    TOP_K: tl.constexpr,
    PAD_K: tl.constexpr,
    WORLD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k_1K = tl.arange(0, PAD_K)[None, :]
    h_1H = tl.arange(0, BLOCK)[None, :]
    stride = tl.cast(hidden, tl.int64)
    for start in range(tl.program_id(0) * TILE_T, tokens, PROGRAMS * TILE_T):
        token_T1 = (start + tl.arange(0, TILE_T))[:, None]
        expert_TK = tl.load(index_TK + token_T1 * TOP_K + k_1K, mask=(token_T1 < tokens) & (k_1K < TOP_K), other=-1)
        rank_TK = tl.where((expert_TK >= 0) & (expert_TK < WORLD * local_experts), expert_TK // local_experts, -1)
        x = tl.load(x_TH + token_T1 * stride + h_1H, mask=(token_T1 < tokens) & (h_1H < hidden))
        for step in tl.static_range(WORLD):
            peer = (rank + step) % WORLD  # each rank begins with itself, so no rank is everyone's target at once
            here_T1 = (tl.max((rank_TK == peer).to(tl.int32), 1) > 0)[:, None]
            at_T1 = (rank * tokens + token_T1) * stride
            tl.store(_peer(sent, peer, x_TH) + at_T1 + h_1H, x, mask=here_T1 & (h_1H < hidden))


@jit
def _push_rows(  # type: ignore[no-untyped-def]
    sums_SH,
    row_SK,
    returned,
    rank,
    tokens,
    hidden,
    TOP_K: tl.constexpr,
    PAD_K: tl.constexpr,
    WORLD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token number of all ranks at a time: as many rows in flight as there are ranks."""
    k_1K = tl.arange(0, PAD_K)[None, :]
    h_1H = tl.arange(0, BLOCK)[None, :]
    source_W = (rank + tl.arange(0, WORLD)) % WORLD
    to_W1 = _peer(returned, source_W, sums_SH)[:, None]
    stride = tl.cast(hidden, tl.int64)
    for token in range(tl.program_id(0), tokens, PROGRAMS):
        from_W1 = (source_W * tokens + token)[:, None]
        row_WK = tl.load(row_SK + from_W1 * TOP_K + k_1K, mask=k_1K < TOP_K, other=-1)
        mask_WH = (tl.max(row_WK, 1) >= 0)[:, None] & (h_1H < hidden)
        sums = tl.load(sums_SH + from_W1 * stride + h_1H, mask=mask_WH)
        tl.store(to_W1 + (rank * tokens + token) * stride + h_1H, sums, mask=mask_WH)


@jit
def _push_sums(  # type: ignore[no-untyped-def]
    rows_RH,
    weights_R,
    row_SK,
    returned,
    weight_grads,
    rank,
    tokens,
    hidden,
    TOP_K: tl.constexpr,
    WORLD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h = tl.arange(0, BLOCK)
    stride = tl.cast(hidden, tl.int64)
    for i in range(tl.program_id(0), tokens * WORLD, PROGRAMS):
        source = (rank + i) % WORLD
        token = i // WORLD
        slot = (source * tokens + token) * TOP_K
        sum_H = tl.zeros((BLOCK,), tl.float32)
        last = tl.full((), -1, tl.int32)
        for k in tl.static_range(TOP_K):
            row = tl.load(row_SK + slot + k)
            last = tl.maximum(last, row)
            at = row * stride
            sum_H += tl.load(rows_RH + at + h, mask=(h < hidden) & (row >= 0), other=0.0).to(tl.float32)
            if weights_R is not None:  # noqa: SIM102 - decided at compile time
                if row >= 0:
                    to = _peer(weight_grads, source, weights_R) + (rank * tokens + token) * TOP_K + k
                    tl.store(to, tl.load(weights_R + row))
        if last >= 0:
            at = (rank * tokens + token) * stride
            tl.store(_peer(returned, source, rows_RH) + at + h, sum_H.to(rows_RH.dtype.element_ty), mask=h < hidden)


@jit
def _sum_partials(  # type: ignore[no-untyped-def]
    returned_SH,
    weights_SK,
    index_TK,
    out_TH,
    weights_TK,
    tokens,
    hidden,
    local_experts,
    TOP_K: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ranks = _ranks_of(index_TK, token, local_experts, TOP_K, WORLD)
    sum_H = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(WORLD):
        at = (peer * tokens + token).to(tl.int64) * hidden
        here = ((ranks >> peer) & 1) != 0
        sum_H += tl.load(returned_SH + at + h, mask=(h < hidden) & here, other=0.0).to(tl.float32)
    tl.store(out_TH + token.to(tl.int64) * hidden + h, sum_H.to(out_TH.dtype.element_ty), mask=h < hidden)
    if weights_SK is not None:  # noqa: SIM102 - decided at compile time
        if tl.program_id(1) == 0:
            for k in tl.static_range(TOP_K):
                expert = tl.load(index_TK + token * TOP_K + k)
                here = (expert >= 0) & (expert < WORLD * local_experts)
                owner = tl.where(here, expert, 0) // local_experts
                weight = tl.load(weights_SK + (owner * tokens + token) * TOP_K + k, mask=here, other=0.0)
                tl.store(weights_TK + token * TOP_K + k, weight)
