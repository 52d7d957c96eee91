"""Time and rate of bringing tokens to the ranks of their experts and back: NVLink stores beside NCCL's collectives.

Every rank routes its tokens by a random router. First what arrives is compared with what was sent, then each part is
captured in a CUDA graph and replayed; a time is the slowest rank's. `GB/s` counts bytes that leave the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moetrain.bench.flops import BF16_TFLOP_PER_S
from moetrain.bench.kernels import graph_milliseconds
from moetrain.bench.rows import Row
from moetrain.kernels.activation import Activation
from moetrain.kernels.exchange import NvlinkExchange
from moetrain.kernels.experts import expert_rows, experts_forward
from moetrain.kernels.nvlink import push_choices, push_sums, push_tokens, sum_partials
from moetrain.kernels.permutation import permute_ref, permute_rows, sum_rows
from moetrain.kernels.routing import route_sort
from moetrain.kernels.rows import ExpertWeights
from moetrain.moe.dispatch import StaticDispatcher, build_dispatcher

NVLINK_GB_PER_S = 450.0
"""NVLink of a Hopper GPU in one direction, by its data sheet: 18 links of 25 GB/s."""


def bench_dispatch(tokens: int, hidden: int, intermediate: int, experts: int, top_k: int) -> list[Row]:
    """Check the exchange and a layer through it, then measure both. Call it on every rank.

    Raises:
        ValueError: not several GPUs that reach each other's memory, or experts that they cannot share evenly.
        AssertionError: something arrives wrong.
    """
    if not dist.is_initialized() or not torch.cuda.is_available():
        raise ValueError("the exchange is timed on two GPUs or more: `moetrain bench dispatch --processes N`")
    rank, world = dist.get_rank(), dist.get_world_size()
    if experts % world:
        raise ValueError(f"{experts} experts cannot be split evenly over {world} ranks")
    torch.manual_seed(rank)
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    index = torch.randn(tokens, experts, device="cuda").topk(top_k).indices
    weights = torch.rand(tokens, top_k, device="cuda")
    group = dist.group.WORLD
    assert group is not None
    dispatcher = build_dispatcher("nvlink", experts, group)
    assert isinstance(dispatcher, StaticDispatcher)
    dispatcher.capacity = 2 * tokens * top_k
    exchange = dispatcher.exchange_for(x, top_k)
    assert isinstance(exchange, NvlinkExchange)
    check_exchange(exchange, x, index, weights, dispatcher.capacity)
    up, down = (
        torch.randn(experts // world, *shape, device="cuda").mul_(0.02).bfloat16().requires_grad_()
        for shape in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    layer = check_layer(dispatcher, x, index, weights, ExpertWeights(up, down))
    layer_ms = _slowest(layer)
    layer_rate = 6 * tokens * top_k * (up[0].numel() + down[0].numel()) / layer_ms / 1e9
    return [
        *_time_nvlink(exchange, x, index, weights, dispatcher.capacity),
        Row(
            "nvlink", "expert layer, forward + backward", layer_ms, layer_rate, "TFLOP/s", layer_rate / BF16_TFLOP_PER_S
        ),
        *_time_nccl(x, index, weights, experts),
    ]


def check_exchange(
    exchange: NvlinkExchange, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int
) -> None:
    """Compare every call of the exchange with the same computed from all ranks' tokens.

    Raises:
        AssertionError: a row differs, or a sum by more than bf16 rounding.
    """
    everyone, all_index, all_weights = (_gather(t) for t in (x_TH, index_TK, weights_TK))
    first, experts = exchange.rank * exchange.num_local_experts, exchange.num_local_experts
    ids = index_TK.int()
    for _ in range(3):
        exchange.post_tokens(x_TH, ids, weights_TK)
        routing = exchange.sort(capacity)
        rows, row_weights = exchange.take_rows(routing)
        expected = route_sort(all_index, experts, capacity, first)
        assert all(torch.equal(a, b) for a, b in zip(routing, expected, strict=True)), "routing differs"
        used = int(routing.offsets_E[-1])
        expected_rows, expected_weights = permute_ref(everyone, all_weights, routing.row_TK, capacity)
        assert torch.equal(rows[:used], expected_rows[:used]), "dispatched rows differ"
        assert torch.equal(row_weights[:used], expected_weights[:used]), "dispatched weights differ"

        scale = (1.0 + (routing.slot_R % exchange.num_local_experts)).bfloat16()[:, None]
        exchange.post_sums(rows * scale, None, routing.row_TK)
        total, _ = exchange.take_sums(ids, weighted=False)
        factor = 1.0 + (_slots(index_TK, exchange.rank) % exchange.num_local_experts)
        error = (total.double() - x_TH.double() * factor.sum(1, keepdim=True)).norm() / total.double().norm()
        assert error < 5e-3, f"combined sums are off by {error:.1e}"
        exchange.post_sums(rows * scale, None, routing.row_TK)
        assert torch.equal(total, exchange.take_sums(ids, weighted=False)[0]), "combine is not deterministic"

        exchange.post_tokens(x_TH, ids, None)
        grad_rows = exchange.take_more_rows(routing.row_TK, capacity)
        assert torch.equal(grad_rows[:used], expected_rows[:used]), "gradient rows differ"
        exchange.post_sums(grad_rows, row_weights, routing.row_TK)
        _, grad_weights = exchange.take_sums(ids, weighted=True)
        assert grad_weights is not None
        assert torch.equal(grad_weights, weights_TK), "gradients of the weights differ"


def check_layer(
    dispatcher: StaticDispatcher,
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    experts: ExpertWeights,
) -> Callable[[], None]:
    """Compare a layer's forward and backward, with the same computed on one rank;
    the function that runs them.

    Raises:
        AssertionError: the gradients of this rank's experts differ from those of all ranks' tokens in one batch, or
            the output or the tokens' gradients differ from the sum over ranks by more than bf16 rounding.
    """
    activation = Activation("silu")
    first = dist.get_rank() * dispatcher.num_local
    x_TH, weights_TK = x_TH.detach().requires_grad_(), weights_TK.detach().requires_grad_()
    grad_TH = torch.randn_like(x_TH)
    leaves = [x_TH, weights_TK, experts.up, experts.down]

    def step() -> tuple[torch.Tensor, ...]:
        dispatched = dispatcher.dispatch(x_TH, index_TK, weights_TK)
        rows = expert_rows(dispatched.rows_RH, dispatched.offsets_e, dispatched.weights_R, experts, activation)
        out = dispatcher.combine(rows, dispatched)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_TH))

    everyone, all_weights = _gather(x_TH.detach()).requires_grad_(), _gather(weights_TK.detach()).requires_grad_()
    expected = experts_forward(everyone, _gather(index_TK) - first, all_weights, experts, activation)
    expected_gradients = torch.autograd.grad(
        expected, [everyone, all_weights, experts.up, experts.down], _gather(grad_TH)
    )
    sums = []
    for partial in (expected.detach(), *expected_gradients[:2]):
        mine = torch.empty_like(partial[: x_TH.shape[0]], dtype=torch.float32)
        dist.reduce_scatter_tensor(mine, partial.float())
        sums.append(mine)
    results = step()
    for name, value, reference in zip(("output", "x grad", "weights grad"), results, sums, strict=False):
        error = ((value.float() - reference).norm() / reference.norm()).item()
        assert error < 5e-3, f"{name} is off by {error:.1e}"
    for value, reference in zip(results[3:], expected_gradients[2:], strict=True):
        assert torch.equal(value, reference), "a parameter's gradient differs"
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True)), "two runs differ"

    def run() -> None:
        step()

    return run


def _slots(index_TK: torch.Tensor, rank: int) -> torch.Tensor:
    """Number of each of this rank's slots among all ranks'."""
    return torch.arange(index_TK.numel(), device=index_TK.device).view(index_TK.shape) + rank * index_TK.numel()


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    out = tensor.new_empty(dist.get_world_size() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(out, tensor.contiguous())
    return out


def _slowest(fn: Callable[[], Any]) -> float:
    """Milliseconds of `fn` in a graph, on the slowest rank."""
    dist.barrier()
    torch.cuda.synchronize()
    ms = torch.tensor(graph_milliseconds(fn, calls=5), device="cuda")
    dist.all_reduce(ms, dist.ReduceOp.MAX)
    return ms.item()


def _time_nvlink(
    exchange: NvlinkExchange, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, capacity: int
) -> list[Row]:
    rank, world, experts = exchange.rank, exchange.world, exchange.num_local_experts
    ids, hidden_bytes = index.int(), x.shape[1] * x.element_size()
    exchange.post_tokens(x, ids, weights)
    routing = exchange.sort(capacity)
    rows, row_weights = exchange.take_rows(routing)
    exchange.post_sums(rows, None, routing.row_TK)
    remote = _remote_copies(index, experts, rank) * hidden_bytes
    received = _remote_copies_here(exchange, routing.row_TK) * hidden_bytes

    def timed(part: str, fn: Callable[[], Any], sent: float = 0.0) -> Row:
        ms = _slowest(fn)
        rate = sent / ms / 1e6
        return Row("nvlink", part, ms, rate, "GB/s", rate / NVLINK_GB_PER_S)

    tables, tokens_table = (exchange.returned.table, exchange.weight_grads.table), exchange.sent.table

    def forward() -> None:
        exchange.post_tokens(x, ids, weights)
        exchange.post_sums(exchange.take_rows(exchange.sort(capacity))[0], None, routing.row_TK)
        exchange.take_sums(ids, weighted=False)

    def backward() -> None:
        exchange.post_tokens(x, ids, None)
        exchange.post_sums(exchange.take_more_rows(routing.row_TK, capacity), row_weights, routing.row_TK)
        exchange.take_sums(ids, weighted=True)

    return [
        timed("push choices", lambda: push_choices(ids, weights, exchange.choices.table, exchange.weights.table, rank)),
        timed("push tokens", lambda: push_tokens(x, ids, tokens_table, rank, experts), remote),
        timed("barrier", lambda: exchange._handle.barrier(0)),
        timed("route_sort", lambda: route_sort(exchange.choices.local, experts, capacity, rank * experts)),
        timed(
            "permute",
            lambda: permute_rows(exchange.sent.local, exchange.weights.local, routing.row_TK, capacity),
        ),
        timed("push sums", lambda: push_sums(rows, None, routing.row_TK, *tables, rank), received),
        timed("sum partials", lambda: sum_partials(exchange.returned.local, None, ids, experts, world)),
        timed("dispatch + combine", forward, remote + received),
        timed("their backward", backward, remote + received),
    ]


def _remote_copies(index_TK: torch.Tensor, local_experts: int, rank: int) -> int:
    """Copies of this rank's tokens that leave it."""
    owners = torch.zeros(index_TK.shape[0], dist.get_world_size(), device=index_TK.device)
    owners.scatter_(1, index_TK // local_experts, 1.0)
    owners[:, rank] = 0.0
    return int(owners.sum())


def _remote_copies_here(exchange: NvlinkExchange, row_SK: torch.Tensor) -> int:
    """Tokens of other ranks that have a row here."""
    here = (row_SK >= 0).any(1).view(exchange.world, -1).sum(1)
    here[exchange.rank] = 0
    return int(here.sum())


def _time_nccl(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: int) -> list[Row]:
    """The collectives that would do the same, every (token, expert) row on its own, at even splits: the best case of
    `alltoall`, without the counts it must exchange and read on the host."""
    world = dist.get_world_size()
    routing = route_sort(index, experts)
    rows, _ = permute_rows(x, weights, routing.row_TK, index.numel())
    received = torch.empty_like(rows)
    order = torch.randperm(index.numel(), device="cuda").int()[:, None]
    gathered = x.new_empty(world * x.shape[0], x.shape[1])
    duplicated = rows.numel() * rows.element_size() * (world - 1) / world

    def exchange() -> None:
        permute_rows(x, weights, routing.row_TK, index.numel())
        dist.all_to_all_single(received, rows)
        permute_rows(received, None, order, index.numel())
        sum_rows(received, None, order)
        dist.all_to_all_single(received, rows)
        sum_rows(received, None, routing.row_TK)

    def timed(part: str, fn: Callable[[], Any], sent: float) -> Row:
        ms = _slowest(fn)
        return Row("nccl", part, ms, sent / ms / 1e6, "GB/s", sent / ms / 1e6 / NVLINK_GB_PER_S)

    whole = gathered.numel() * gathered.element_size() * (world - 1) / world
    return [
        timed("all_to_all_single", lambda: dist.all_to_all_single(received, rows), duplicated),
        timed("all_gather", lambda: dist.all_gather_into_tensor(gathered, x), whole),
        timed("reduce_scatter", lambda: dist.reduce_scatter_tensor(torch.empty_like(x), gathered), whole),
        timed("dispatch + combine", exchange, 2 * duplicated),
    ]
