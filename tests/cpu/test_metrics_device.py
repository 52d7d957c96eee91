"""Times of the device's work: which sections are measured, what they count for, and the counter inside CUDA graphs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from moetrain.kernels.clock import stamp
from moetrain.metrics.device import EXACT, STRIDE, DeviceTimes, timed
from moetrain.moe.balance import LoadStats
from moetrain.readback import Readback

CPU = torch.device("cpu")


class Passes:
    """None of which overflows."""

    def needed(self) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize("weight", [1, STRIDE])
def test_a_counter_grows_by_what_a_section_takes(weight: int) -> None:
    counter = torch.zeros(1, dtype=torch.int64)
    for _ in range(3):
        stamp(counter, -weight)
        time.sleep(0.01)
        stamp(counter, weight)
        time.sleep(0.02)
    assert 0.03 <= counter.item() / weight / 1e9 < 0.06


@pytest.mark.parametrize("clock", [2**62, 2**63 - 5, 2**61 + 12345])
def test_a_weight_may_wrap_around(clock: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks since 1970 times a weight are too large for int64; their difference is not."""
    counter = torch.full((1,), 77, dtype=torch.int64)
    for now, weight in ((clock, -STRIDE), (clock + 1000, STRIDE)):
        monkeypatch.setattr(time, "perf_counter_ns", lambda now=now: now)
        stamp(counter, weight)
    assert counter.item() == 77 + STRIDE * 1000


def test_the_step_brings_the_counter_to_the_host() -> None:
    """With its one copy, exactly for a hundred days, and as seconds of the step alone."""
    times = DeviceTimes(CPU)
    readback = Readback(Passes(), LoadStats([], [], CPU), times, CPU)  # type: ignore[arg-type]
    seen = []
    for nanoseconds in (1_500_000_000, 1_500_000_000, 4_000_000_001, 2**53 - 1):
        times.counter.fill_(nanoseconds)
        numbers = readback.read(torch.tensor(2.0), torch.tensor(3.0), torch.tensor([5.0, 6.0]), 0.5, 7)
        assert (numbers.loss, numbers.grad_norm, numbers.label_tokens, numbers.stop_code) == (2.0, 3.0, 5, 7)
        seen.append(times.take()["collective_wait"])
    assert seen == [1.5, 0.0, 2.500000001, pytest.approx((2**53 - 4_000_000_002) / 1e9, abs=1e-9)]
    assert times.take() == {}


def test_a_sample_of_many_alike_counts_for_all_of_them() -> None:
    times = DeviceTimes(CPU)
    weights = [times.weight(many=True) for _ in range(EXACT + 3 * STRIDE)]
    assert weights[:EXACT] == [1] * EXACT and weights[EXACT:] == ([0] * (STRIDE - 1) + [STRIDE]) * 3
    assert times.weight(many=False) == 1
    times.take()
    assert times.weight(many=True) == 1, "a step begins anew"


@pytest.mark.parametrize("kinds", [2, 3, 4, 5, 6])
def test_every_kind_of_exchange_gets_its_turn(kinds: int) -> None:
    """Layers whose exchanges take 1, 2, 3, ... seconds: the sum over 48 layers is found within a tenth."""
    times = DeviceTimes(CPU)
    sections = [1 + number % kinds for number in range(48 * kinds)]
    found = sum(times.weight(many=True) * seconds for seconds in sections)
    assert found == pytest.approx(sum(sections), rel=0.12)


class Event:
    """A CUDA event whose time is the number of those before it, in milliseconds."""

    recorded = 0

    def __init__(self, **_: Any) -> None:
        self.at = -1

    def record(self) -> None:
        self.at, Event.recorded = Event.recorded, Event.recorded + 1

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


def test_a_gpu_measures_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a graph by events, inside by the counter, each with the weight of what it stands for."""
    stamped: list[int] = []
    capturing = False
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr("moetrain.metrics.device._stamp", lambda _, weight: stamped.append(weight))
    times, gpu = DeviceTimes(CPU), torch.device("cuda", 0)
    with times.measured():
        for _ in range(EXACT + STRIDE):
            with timed("collective_wait", gpu, many=True):
                pass
        with timed("collective_wait", gpu):
            pass
    assert Event.recorded == 2 * (EXACT + 2) and stamped == []
    assert times.take() == {"collective_wait": pytest.approx((EXACT + STRIDE + 1) / 1e3)}
    capturing = True
    with times.measured():
        for _ in range(EXACT + STRIDE):
            with timed("collective_wait", gpu, many=True):
                pass
    with timed("collective_wait", gpu):
        pass
    assert stamped == [-1, 1] * EXACT + [-STRIDE, STRIDE], "nothing where nobody measures"
