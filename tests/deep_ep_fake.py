"""DeepEP's two interfaces in plain torch over gloo: what they take, return, assert and leave unwritten.

Source: deepseek-ai/DeepEP, deep_ep/buffers/legacy.py and elastic.py at dd758caf, deep_ep/buffer.py at 29d31c09, and the
checks of the C++ behind them, on the host and in kernels. Of each method only the parameters that moetrain could pass
are here, with the real names, order and defaults. What real kernels leave unwritten holds NaN, or ids that would send a
row astray. The machine has no network between nodes that NCCL could use.
"""

from __future__ import annotations

import os
import random
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.backends import deep_ep, deep_ep_links

topk_idx_t = torch.int64
NVL_PEERS = 8
"""Ranks of a node for `Buffer`; tests make nodes of 2 of them."""
calls: list[str] = []
"""What was called since the list was cleared."""


class Routes(NamedTuple):
    """Where each token that came has come from."""

    source_N: Tensor
    token_N: Tensor
    sent: Tensor
    """[T, W], whether a token went to a rank."""


class EventOverlap:
    def __init__(self, event: Any = None, extra_tensors: Any = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None


class Config:
    def __init__(self, num_sms: int, nvl_send: int, nvl_recv: int, rdma_send: int, rdma_recv: int) -> None:
        self.num_sms, self.nvl_recv, self.rdma_recv = num_sms, nvl_recv, rdma_recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        slots = self.num_sms // 2 * min(num_ranks, NVL_PEERS) * self.nvl_recv
        return -(-slots * (hidden_bytes + 128 * 8 + 128 * 4 + 128 * 4) // 128) * 128 + 2**14

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        if num_ranks <= NVL_PEERS:
            raise RuntimeError("NVSHMEM is disable during compilation")
        slots = self.num_sms // 2 * (num_ranks // NVL_PEERS) * self.rdma_recv
        return -(-slots * hidden_bytes * 2 // 128) * 128


class Buffer:
    """`Buffer` of V1: two calls a dispatch, counts read on the host."""

    num_sms: int = 20

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        explicitly_destroy: bool = False,
    ) -> None:
        self.group, self.explicitly_destroy, self.destroyed = group, explicitly_destroy, False
        self.group_size, self.rank = group.size(), group.rank()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.nodes = max(1, self.group_size // NVL_PEERS)
        assert num_nvl_bytes % 128 == 0 and num_rdma_bytes % 128 == 0
        assert self.nodes == 1 or num_rdma_bytes > 0
        assert num_rdma_bytes == 0 or self.group_size > NVL_PEERS
        dist.barrier(group)
        calls.append("make")

    def destroy(self) -> None:
        assert self.explicitly_destroy and not self.destroyed
        dist.barrier(self.group)
        self.destroyed = True
        calls.append("destroy")

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        settings = {2: (24, 256, 6, 128), 4: (6, 256, 6, 128), 8: (6, 256, 6, 128), 16: (36, 288, 20, 128)}
        assert num_ranks in settings, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, *settings[num_ranks])

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        settings = {2: (10, 256, 6, 128), 4: (9, 256, 6, 128), 8: (4, 256, 6, 128), 16: (4, 288, 12, 128)}
        assert num_ranks in settings, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, *settings[num_ranks])

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        calls.append("layout")
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == topk_idx_t
        assert ((topk_idx >= -1) & (topk_idx < num_experts)).all()
        sent = ranks_of(topk_idx, num_experts, self.group_size)
        per_expert = torch.zeros(num_experts, dtype=torch.int32)
        per_expert += torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        per_node = sent.view(sent.shape[0], self.nodes, -1).any(2).sum(0).int() if self.nodes > 1 else None
        return sent.sum(0).int(), per_node, per_expert, sent, EventOverlap()

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
    ) -> tuple[Any, ...]:
        check_tokens(self, x)
        if self.nodes > 1:
            options = {} if num_worst_tokens == 0 else {"num_worst_tokens": num_worst_tokens}
            return self.internode_dispatch(
                x,
                handle,
                num_tokens_per_rank,
                num_tokens_per_rdma_rank,
                is_token_in_rank,
                num_tokens_per_expert,
                topk_idx,
                topk_weights,
                expert_alignment,
                **options,
            )
        assert handle is not None or num_tokens_per_rdma_rank is None
        slots = self.get_dispatch_config(self.group_size).num_sms // 2 * self.group_size * 256
        assert slots * (x.shape[1] * x.element_size() + 4) <= self.num_nvl_bytes
        return self._dispatch(
            x,
            handle,
            num_tokens_per_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            num_worst_tokens,
        )

    def internode_dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
    ) -> tuple[Any, ...]:
        assert handle is not None or num_tokens_per_rdma_rank is not None
        return self._dispatch(
            x,
            handle,
            num_tokens_per_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            num_worst_tokens,
        )

    def _dispatch(
        self,
        x: Tensor,
        handle: Any,
        per_rank: Tensor | None,
        in_rank: Tensor | None,
        per_expert: Tensor | None,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_worst_tokens: int,
    ) -> tuple[Any, ...]:
        if handle is not None:
            assert topk_idx is None and topk_weights is None and num_worst_tokens == 0
            calls.append("dispatch again")
            (routes,) = handle
            recv_x, _ = receive(self.group, x, None, routes)
            return recv_x, None, None, None, None, EventOverlap()
        assert per_rank is not None and in_rank is not None and per_expert is not None
        assert (topk_idx is None) == (topk_weights is None) and topk_idx is not None and topk_weights is not None
        check_choices(x, topk_idx, topk_weights)
        calls.append("dispatch without waiting" if num_worst_tokens else "dispatch")
        routes = plan(self.group, in_rank, num_worst_tokens)
        recv_x, choices = receive(self.group, x, (topk_idx, topk_weights), routes)
        assert choices is not None
        ids, weights = choices
        num_local = per_expert.numel() // self.group_size
        ids = ids - self.rank * num_local
        ids[(ids < 0) | (ids >= num_local)] = -1
        ids[routes.source_N < 0] = -1
        weights[(ids < 0) & (routes.source_N >= 0).unsqueeze(1)] = 0.0
        counts = [] if num_worst_tokens else torch.bincount(ids[ids >= 0], minlength=num_local).tolist()
        return recv_x, ids, weights, counts, (routes,), EventOverlap()

    def combine(self, x: Tensor, handle: tuple[Any, ...], topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        calls.append("combine")
        check_tokens(self, x)
        check_weights(x, topk_weights)
        (routes,) = handle
        return *send_back(self.group, x, topk_weights, routes, owner=None), EventOverlap()


class EPHandle:
    def __init__(self, num_sms: int, room: int, num_experts: int, topk_idx: Tensor, routes: Routes) -> None:
        self.num_sms, self.num_max_tokens_per_rank, self.num_experts = num_sms, room, num_experts
        self.topk_idx, self.routes = topk_idx, routes
        self.num_recv_tokens_per_expert_list: list[int] = []
        self.psum_num_recv_tokens_per_scaleup_rank = torch.empty(0)


class ElasticBuffer:
    """`ElasticBuffer` of V2: tokens arrive by their source, in no order of each, and nothing is written behind them."""

    reads_speeds = True
    """Whether nvidia-smi and ibstat tell the speeds of links."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        deterministic: bool = False,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        check_communicator(group)
        assert os.environ.get("EP_DISABLE_GIN") == "1", "NCCL GIN is unavailable"
        assert num_max_tokens_per_rank > 0 and hidden > 0
        self.group, self.num_ranks, self.rank_idx = group, group.size(), group.rank()
        self.num_max_tokens_per_rank, self.hidden = num_max_tokens_per_rank, hidden
        self.deterministic, self.explicitly_destroy, self.destroyed = deterministic, explicitly_destroy, False
        agree(group, num_max_tokens_per_rank)
        calls.append("make")

    def destroy(self) -> None:
        assert self.explicitly_destroy and not self.destroyed
        dist.barrier(self.group)
        self.destroyed = True
        calls.append("destroy")

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        assert num_experts % self.num_ranks == 0  # no number for experts is a TypeError, as there
        return 8 + 2 * num_topk if self.reads_speeds else 4

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        handle: EPHandle | None = None,
        do_cpu_sync: bool | None = None,
    ) -> tuple[Any, ...]:
        check_tokens(self, x)
        if num_sms == 0:
            num_sms = self.get_theoretical_num_sms(num_experts, 1)  # type: ignore[arg-type]
        if handle is not None:
            assert topk_idx is None and not do_cpu_sync and num_sms == handle.num_sms
            assert x.shape[0] == handle.topk_idx.shape[0]
            calls.append("dispatch again")
            recv_x, _ = receive(self.group, x, None, handle.routes)
            return recv_x, torch.empty(0), None, handle, EventOverlap()
        room = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
        assert num_experts is not None and topk_idx is not None and topk_weights is not None
        check_choices(x, topk_idx, topk_weights)
        assert ((topk_idx >= -1) & (topk_idx < num_experts)).all()
        chosen = topk_idx.sort(1).values
        assert not ((chosen[:, 1:] == chosen[:, :-1]) & (chosen[:, 1:] >= 0)).any(), "an expert twice in a token"
        assert num_experts <= 2048 and num_experts // self.num_ranks <= 256
        agree(self.group, room)
        assert x.shape[0] <= room <= self.num_max_tokens_per_rank
        waits = do_cpu_sync is None or do_cpu_sync
        calls.append("dispatch" if waits else "dispatch without waiting")
        sent = ranks_of(topk_idx, num_experts, self.num_ranks)
        routes = plan(self.group, sent, 0 if waits else room * self.num_ranks, shuffled=not self.deterministic)
        recv_x, choices = receive(self.group, x, (topk_idx, topk_weights), routes)
        assert choices is not None
        ids, weights = choices
        num_local, came = num_experts // self.num_ranks, routes.source_N >= 0
        ids = torch.where(came.unsqueeze(1), ids - self.rank_idx * num_local, 0)  # 0: an expert of this rank
        ids[(ids < 0) | (ids >= num_local)] = -1
        handle = EPHandle(num_sms, room, num_experts, topk_idx.clone(), routes)
        per_rank = torch.stack([(routes.source_N == rank).sum() for rank in range(self.num_ranks)])
        handle.psum_num_recv_tokens_per_scaleup_rank = per_rank.cumsum(0).int()
        if waits:
            handle.num_recv_tokens_per_expert_list = torch.bincount(ids[ids >= 0], minlength=num_local).tolist()
        return recv_x, ids, weights, handle, EventOverlap()

    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None, num_sms: int = 0
    ) -> tuple[Any, ...]:
        calls.append("combine")
        check_tokens(self, x)
        check_weights(x, topk_weights)
        assert topk_weights is None or topk_weights.shape[1] == handle.topk_idx.shape[1]
        owner = torch.where(handle.topk_idx < 0, -1, handle.topk_idx // (handle.num_experts // self.num_ranks))
        return *send_back(self.group, x, topk_weights, handle.routes, owner), EventOverlap()


def get_physical_domain_size(group: dist.ProcessGroup) -> tuple[int, int]:
    """Nodes, and ranks of each."""
    check_communicator(group)
    return 1, group.size()


def check_communicator(group: dist.ProcessGroup) -> None:
    """The real one gets torch's communicator, or a null pointer, whose fields it reads and dies."""
    assert group._get_sequence_number_for_group() > 0, "the group has had no collective"


def check_tokens(buffer: Any, x: Tensor) -> None:
    assert not buffer.destroyed, "used after destroy"
    assert not (torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory)
    assert x.dim() == 2 and x.is_contiguous() and x.dtype in deep_ep_links.DTYPES


def check_weights(x: Tensor, topk_weights: Tensor | None) -> None:
    """Those of a combine."""
    if topk_weights is not None:
        assert topk_weights.dim() == 2 and topk_weights.is_contiguous() and topk_weights.shape[0] == x.shape[0]
        assert topk_weights.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)


def check_choices(x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> None:
    assert topk_idx.dtype == topk_idx_t and topk_idx.is_contiguous() and topk_weights.is_contiguous()
    assert topk_weights.shape == topk_idx.shape and topk_idx.shape[0] == x.shape[0] > 0
    assert topk_weights.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert topk_idx.shape[1] <= 32


def agree(group: dist.ProcessGroup, number: int) -> None:
    """Real ranks that disagree write over each other."""
    numbers = [0] * group.size()
    dist.all_gather_object(numbers, number, group=group)
    assert len(set(numbers)) == 1, f"ranks disagree: {numbers}"


def ranks_of(topk_idx: Tensor, num_experts: int, ranks: int) -> Tensor:
    """bool [T, W]: whether a token goes to a rank."""
    rank_TK = torch.where(topk_idx < 0, -1, topk_idx // (num_experts // ranks))
    return (rank_TK.unsqueeze(2) == torch.arange(ranks)).any(1)


def plan(group: dist.ProcessGroup, sent: Tensor, worst: int, shuffled: bool = False) -> Routes:
    """The tokens that this rank gets, by source; `worst` adds places that hold none (source -1)."""
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, sent, group=group)
    pairs = [(s, int(t)) for s, of in enumerate(everyones) for t in of[:, group.rank()].nonzero()]
    if shuffled:
        random.shuffle(pairs)
        pairs.sort(key=lambda pair: pair[0])
    assert worst == 0 or len(pairs) <= worst
    pairs += [(-1, -1)] * (worst - len(pairs) if worst else 0)
    table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return Routes(table[:, 0], table[:, 1], sent)


def receive(
    group: dist.ProcessGroup, x: Tensor, choices: tuple[Tensor, Tensor] | None, routes: Routes
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Tokens, and their choices and weights, along the routes; NaN and anything where none came."""
    assert x.shape[0] == routes.sent.shape[0]
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, (x.detach(), choices), group=group)
    recv_x = x.new_full((routes.source_N.shape[0], x.shape[1]), float("nan"))
    came = [(n, s, t) for n, (s, t) in enumerate(zip(*_lists(routes), strict=True)) if s >= 0]
    for n, s, t in came:
        recv_x[n] = everyones[s][0][t]
    if choices is None:
        return recv_x, None
    recv_ids = choices[0].new_zeros(recv_x.shape[0], choices[0].shape[1])
    recv_weights = choices[1].new_full(recv_ids.shape, float("nan"))
    for n, s, t in came:
        recv_ids[n], recv_weights[n] = everyones[s][1][0][t], everyones[s][1][1][t]
    return recv_x, (recv_ids, recv_weights)


def send_back(
    group: dist.ProcessGroup, x: Tensor, weights: Tensor | None, routes: Routes, owner: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Sums over ranks in fp32 or wider. Weights are summed too, or taken from the rank in `owner` [T, K]."""
    assert x.shape[0] == routes.source_N.shape[0]
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, (x.detach(), weights, routes), group=group)
    tokens, wide = routes.sent.shape[0], torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(tokens, x.shape[1], dtype=wide)
    back = None if weights is None else weights.new_zeros(tokens, weights.shape[1])
    for rank, (theirs_x, theirs_weights, theirs) in enumerate(everyones):
        for n, (s, t) in enumerate(zip(*_lists(theirs), strict=True)):
            if s != group.rank():
                continue
            out[t] += theirs_x[n].to(wide)
            if back is not None:
                mine = torch.ones_like(back[t]) if owner is None else (owner[t] == rank).to(back.dtype)
                back[t] += torch.where(mine > 0, theirs_weights[n], 0.0)
    return out.to(x.dtype), back


def _lists(routes: Routes) -> tuple[list[int], list[int]]:
    return routes.source_N.tolist(), routes.token_N.tolist()


class Module:
    """What `import deep_ep` gives, with one interface or both."""

    def __init__(self, *interfaces: str) -> None:
        self.topk_idx_t, self.get_physical_domain_size = topk_idx_t, get_physical_domain_size
        for name in interfaces:
            setattr(self, name, {"Buffer": Buffer, "ElasticBuffer": ElasticBuffer}[name])


def install(*interfaces: str, any_sizes: bool = True, node: int | None = None) -> None:
    """Put the fake in DeepEP's place in this process, for good: call it in a rank of its own.

    Args:
        any_sizes: take widths and types that the kernels do not.
        node: ranks of a node.
    """
    global NVL_PEERS
    module = Module(*interfaces)
    deep_ep._module = lambda: module  # type: ignore[assignment]
    deep_ep.missing = lambda: None  # type: ignore[assignment]
    deep_ep._choose.cache_clear()
    if any_sizes:
        deep_ep_links.DTYPES = (torch.bfloat16, torch.float32, torch.float64)
        for kind in deep_ep.LINKS:
            kind.misfit = classmethod(lambda cls, ranks, sizes: None)  # type: ignore[assignment,method-assign]
    if node is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(node)
        NVL_PEERS = deep_ep_links.NVLINK_PEERS = node
    calls.clear()
