"""A memory of results that are dear to compute again and small to keep, for selective activation checkpointing.

Kept are the outputs of attention and what combine brought: at 16k tokens of Qwen3-30B-A3B 0.2 GB a layer for a fifth of
a layer's forward each. With what combine brought in hand, a recomputation leaves out the down projection of the experts
too. The rows that dispatch brings, 0.5 GB a layer, are kept where they may come from another node.

Torch's own selective checkpointing matches every operator of the recomputation with the forward's by position, which
the hooks of nested FSDP2 groups break.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

KEEPS = "_moetrain_keeps"
"""Attribute of the modules of a model whose recomputations take what was kept."""

Received = TypeVar("Received")


class _Tape:
    """What one checkpointed region keeps, in order.

    It holds no autograd history: the history holds the tape, and would never be freed without a backward.
    """

    def __init__(self) -> None:
        self.received: list[Any] = []
        self.position = 0
        self.replays = False

    def next(self, exchange: Callable[[], Any]) -> Any:
        if not self.replays:
            received = exchange()
            self.received.append(_detached(received))
            return received
        self.position += 1
        return _detached(self.received[self.position - 1])


def _detached(received: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, received)


_tape: ContextVar[_Tape | None] = ContextVar("tape", default=None)


def receive(exchange: Callable[[], Received]) -> Received:
    """What `exchange` returns; in a recomputation, what it returned in the forward, without calling it."""
    tape = _tape.get()
    return exchange() if tape is None else tape.next(exchange)


def receive_copy(compute: Callable[[], Received]) -> Received:
    """`receive` inside of compiled code, which may write over a result when it needs it no more."""
    tape = _tape.get()
    if tape is None or tape.replays:
        return receive(compute)
    copy: Received = tree_map_only(Tensor, Tensor.clone, receive(compute))
    return copy


def replaying() -> bool:
    """Whether this is a recomputation that takes what was kept."""
    tape = _tape.get()
    return tape is not None and tape.replays


def keep(out: Tensor) -> Tensor:
    """`out`; in a recomputation, what it was in the forward, with the gradient going to the new one."""
    return out if _tape.get() is None else _Keep.apply(out)


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return receive(out.clone)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def recomputed_modules(model: nn.Module) -> set[nn.Module]:
    """Modules whose forward the backward runs again: all inside of checkpointed layers."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return {inner for layer in layers if layer.gradient_checkpointing for inner in layer.modules()}


def keep_received() -> tuple[Any, Any]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`: the recomputation takes what the forward has kept."""
    tape = _Tape()
    return _Running(tape, replays=False), _Running(tape, replays=True)


class _Running:
    """Context in which a tape records or replays; a backward with `retain_graph` enters it once more."""

    def __init__(self, tape: _Tape, replays: bool) -> None:
        self.tape, self.replays = tape, replays

    def __enter__(self) -> None:
        self.tape.position, self.tape.replays = 0, self.replays
        self.token = _tape.set(self.tape)

    def __exit__(self, *_: object) -> None:
        _tape.reset(self.token)
