"""The time and memory of a training step, by the method of NVIDIA's published comparison.

TPS per GPU = tokens / (forward + loss + backward), the mean of the timed steps after the warm-up. The optimizer runs,
so that its states count in the memory, and is timed apart. Each rank starts its clock when its GPU is idle; times are
means over ranks. A step whose rows did not fit and that is run again counts with all its runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moetrain import mesh
from moetrain.moe.balance import Load, LoadStats


@dataclass
class Subject:
    """A model whose step is timed."""

    model: PreTrainedModel
    passes: Callable[[dict[str, Tensor]], Tensor]
    """Forward, loss and backward of one batch; the loss, detached, on the device."""
    overflowed: Callable[[], bool]
    """Whether the gradients are not exact and the batch must be run again; one read on the host."""
    update: Callable[[], None]
    """From the gradients to new parameters."""
    status: Callable[[], str]
    """How the passes run, for people; begins with `captured` where forward and backward are one graph."""
    stats: LoadStats
    counts_always: bool
    """Whether the step counts the experts' load, as the trainer's does; otherwise only the warm-up is counted."""


@dataclass
class Timings:
    """Of the timed steps on this rank, in seconds, one entry a step."""

    forward_backward: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    """Empty where forward and backward are one graph."""
    host: list[float] = field(default_factory=list)
    """Until the host has issued forward and backward."""
    optimizer: list[float] = field(default_factory=list)
    redone: int = 0
    """Runs again of steps that overflowed."""
    loss: float = 0.0
    """Of the last step."""
    load: Load | None = None
    """Of the last step that was counted, all ranks."""


def random_batches(vocab_size: int, rows: int, seq_len: int, steps: int) -> list[dict[str, Tensor]]:
    """Random tokens on this rank's device, another batch for each step and rank, all of them labels."""
    generator = torch.Generator().manual_seed(mesh.rank())
    ids = torch.randint(vocab_size, (steps, rows, seq_len), generator=generator).to(mesh.device())
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def time_steps(subject: Subject, batches: Sequence[dict[str, Tensor]], warmup: int) -> Timings:
    """Run a step on each batch; the first `warmup` are not timed."""
    clock, load = Clock(subject.model.device), None
    for batch in batches[:warmup]:
        _run_step(subject, batch, clock, Timings())
        load = subject.stats.read()
    timings = Timings(load=load)
    with contextlib.ExitStack() as stack:
        if not subject.counts_always:
            stack.enter_context(subject.stats.paused())
        if not subject.status().startswith("captured"):
            hook = subject.model.register_forward_hook(lambda *_: clock.mark_forward())
            stack.callback(hook.remove)
        for batch in batches[warmup:]:
            _run_step(subject, batch, clock, timings)
            if subject.counts_always:
                timings.load = subject.stats.read()
    return timings


def run_passes(
    subject: Subject, batch: dict[str, Tensor], issued: Callable[[], None] = lambda: None
) -> tuple[Tensor, int]:
    """Exact gradients of one batch, as the trainer gets them.

    Args:
        issued: called when the host has issued the first run, before it waits for anything.

    Returns:
        The loss on the device, and how often the batch was run again.
    """
    redone, loss = 0, subject.passes(batch)
    issued()
    while subject.overflowed():
        subject.stats.discard()
        redone, loss = redone + 1, subject.passes(batch)
    return loss, redone


def _run_step(subject: Subject, batch: dict[str, Tensor], clock: Clock, timings: Timings) -> None:
    clock.start()
    loss, redone = run_passes(subject, batch, clock.mark_issued)
    timings.forward_backward.append(clock.stop())
    timings.host.append(clock.issued)
    if clock.forward is not None:
        timings.forward.append(clock.forward)
    timings.redone += redone
    timings.loss = loss.item()
    clock.start()
    subject.update()
    timings.optimizer.append(clock.stop())


class Clock:
    """Seconds of work from an idle device to an idle device, and when its parts ended."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.issued = 0.0
        """When the host was done, counted from the start."""
        self.forward: float | None = None
        """When the device was done with the first forward, counted from the start; None if nothing said so."""
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.on_gpu else []
        self._begin = 0.0
        self._marked = False

    def start(self) -> None:
        self._wait()
        self.forward, self._marked = None, False
        if self.on_gpu:
            self._events[0].record()
        self._begin = time.perf_counter()

    def mark_issued(self) -> None:
        self.issued = time.perf_counter() - self._begin

    def mark_forward(self) -> None:
        if self._marked:
            return
        self._marked = True
        if self.on_gpu:
            self._events[1].record()  # no wait: the host goes on to issue the backward
        else:
            self.forward = time.perf_counter() - self._begin

    def stop(self) -> float:
        self._wait()
        seconds = time.perf_counter() - self._begin
        if self._marked and self.on_gpu:
            self.forward = self._events[0].elapsed_time(self._events[1]) / 1e3
        return seconds

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
