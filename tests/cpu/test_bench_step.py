"""What a step's clock counts, and the batches that it is given."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from moetrain.bench.step import Clock, Subject, random_batches, run_passes, time_steps
from moetrain.moe.balance import Load


class Time:
    """A clock that only moves when work is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Stats:
    """Stands in for the counts of the experts' load; notes when it counts."""

    def __init__(self) -> None:
        self.reads, self.pauses, self.discards = 0, 0, 0

    def read(self) -> Load:
        self.reads += 1
        return Load(float(self.reads), 0, 1.0, [])

    def discard(self) -> None:
        self.discards += 1

    def paused(self) -> Any:
        self.pauses += 1
        return torch.no_grad()


def subject(clock: Time, overflows: list[bool], status: str, counts: bool = True) -> Subject:
    """Forward 1 s, backward 2 s, asking for an overflow 0.25 s, optimizer 0.5 s; the first step is slower by 100."""
    model: Any = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    model.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + 1.0))
    calls: list[int] = []

    def passes(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        model(torch.zeros(1))
        clock.now += 2.0 + (100.0 if len(calls) == 1 else 0.0)
        return torch.tensor(float(len(calls)))

    def overflowed() -> bool:
        clock.now += 0.25
        return overflows.pop(0)

    def update() -> None:
        clock.now += 0.5

    return Subject(model, passes, overflowed, update, lambda: status, Stats(), counts)


def test_times_of_an_eager_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = subject(Time(monkeypatch), [False, False, True, False, False], "eager: as asked")
    timings = time_steps(step, [{}] * 4, warmup=1)
    # the second timed step runs twice: both runs and both questions count, but its host and forward are the first's
    assert timings.forward_backward == [3.25, 6.5, 3.25]
    assert timings.forward == [1.0, 1.0, 1.0]
    assert timings.host == [3.0, 3.0, 3.0]
    assert timings.optimizer == [0.5, 0.5, 0.5]
    assert (timings.redone, timings.loss) == (1, 5.0)
    assert step.stats.discards == 1 and step.stats.pauses == 0
    assert timings.load is not None and timings.load.max_over_mean == 4.0  # the last step's


def test_a_captured_step_has_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = time_steps(subject(Time(monkeypatch), [False] * 3, "captured in a CUDA graph"), [{}] * 3, warmup=1)
    assert timings.forward == [] and timings.forward_backward == [3.25, 3.25]


def test_load_that_is_counted_in_the_warm_up_only(monkeypatch: pytest.MonkeyPatch) -> None:
    step = subject(Time(monkeypatch), [False] * 4, "eager", counts=False)
    timings = time_steps(step, [{}] * 4, warmup=2)
    assert step.stats.pauses == 1 and step.stats.reads == 2
    assert timings.load is not None and timings.load.max_over_mean == 2.0


def test_run_passes_says_when_the_first_run_is_issued(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    step, issued = subject(clock, [True, True, False], "eager"), []
    loss, redone = run_passes(step, {}, lambda: issued.append(clock.now))
    assert (loss.item(), redone, issued) == (3.0, 2, [103.0])


def test_clock_without_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    now, clock = Time(monkeypatch), Clock(torch.device("cpu"))
    clock.start()
    clock.mark_forward()
    clock.start()
    now.now += 1.5
    assert clock.stop() == 1.5 and clock.forward is None


def test_batches_differ_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = random_batches(50, 2, 8, 3)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 8)] * 3
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    monkeypatch.setenv("RANK", "1")
    assert not torch.equal(batches[0]["input_ids"], random_batches(50, 2, 8, 3)[0]["input_ids"])
