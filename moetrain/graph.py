"""Forward, loss and backward of one batch, captured in a CUDA graph where the model and its setting allow it.

    the first MEASURED passes    eager, with exactly the room that their rows need, which is noted
    one more                     eager, with static capacities; whatever waits for the host is found
    then                         captured, and replayed from then on

Gradients of a captured pass lie at fixed addresses. A pass whose rows did not fit (`overflowed`) has wrong gradients:
the caller runs the step's passes again before the optimizer sees them; they then run eagerly, with exactly the room
they need, and the next step is captured anew with more.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from moetrain.families import experts_modules
from moetrain.fsdp import detach_streams, join_streams
from moetrain.kernels import Activation, RowStack
from moetrain.kernels.aside import work_aside
from moetrain.moe.dispatch import StaticDispatcher, dispatchers_of, exchanges
from moetrain.moe.experts import gate_of
from moetrain.tape import recomputed_modules

MEASURED = 8
"""Passes whose rows are counted before the first capture, where experts are spread over ranks. With random weights the
load of a rank in a deep layer differs by a quarter from batch to batch."""
MARGIN = 1.5
"""Room for a call over the fullest one seen of its layer. It costs a few temporary tensors of one layer."""
STACK_MARGIN = 1.15
"""Room for the rows of all layers together over the most seen, where the backward needs them: in 18 GiB of rows of
Qwen3-30B-A3B on 4 ranks, 2.4. They vary little: from batch to batch by 3 %, with random weights."""
GROWTH = 1.3
"""What a margin that was too small is multiplied by: the load is on the move, and every overflow costs a capture."""
ROUND = 128
"""Capacities are multiples of this: the rows of a product's tile."""

Mode = Literal["auto", "on", "off"]


class Passes:
    """Runs passes of one model. Every rank makes the same calls in the same order.

    Args:
        mode: `auto` captures where possible, `on` raises where not, `off` never captures.

    Raises:
        ValueError: `on`, and the model cannot be captured.
    """

    def __init__(self, model: PreTrainedModel, mode: Mode = "auto") -> None:
        self.model = model
        static = {name: d for name, d in dispatchers_of(model) if isinstance(d, StaticDispatcher)}
        self.dispatchers = list(static.values())
        self.obstacle = "train.cuda_graph=off" if mode == "off" else capture_obstacle(model)
        self.mode = mode
        if mode == "on" and self.obstacle:
            raise ValueError(f"train.cuda_graph=on, but the step cannot be captured: {self.obstacle}")
        self._runs = 0
        self._watched_once = False
        self._most_needed = [0] * len(self.dispatchers)
        self._margins = [MARGIN] * len(self.dispatchers)
        # what is recomputed in the backward lives no longer than its layer
        recomputed = recomputed_modules(model)
        stacked = [d for name, d in static.items() if model.get_submodule(name) not in recomputed]
        self._stack = RowStack(model.device) if stacked else None
        self._most_stacked, self._stack_margin = 0, STACK_MARGIN
        for dispatcher in stacked:
            dispatcher.stack = self._stack
        self._exact = bool(self.dispatchers)
        self._shape: tuple[Any, ...] | None = None
        self._graphs: dict[bool, _Captured] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}

    @property
    def status(self) -> str:
        """How the passes run, for people."""
        if self.obstacle:
            return f"eager: {self.obstacle}"
        return "captured in a CUDA graph" if self._graphs else "eager: the first passes, before the capture"

    def __call__(self, batch: dict[str, Tensor], scale: float | Tensor, accumulate: bool = False) -> Tensor:
        """Gradients of one batch in the parameters' `.grad`.

        Args:
            batch: the model's arguments, on any device.
            scale: what the sum of the token losses is divided by (`num_items_in_batch`); a tensor is a scalar on the
                model's device.
            accumulate: add to the gradients that are there; without it they are dropped.

        Returns:
            The loss, fp32 scalar on the device; the next call may write over it.
        """
        if not accumulate:
            self.model.zero_grad(set_to_none=True)
        if self.obstacle or not self._is_same_shape(batch):
            return self._eager(batch, scale)
        self._runs += 1
        if self._runs == 1 or self._exact:
            return self._eager(batch, scale)
        if not self._watched_once:
            self._watched_once = True
            return self._watched(batch, scale)
        if accumulate and not self._restore_gradients():
            return self._eager(batch, scale)
        if accumulate not in self._graphs:
            self._capture(batch, accumulate)
        loss = self._graphs[accumulate].replay(batch, scale)
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient
        return loss

    def overflowed(self) -> bool:
        """Whether rows did not fit since the last call, on any rank; then the gradients are not exact and the same
        passes are to be run again. One read on the host."""
        needed = self.needed()
        if dist.is_initialized() and self.dispatchers:
            dist.all_reduce(needed, dist.ReduceOp.MAX)
        return self.make_room(needed.tolist())

    def needed(self) -> Tensor:
        """What `make_room` must know, int64 on the device, and begin anew to note it; empty where nothing can overflow.
        The maximum over all ranks counts."""
        none = torch.zeros((), dtype=torch.int64, device=self.model.device)
        if not self.dispatchers:
            return none.expand(0)
        noted = [none if d.needed is None else d.needed for d in self.dispatchers]
        noted.append(none if self._stack is None else self._stack.most)
        needed = torch.stack([*noted, torch.full_like(none, self.obstacle is not None)])
        for tensor in noted:
            tensor.zero_()
        return needed

    def make_room(self, needed: list[int]) -> bool:
        """Whether rows did not fit, as in `overflowed`. Ranks also agree here whether one of them has given up.

        Args:
            needed: `needed()`, the maximum over all ranks.
        """
        if not self.dispatchers:
            return False
        *rows, stacked, given_up = needed
        if given_up and not self.obstacle:
            self.obstacle = "the host of another rank waits for its GPU"
            self._graphs, self._gradients = {}, {}  # the parameters keep this step's gradients
        if not self._exact:
            over = [row > (d.capacity or 0) for row, d in zip(rows, self.dispatchers, strict=True)]
            if any(over) or (self._stack is not None and stacked > (self._stack.capacity or 0)):
                if any(over):  # what later layers got depends on what was cut in this one
                    self._margins[over.index(True)] *= GROWTH
                else:
                    self._stack_margin *= GROWTH
                self._forget()
                self._set_capacities(exact=True)
                return True
            if self.obstacle:
                self._set_capacities(exact=True)
        self._most_needed = [max(pair) for pair in zip(rows, self._most_needed, strict=True)]
        self._most_stacked = max(self._most_stacked, stacked)
        if self._exact and not self.obstacle and self._runs >= MEASURED:
            self._set_capacities(exact=False)
        return False

    def _set_capacities(self, exact: bool) -> None:
        self._exact = exact
        for dispatcher, most, margin in zip(self.dispatchers, self._most_needed, self._margins, strict=True):
            dispatcher.capacity = None if exact else _rounded(most * margin)
        if self._stack is not None:
            largest = max(d.capacity or 0 for d in self.dispatchers)
            self._stack.lay_out(None if exact else _rounded(self._most_stacked * self._stack_margin), largest)

    @contextmanager
    def uncut(self) -> Iterator[None]:
        """Inside, for an evaluation, every row has room whatever the passes have measured, and nothing is noted."""
        kept = [(dispatcher.capacity, dispatcher.needed, dispatcher.stack) for dispatcher in self.dispatchers]
        for dispatcher in self.dispatchers:
            dispatcher.capacity = dispatcher.needed = dispatcher.stack = None
        try:
            yield
        finally:  # a graph writes to the tensors that were there
            for dispatcher, before in zip(self.dispatchers, kept, strict=True):
                dispatcher.capacity, dispatcher.needed, dispatcher.stack = before

    def _is_same_shape(self, batch: dict[str, Tensor]) -> bool:
        """Whether the batch has the shape of the first; only that one is captured."""
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(batch.items()))
        self._shape = self._shape or shape
        return shape == self._shape

    def _eager(self, batch: dict[str, Tensor], scale: float | Tensor) -> Tensor:
        device = self.model.device
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        return self._forward_backward(inputs, torch.zeros((), device=device).fill_(scale))

    def _watched(self, batch: dict[str, Tensor], scale: float | Tensor) -> Tensor:
        """An eager pass that notes what waits for the host: it could not be captured."""
        with watch_syncs() as found:
            loss = self._eager(batch, scale)
        if found:
            self._give_up(f"the host waits for the GPU at {', '.join(found[:3])}")
        return loss

    def _forward_backward(self, inputs: dict[str, Tensor], scale: Tensor) -> Tensor:
        if self._stack is not None:
            self._stack.begin()
        loss: Tensor = self.model(**inputs, num_items_in_batch=scale, use_cache=False).loss
        with work_aside(capturing()):
            loss.backward()
        return loss.detach()

    def _capture(self, batch: dict[str, Tensor], accumulate: bool) -> None:
        """Record a pass; nothing is computed. The graph's memory is its own, so the eager passes' is given back."""
        gc.collect()
        torch.cuda.empty_cache()
        captured = _Captured(batch, self.model.device)
        pool = next((graph.pool for graph in self._graphs.values()), None)
        with detach_streams(self.model):
            captured.record(self._forward_backward, pool, self.model)
        self._graphs[accumulate] = captured
        self._gradients = {p: p.grad for p in self.model.parameters() if p.grad is not None}

    def _restore_gradients(self) -> bool:
        """Bring gradients that an eager pass has left to where a captured pass adds to them."""
        if not self._gradients:
            return False
        for parameter, gradient in self._gradients.items():
            if parameter.grad is not gradient:
                if parameter.grad is None:
                    gradient.zero_()
                else:
                    gradient.copy_(parameter.grad)
                parameter.grad = gradient
        return True

    def _give_up(self, obstacle: str) -> None:
        if self.mode == "on":
            raise RuntimeError(f"train.cuda_graph=on, but the step cannot be captured: {obstacle}")
        self.obstacle = obstacle  # capacities stay until `overflowed`, where all ranks leave them together

    def _forget(self) -> None:
        """Drop graphs and their memory, the gradients included."""
        self.model.zero_grad(set_to_none=True)
        self._graphs, self._gradients = {}, {}

    def close(self) -> None:
        """Destroying a process group hangs while a graph holds its collectives. Whoever uses the model next has room
        for every row."""
        self._forget()
        self._set_capacities(exact=True)
        for dispatcher in self.dispatchers:
            dispatcher.stack = None
        gc.collect()


class _Captured:
    """One graph with its inputs and its output."""

    def __init__(self, batch: dict[str, Tensor], device: torch.device) -> None:
        self.inputs = {name: torch.empty_like(tensor, device=device) for name, tensor in batch.items()}
        self.scale = torch.ones((), device=device)
        self.graph = torch.cuda.CUDAGraph()
        self.loss: Tensor | None = None
        self.pool: Any = None
        """Where its memory comes from; graphs of one pool must not run side by side."""

    def record(self, run: Callable[[dict[str, Tensor], Tensor], Tensor], pool: Any, model: nn.Module) -> None:
        for exchange in exchanges():
            exchange.begin_capture()
        # other threads (NCCL's watchdog) may query events meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.loss = run(self.inputs, self.scale)
            join_streams(model)
        self.pool = self.graph.pool()

    def replay(self, batch: dict[str, Tensor], scale: float | Tensor) -> Tensor:
        for name, tensor in batch.items():
            self.inputs[name].copy_(tensor, non_blocking=True)
        self.scale.fill_(scale)
        self.graph.replay()
        assert self.loss is not None
        return self.loss


def _rounded(rows: float) -> int:
    return max(math.ceil(rows / ROUND), 1) * ROUND


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def capture_obstacle(model: PreTrainedModel, device_type: str | None = None, waits: str | None = None) -> str | None:
    """Why a model cannot be captured, as far as one can tell without running it; None if nothing is known.

    Args:
        device_type: where it will run, for a model on the meta device.
        waits: why the dispatcher that it will have waits for the GPU, likewise.
    """
    if (device_type or model.device.type) != "cuda":
        return "CUDA graphs need a GPU"
    waiting = [waits, *(dispatcher.waits for _, dispatcher in dispatchers_of(model))]
    if reason := next(filter(None, waiting), None):
        return reason
    for name, experts in experts_modules(model):
        if getattr(experts.config, "_experts_implementation", None) == "eager":
            return f"{name} runs expert by expert (experts=eager)"
        if not isinstance(gate_of(experts), Activation) or experts.has_post_expert_norm:
            return f"{name} has an activation or norm without a kernel of static shape"
    return None


@contextmanager
def watch_syncs() -> Iterator[list[str]]:
    """Inside, operations that make the host wait for the GPU are noted, as `file:line`; none is kept from running."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    if not torch.cuda.is_available():
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            place = f"{'/'.join(warning.filename.split('/')[-2:])}:{warning.lineno}"
            if place not in found:
                found.append(place)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
