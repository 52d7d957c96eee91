"""Ranks' work for the tests of captured passes, with a stand-in for the CUDA graph: it runs what was recorded again,
in place, at the capacities of the recording."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain import AutoModelForCausalLM, DistributedConfig, graph
from moetrain.moe.dispatch import dispatchers_of
from moetrain.moe.layer import ep_implementation
from moetrain.parallelize import checkpoint_activations
from tests.families import FAMILIES

TOKENS = (2, 12)


class Recorded(graph._Captured):
    """What a CUDA graph does, by running the pass again with the same memory and the same capacities."""

    def __init__(self, batch: dict[str, Tensor], device: torch.device) -> None:
        self.inputs = {name: torch.empty_like(tensor) for name, tensor in batch.items()}
        self.scale = torch.ones(())
        self.pool = None

    def record(self, run: Callable[..., Tensor], pool: Any, model: nn.Module) -> None:
        self.run, self.model = run, model
        self.adds = any(p.grad is not None for p in model.parameters())
        self.dispatchers = [d for _, d in dispatchers_of(model)]
        self.capacities = [d.capacity for d in self.dispatchers]
        if not self.adds:
            run({name: torch.zeros_like(tensor) for name, tensor in self.inputs.items()}, self.scale)
        self.gradients = {p: p.grad for p in model.parameters() if p.grad is not None}

    def replay(self, batch: dict[str, Tensor], scale: float | Tensor) -> Tensor:
        assert all(d.capacity == c for d, c in zip(self.dispatchers, self.capacities, strict=True))
        for name, tensor in batch.items():
            self.inputs[name].copy_(tensor)
        self.scale.fill_(scale)
        if self.adds:
            assert all(p.grad is gradient for p, gradient in self.gradients.items()), "gradients have moved"
            return self.run(self.inputs, self.scale)
        self.model.zero_grad(set_to_none=True)
        loss = self.run(self.inputs, self.scale)
        with torch.no_grad():
            for p, gradient in self.gradients.items():
                gradient.copy_(p.grad)
        return loss


@contextmanager
def recorded_instead_of_captured() -> Iterator[None]:
    kept = graph._Captured, graph.capture_obstacle, graph.MEASURED
    graph._Captured, graph.capture_obstacle = Recorded, lambda model: None  # type: ignore[assignment,misc]
    graph.MEASURED = 2  # a step of two passes
    try:
        yield
    finally:
        graph._Captured, graph.capture_obstacle, graph.MEASURED = kept  # type: ignore[misc]


def build(dispatch: str, world_size: int, checkpointing: str = "none", family: str = "qwen3_moe") -> Any:
    torch.manual_seed(0)
    layout = DistributedConfig(fsdp_size=world_size, ep_size=world_size, ep_implementation=ep_implementation(dispatch))
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32, distributed_config=layout).train()
    mode, _, layers = checkpointing.partition(":")
    checkpoint_activations(model, mode, int(layers) if layers else None)
    return model


def batches(rank: int, step: int, count: int = 2) -> list[dict[str, Tensor]]:
    """Equal in every fourth step, so that what a step needed tells what a later one will."""
    generator = torch.Generator().manual_seed(1000 * (step % 4) + rank)
    ids = [torch.randint(3, 128, TOKENS, generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def run_step(passes: graph.Passes, rank: int, step: int, count: int = 2) -> tuple[int, list[float], dict[str, Tensor]]:
    """The passes of a step, again where they overflowed: how often, the losses, and this rank's gradients."""
    runs = 0
    while True:
        runs += 1
        losses = [
            passes(batch, 24.0, accumulate=number > 0).item() for number, batch in enumerate(batches(rank, step, count))
        ]
        if not passes.overflowed():
            break
    gradients = {name: _local(p.grad).clone() for name, p in passes.model.named_parameters() if p.grad is not None}
    return runs, losses, gradients


def change(model: nn.Module, step: int) -> None:
    """What an optimizer does, without one: the same on every rank and layout."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            _local(parameter).mul_(1.0 + 1e-4 * ((step + number) % 3 - 1))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def differences(
    rank: int, world_size: int, checkpointing: str, forced: list[int], dispatch: str = "allgather"
) -> dict[str, Any]:
    """Steps of captured passes beside those of plain ones; `forced` layers overflow on the fullest rank, each in a step
    of its own.

    Returns how often each step ran, and the largest difference of a loss and of a gradient's norm over all steps.
    """
    plain = graph.Passes(build("alltoall", world_size), "off")
    with recorded_instead_of_captured():
        passes = graph.Passes(build(dispatch, world_size, checkpointing))
        runs, worst_loss, worst_gradient = [], 0.0, 0.0
        fullest = [0] * len(passes.dispatchers)  # the step that needed most rows, by layer
        for step in range(4 + 4 * len(forced)):
            if step >= 4 and step % 4 == fullest[forced[(step - 4) // 4]]:
                layer = forced[(step - 4) // 4]
                passes.dispatchers[layer].capacity = passes._most_needed[layer] - 1
                passes._graphs.clear()
            _, losses, gradients = run_step(plain, rank, step)
            before = list(passes._most_needed)
            again, our_losses, our_gradients = run_step(passes, rank, step)
            runs.append(again)
            fullest = [
                step if now > then else f for now, then, f in zip(passes._most_needed, before, fullest, strict=True)
            ]
            assert gradients.keys() == our_gradients.keys()
            worst_loss = max(worst_loss, *(abs(a - b) for a, b in zip(losses, our_losses, strict=True)))
            for name, gradient in gradients.items():
                error = (gradient - our_gradients[name]).norm() / gradient.norm().clamp(min=1e-6)
                worst_gradient = max(worst_gradient, error.item())
            change(plain.model, step)
            change(passes.model, step)
        status, graphs = passes.status, len(passes._graphs)
        passes.close()
    return {"runs": runs, "loss": worst_loss, "gradient": worst_gradient, "status": status, "graphs": graphs}


def full_stack(rank: int, world_size: int, checkpointing: str = "none") -> dict[str, Any]:
    """Steps of captured passes beside those of plain ones, where the rows of all layers outgrow their one buffer while
    each layer has room enough. How often each step ran, its capacity before and after, the worst gradient."""
    plain = graph.Passes(build("alltoall", world_size), "off")
    with recorded_instead_of_captured():
        passes = graph.Passes(build("allgather", world_size, checkpointing))
        stack = passes._stack
        assert stack is not None
        runs, worst, sizes = [], 0.0, []
        for step in range(12):
            if step == 4:
                stack.lay_out(passes._most_stacked - 1, max(d.capacity or 0 for d in passes.dispatchers))
                passes._graphs.clear()
            before = stack.capacity
            _, _, gradients = run_step(plain, rank, step)
            again, _, ours = run_step(passes, rank, step)
            runs.append(again)
            sizes.append((before, stack.capacity, passes._most_stacked))
            for name, gradient in gradients.items():
                error = (gradient - ours[name]).norm() / gradient.norm().clamp(min=1e-6)
                worst = max(worst, error.item())
        passes.close()
    return {"runs": runs, "gradient": worst, "sizes": sizes, "left": [d.stack for d in passes.dispatchers]}


def capacities(rank: int, world_size: int) -> dict[str, Any]:
    """Capacity after each step, and the rows that a step brings."""
    with recorded_instead_of_captured():
        passes = graph.Passes(build("allgather", world_size))
        found = []
        for step in range(4):
            for number, batch in enumerate(batches(rank, step)):
                passes(batch, 24.0, accumulate=number > 0)
            needed = [int(d.needed) for d in passes.dispatchers]  # type: ignore[arg-type]
            passes.overflowed()
            found.append((needed, [d.capacity for d in passes.dispatchers]))
        other = {name: tensor[:1] for name, tensor in batches(rank, 0)[0].items()}
        graphs = dict(passes._graphs)
        passes(other, 12.0)
        same = passes._graphs == graphs
        passes.overflowed()
    return {"steps": found, "other_shape_left_the_graphs": same, "status": passes.status}


def evaluation(rank: int, world_size: int) -> dict[str, Any]:
    """Losses of a batch that overflows every capacity, between two steps and with room for every row."""
    rows = torch.full((2, 400), 7)  # one token: one choice of experts for all
    with recorded_instead_of_captured():
        passes = graph.Passes(build("allgather", world_size))
        for step in range(2):
            run_step(passes, rank, step)
        before = [(d.capacity, d.needed) for d in passes.dispatchers]
        with torch.no_grad(), passes.uncut():
            loss = passes.model(input_ids=rows, labels=rows).loss.item()
        kept = all(d.capacity == c and d.needed is n for d, (c, n) in zip(passes.dispatchers, before, strict=True))
        runs = run_step(passes, rank, 2)[0]
        with torch.no_grad():
            cut = passes.model(input_ids=rows, labels=rows).loss.item()
            passes.close()
            wanted = passes.model(input_ids=rows, labels=rows).loss.item()
    return {"loss": loss, "wanted": wanted, "cut": cut, "kept": kept, "runs": runs}


def one_rank_waits(rank: int, world_size: int) -> dict[str, Any]:
    """Steps where only rank 0 finds that its host waits, and where the pass that finds it has overflowed."""

    @contextmanager
    def found() -> Iterator[list[str]]:
        for dispatcher in passes.dispatchers:
            dispatcher.capacity = 1
        yield ["logging.py:1"] if rank == 0 else []

    kept, graph.watch_syncs = graph.watch_syncs, found
    try:
        with recorded_instead_of_captured():
            passes = graph.Passes(build("allgather", world_size))
            runs = [run_step(passes, rank, step)[0] for step in range(4)]
    finally:
        graph.watch_syncs = kept
    capacities = [d.capacity for d in passes.dispatchers]
    return {"runs": runs, "status": passes.status, "capacities": capacities, "graphs": len(passes._graphs)}


def kept_without_backward(rank: int, world_size: int, checkpointing: str) -> list[bool]:
    """Whether what a dispatch received lives on, forward by forward, where no backward follows."""
    model = build("allgather", world_size, checkpointing)
    received = []
    hook = model.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda _, args: received.append(weakref.ref(args[0]))
    )
    for step in range(3):
        loss = model(**batches(rank, step)[0]).loss
    hook.remove()
    del loss
    gc.collect()
    return [tensor() is not None for tensor in received]


def own_divisor(rank: int, world_size: int) -> list[float]:
    """Norms of the experts' gradients under `set_gradient_divide_factor(1)` over those without."""
    norms: list[list[float]] = []
    for factor in (None, 1.0):
        model = build("alltoall", world_size)
        for name, module in model.named_modules():
            if factor is not None and name.endswith(".experts"):
                module.set_gradient_divide_factor(factor)
        model(**batches(rank, 0)[0]).loss.backward()
        experts = [p for name, p in model.named_parameters() if ".experts." in name]
        norms.append([_local(p.grad).norm().item() for p in experts])
    return [ours / before for before, ours in zip(*norms, strict=True)]
