"""The two interfaces of DeepEP behind one: a link, the ranks of a group that send each other tokens.

Both bring each token once to each rank that has experts of it, with its choices and weights, and sum what comes back.
The backward of dispatch is combine and the other way round, along the routes of the forward. DeepEP works on its own
stream, and the current stream waits for it on the GPU.

Shapes: T tokens of this rank, K choices of a token (top_k), H hidden, W ranks, N tokens that came.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.metrics.device import timed

DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16,)
"""Types of tokens that both interfaces send and sum."""
MAX_TOP_K = 32
"""The kernels of both read a token's choices with one warp."""
NVLINK_PEERS = 8
"""`Buffer` takes ranks 0-7 of a group for those of one node, 8-15 for the next, ..."""
MAX_EXPERTS, MAX_LOCAL_EXPERTS = 2048, 256
"""Of all ranks and of one: the counters of `ElasticBuffer`'s workspace."""
LEAST_SMS, FALLBACK_SMS = 4, 20
"""Multiprocessors that `ElasticBuffer` asks for where it reads 0 for NVLink's speed, and those that it gets wherever it
cannot read a link's speed; `Buffer` takes as many by itself."""
WAIT_SECONDS = 600
"""Kernels of a rank wait so long for the other ranks, as torch's collectives do. `ElasticBuffer`'s own 100 s are less
than what a rank may compile or save."""
LEAST_ROOM = 128
"""Tokens of a rank in the smallest buffer. `ElasticBuffer` compiles kernels for each size, so sizes are powers of 2."""


class Sizes(NamedTuple):
    """What limits of the kernels speak of."""

    hidden: int
    top_k: int
    num_local: int
    """Experts of a rank."""
    dtype: torch.dtype


class Handle(NamedTuple):
    """What a dispatch leaves for the calls along its routes."""

    tokens: int
    """T."""
    room: int
    """Tokens of a rank that the buffer was made for."""
    routes: Any
    """DeepEP's own handle."""


class Arrived(NamedTuple):
    """What a dispatch brought to this rank."""

    x_NH: Tensor
    ids_NK: Tensor
    """Experts of this rank, counted from 0; negative for choices that are elsewhere."""
    weights_NK: Tensor
    """fp32; anything where the choice is elsewhere."""
    rows: int | None
    """(token, expert) pairs of this rank; None if the host has not waited for it."""
    handle: Handle


class Link(ABC):
    """The ranks of a group, by one of the interfaces. Every rank makes the same calls in the same order."""

    name: ClassVar[str]
    """Its class in the module."""
    calls: ClassVar[dict[str, tuple[str, ...]]]
    """Methods and those of their parameters that are used here."""

    def __init__(self, module: Any, group: dist.ProcessGroup, hidden: int) -> None:
        self.module, self.group, self.hidden = module, group, hidden
        self.ranks = dist.get_world_size(group)

    def dispatch(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, static: bool = False
    ) -> Arrived:
        """Bring tokens to the ranks of their experts.

        Args:
            ids_TK: global ids, distinct in a token; `num_experts` or more for a choice that is not used.
            static: every rank has the same T, and N is W*T: the host does not wait. Otherwise T may differ.
        """
        tokens = x_TH.shape[0]
        ids_TK = ids_TK.masked_fill(ids_TK >= num_experts, -1).to(getattr(self.module, "topk_idx_t", torch.int64))
        if tokens == 0:  # a token that goes nowhere: kernels for none at all are not among DeepEP's tests
            ids_TK, weights_TK = ids_TK.new_full((1, ids_TK.shape[1]), -1), weights_TK.new_zeros(1, ids_TK.shape[1])
        with timed("collective_wait", x_TH.device, many=True):
            arrived = self._dispatch(_some(x_TH), ids_TK, weights_TK.contiguous(), num_experts, static)
        return arrived._replace(handle=arrived.handle._replace(tokens=tokens))

    def dispatch_again(self, x_TH: Tensor, handle: Handle) -> Tensor:
        """Other tokens along the same routes: [N, H]."""
        with timed("collective_wait", x_TH.device, many=True):
            return self._dispatch_again(_some(x_TH), handle)

    def combine(self, x_NH: Tensor, weights_NK: Tensor | None, handle: Handle) -> tuple[Tensor, Tensor | None]:
        """Sum over the ranks that each token went to [T, H], and the weights of its choices [T, K] where given."""
        weights_NK = None if weights_NK is None else weights_NK.contiguous()
        with timed("collective_wait", x_NH.device, many=True):
            x_TH, weights_TK = self._combine(x_NH.contiguous(), weights_NK, handle)
        return x_TH[: handle.tokens], None if weights_TK is None else weights_TK[: handle.tokens]

    @classmethod
    def obstacle(cls, module: Any, ranks: int) -> str | None:
        """Why this interface does not serve `ranks` neighbouring ranks, of which a node has LOCAL_WORLD_SIZE."""
        found = getattr(module, cls.name, None)
        if found is None:
            return f"this deep_ep has no {cls.name}"
        for call, parameters in cls.calls.items():
            lacking = set(parameters) - _parameters(found, call)
            if lacking:
                return f"{cls.name}.{call} of this deep_ep takes no {', '.join(sorted(lacking))}"
        return cls._layout_obstacle(found, ranks)

    @classmethod
    @abstractmethod
    def _layout_obstacle(cls, found: Any, ranks: int) -> str | None: ...

    @classmethod
    @abstractmethod
    def misfit(cls, ranks: int, sizes: Sizes) -> str | None:
        """Why the kernels do not take the sizes; None if they do."""

    @classmethod
    @abstractmethod
    def why_waits(cls, module: Any, ranks: int) -> str | None:
        """Why `static` cannot be had; None if it can."""

    @abstractmethod
    def close(self) -> None:
        """Free the buffers; all ranks together."""

    @abstractmethod
    def _dispatch(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, static: bool
    ) -> Arrived: ...

    @abstractmethod
    def _dispatch_again(self, x_TH: Tensor, handle: Handle) -> Tensor: ...

    @abstractmethod
    def _combine(self, x_NH: Tensor, weights_NK: Tensor | None, handle: Handle) -> tuple[Tensor, Tensor | None]: ...


class ElasticLink(Link):
    """`ElasticBuffer`, on NCCL's symmetric memory: any ranks that NCCL connects."""

    name = "ElasticBuffer"
    calls: ClassVar[dict[str, tuple[str, ...]]] = {
        "__init__": ("num_max_tokens_per_rank", "hidden", "explicitly_destroy"),
        "dispatch": ("topk_idx", "topk_weights", "num_max_tokens_per_rank", "num_sms", "handle", "do_cpu_sync"),
        "combine": ("handle", "topk_weights"),
        "get_theoretical_num_sms": ("num_experts", "num_topk"),
    }

    def __init__(self, module: Any, group: dist.ProcessGroup, hidden: int) -> None:
        super().__init__(module, group, hidden)
        # DeepEP borrows torch's communicator, which is a null pointer until the group's first collective
        dist.all_reduce(torch.zeros((), device=torch.accelerator.current_accelerator()), group=group)
        self._within_node = module.get_physical_domain_size(group)[0] == 1
        self._buffers: dict[int, Any] = {}
        """By the tokens of a rank that they have room for. A CUDA graph keeps using the one that it has seen."""

    @classmethod
    def _layout_obstacle(cls, found: Any, ranks: int) -> str | None:
        return None

    @classmethod
    def misfit(cls, ranks: int, sizes: Sizes) -> str | None:
        if sizes.hidden % 256:  # a warp sums 32 * 16 bytes at a time
            return f"hidden size {sizes.hidden} is no multiple of 256"
        if sizes.num_local > MAX_LOCAL_EXPERTS:
            return f"{sizes.num_local} experts on a rank are more than {MAX_LOCAL_EXPERTS}"
        if sizes.num_local * ranks > MAX_EXPERTS:
            return f"{sizes.num_local * ranks} experts are more than {MAX_EXPERTS}"
        return _misfit_of_both(sizes)

    @classmethod
    def why_waits(cls, module: Any, ranks: int) -> str | None:
        if ranks > node_size() and torch.are_deterministic_algorithms_enabled():
            return "between nodes ElasticBuffer's deterministic order takes a count that the host reads"
        return None

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.destroy()
        self._buffers.clear()

    def _dispatch(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, static: bool) -> Arrived:
        room = x_TH.shape[0] if static else self._agree_on_room(x_TH)
        buffer = self._buffer(room)
        x_NH, ids_NK, weights_NK, routes, _ = buffer.dispatch(
            x_TH,
            topk_idx=ids_TK,
            topk_weights=weights_TK,
            num_experts=num_experts,
            num_max_tokens_per_rank=room,
            num_sms=_count_sms(buffer, num_experts, ids_TK.shape[1]),
            do_cpu_sync=not static,
        )
        if static:  # nothing is written behind what came
            came = routes.psum_num_recv_tokens_per_scaleup_rank[-1]
            behind = torch.arange(ids_NK.shape[0], device=ids_NK.device) >= came
            ids_NK = ids_NK.masked_fill(behind.unsqueeze(1), -1)
        rows = None if static else sum(routes.num_recv_tokens_per_expert_list)
        return Arrived(x_NH, ids_NK, weights_NK, rows, Handle(x_TH.shape[0], room, routes))

    def _dispatch_again(self, x_TH: Tensor, handle: Handle) -> Tensor:
        buffer = self._buffer(handle.room)
        # it would guess the number from experts that only the handle knows
        x_NH: Tensor = buffer.dispatch(x_TH, handle=handle.routes, num_sms=handle.routes.num_sms)[0]
        return x_NH

    def _combine(self, x_NH: Tensor, weights_NK: Tensor | None, handle: Handle) -> tuple[Tensor, Tensor | None]:
        x_TH, weights_TK, _ = self._buffer(handle.room).combine(x_NH, handle.routes, topk_weights=weights_NK)
        return x_TH, weights_TK

    def _agree_on_room(self, x_TH: Tensor) -> int:
        """Tokens of the fullest rank, rounded up. The host waits for it."""
        most = torch.tensor(x_TH.shape[0], device=x_TH.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return _round_up(int(most))

    def _buffer(self, room: int) -> Any:
        room = _round_up(room)
        if room not in self._buffers:
            kind = self.module.ElasticBuffer
            options = {"num_max_tokens_per_rank": room, "hidden": self.hidden, "explicitly_destroy": True}
            wanted = {
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "num_cpu_timeout_secs": WAIT_SECONDS,
                "num_gpu_timeout_secs": WAIT_SECONDS,
            }
            options |= {name: value for name, value in wanted.items() if name in _parameters(kind, "__init__")}
            with _network(not self._within_node):
                self._buffers[room] = kind(self.group, **options)
        return self._buffers[room]


class BufferLink(Link):
    """`Buffer`, on CUDA's shared memory in a node and NVSHMEM between nodes."""

    name = "Buffer"
    calls: ClassVar[dict[str, tuple[str, ...]]] = {
        "__init__": ("num_nvl_bytes", "num_rdma_bytes"),
        "get_dispatch_config": ("num_ranks",),
        "get_combine_config": ("num_ranks",),
        "get_dispatch_layout": ("topk_idx", "num_experts"),
        "dispatch": (
            *("handle", "num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank"),
            *("num_tokens_per_expert", "topk_idx", "topk_weights"),
        ),
        "combine": ("handle", "topk_weights"),
    }

    def __init__(self, module: Any, group: dist.ProcessGroup, hidden: int) -> None:
        super().__init__(module, group, hidden)
        kind = module.Buffer
        configs = kind.get_dispatch_config(self.ranks), kind.get_combine_config(self.ranks)
        sizes = self.hidden * torch.bfloat16.itemsize, self.ranks
        nvlink_bytes = max(config.get_nvl_buffer_size_hint(*sizes) for config in configs)
        rdma_bytes = 0
        if self.ranks > NVLINK_PEERS:  # a build without NVSHMEM does not answer
            rdma_bytes = max(config.get_rdma_buffer_size_hint(*sizes) for config in configs)
        self._destroys = "explicitly_destroy" in _parameters(kind, "__init__")
        options = {"explicitly_destroy": True} if self._destroys else {}
        self._buffer = kind(group, nvlink_bytes, rdma_bytes, **options)

    @classmethod
    def _layout_obstacle(cls, found: Any, ranks: int) -> str | None:
        try:
            found.get_dispatch_config(ranks)
        except AssertionError:
            return f"Buffer has no setting for {ranks} ranks"
        node = node_size()
        if ranks <= NVLINK_PEERS and node % ranks:
            return f"Buffer needs an expert group of {ranks} ranks within a node, and a node has {node}"
        if ranks > NVLINK_PEERS and node % NVLINK_PEERS:
            return (
                f"Buffer needs {NVLINK_PEERS} ranks on each node for an expert group of {ranks}, and a node has {node}"
            )
        return None

    @classmethod
    def misfit(cls, ranks: int, sizes: Sizes) -> str | None:
        step, most = (
            (256, 7936) if ranks > NVLINK_PEERS else (16, 8176)
        )  # halves and chunks of a token in shared memory
        if sizes.hidden % step or sizes.hidden > most:
            return f"hidden size {sizes.hidden} is no multiple of {step} up to {most}"
        if ranks <= NVLINK_PEERS and sizes.num_local > 128:  # a thread for each
            return f"{sizes.num_local} experts on a rank are more than 128"
        return _misfit_of_both(sizes)

    @classmethod
    def why_waits(cls, module: Any, ranks: int) -> str | None:
        call = "internode_dispatch" if ranks > NVLINK_PEERS else "dispatch"
        if "num_worst_tokens" in _parameters(module.Buffer, call):
            return None
        where = "between nodes" if ranks > NVLINK_PEERS else "at all"
        return f"this DeepEP's Buffer reads the number of tokens on the host; it takes no num_worst_tokens {where}"

    def close(self) -> None:
        if self._destroys:
            self._buffer.destroy()
        self._buffer = None

    def _dispatch(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, static: bool) -> Arrived:
        per_rank, per_node, per_expert, is_in_rank, _ = self._buffer.get_dispatch_layout(ids_TK, num_experts)
        x_NH, ids_NK, weights_NK, per_local_expert, routes, _ = self._buffer.dispatch(
            x_TH,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids_TK,
            topk_weights=weights_TK,
            **({"num_worst_tokens": self.ranks * x_TH.shape[0]} if static else {}),
        )
        rows = None if static else sum(per_local_expert)
        return Arrived(x_NH, ids_NK, weights_NK, rows, Handle(x_TH.shape[0], x_TH.shape[0], routes))

    def _dispatch_again(self, x_TH: Tensor, handle: Handle) -> Tensor:
        x_NH: Tensor = self._buffer.dispatch(x_TH, handle=handle.routes)[0]
        return x_NH

    def _combine(self, x_NH: Tensor, weights_NK: Tensor | None, handle: Handle) -> tuple[Tensor, Tensor | None]:
        x_TH, weights_TK, _ = self._buffer.combine(x_NH, handle.routes, topk_weights=weights_NK)
        return x_TH, weights_TK


def _misfit_of_both(sizes: Sizes) -> str | None:
    if sizes.top_k > MAX_TOP_K:
        return f"{sizes.top_k} experts of a token are more than {MAX_TOP_K}"
    if sizes.dtype not in DTYPES:
        return f"tokens are {str(sizes.dtype).removeprefix('torch.')}, not bfloat16"
    return None


def _count_sms(buffer: Any, num_experts: int, top_k: int) -> int:
    try:
        sms: int = buffer.get_theoretical_num_sms(num_experts, top_k)
    except ZeroDivisionError:  # it has read 0 for the speed of the network card
        return FALLBACK_SMS
    return sms if sms > LEAST_SMS else FALLBACK_SMS


@contextmanager
def _network(needed: bool) -> Iterator[None]:
    """`ElasticBuffer` asks NCCL for its network in a node too, where its kernels do not use it, and fails where there
    is none. What the user has set is left."""
    name = "EP_DISABLE_GIN"
    if needed or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _parameters(found: Any, call: str) -> set[str]:
    method = getattr(found, call, None)
    return set() if method is None else set(inspect.signature(method).parameters)


def node_size() -> int:
    """Ranks of a node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _round_up(tokens: int) -> int:
    return max(LEAST_ROOM, 1 << (tokens - 1).bit_length())


def _some(x_TH: Tensor) -> Tensor:
    """At least one token."""
    return x_TH.contiguous() if x_TH.shape[0] else x_TH.new_zeros(1, x_TH.shape[1])
