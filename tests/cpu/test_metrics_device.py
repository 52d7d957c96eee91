"""Times of the device's work: which sections are measured, what they count for, and the counter inside CUDA graphs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from moetrain.kernels.clock import stamp
from moetrain.metrics.device import CAPTURED, EAGER, DeviceTimes, timed
from moetrain.moe.balance import LoadStats
from moetrain.readback import Readback

CPU = torch.device("cpu")
WEIGHT = 13
"""Of a section of many."""


class Passes:
    """None of which overflows."""

    def needed(self) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize("weight", [1, WEIGHT])
def test_a_counter_grows_by_what_a_section_takes(weight: int) -> None:
    counter, outside = torch.zeros(1, dtype=torch.int64), 0.0
    begin = time.perf_counter()
    for _ in range(3):
        stamp(counter, -weight)
        time.sleep(0.01)
        stamp(counter, weight)
        left = time.perf_counter()
        time.sleep(0.02)
        outside += time.perf_counter() - left
    assert 0.03 <= counter.item() / weight / 1e9 <= time.perf_counter() - begin - outside


@pytest.mark.parametrize("clock", [2**62, 2**63 - 5, 2**61 + 12345])
def test_a_weight_may_wrap_around(clock: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks since 1970 times a weight are too large for int64; their difference is not."""
    counter = torch.full((1,), 77, dtype=torch.int64)
    for now, weight in ((clock, -WEIGHT), (clock + 1000, WEIGHT)):
        monkeypatch.setattr(time, "perf_counter_ns", lambda now=now: now)
        stamp(counter, weight)
    assert counter.item() == 77 + WEIGHT * 1000


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


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the stream captures now: its last element."""
    states = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: states[-1])
    return states


def gpu_times(sections: int) -> DeviceTimes:
    """Of a GPU whose last step had so many sections alike, each of which was measured."""
    times = DeviceTimes(CPU)
    times.counter = Counter()  # type: ignore[assignment]
    assert [times.weight() for _ in range(sections)] == [1] * sections
    times.take()
    return times


class Counter:
    """Of a GPU."""

    is_cuda = True


@pytest.mark.parametrize("sections", [1, 2, 5])
def test_few_sections_are_all_measured(sections: int, capturing: list[bool]) -> None:
    times = gpu_times(sections)
    for _ in range(3):
        assert [times.weight() for _ in range(sections)] == [1] * sections
        times.take()


@pytest.mark.parametrize("kinds", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("capture", [False, True])
def test_every_kind_of_exchange_gets_its_turn(kinds: int, capture: bool, capturing: list[bool]) -> None:
    """Layers whose exchanges take 1, 2, 3, ... seconds: their sum over 48 layers is found within an eighth, by a graph
    in one step and by a few events in a hundred."""
    sections = [1 + number % kinds for number in range(48 * kinds)]
    times = gpu_times(len(sections))
    capturing.append(capture)
    found, measured = [], []
    for _ in range(1 if capture else 100):
        weights = [times.weight() for _ in sections]
        times.take()
        found.append(sum(weight * seconds for weight, seconds in zip(weights, sections, strict=True)))
        measured.append(sum(weight > 0 for weight in weights))
    assert sum(found) / len(found) == pytest.approx(sum(sections), rel=0.125)
    assert max(measured) <= (CAPTURED if capture else EAGER) + 2


def test_events_of_a_step_are_few_and_spread(capturing: list[bool]) -> None:
    times = gpu_times(240)
    for _ in range(20):
        places = [place for place in range(240) if times.weight()]
        times.take()
        assert len(places) in (EAGER - 1, EAGER, EAGER + 1, EAGER + 2)
        assert max(places) - min(places) > 240 / EAGER / 2


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


def test_a_gpu_measures_a_sample(monkeypatch: pytest.MonkeyPatch, capturing: list[bool]) -> None:
    """Outside a graph by events, inside by the counter, each with the weight of what it stands for."""
    stamped: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("moetrain.metrics.device._stamp", lambda _, weight: stamped.append(weight))
    sections, gpu = 10 * EAGER, torch.device("cuda", 0)
    times = gpu_times(sections)
    with times.measured():
        for _ in range(sections):
            with timed("collective_wait", gpu, many=True):
                pass
        measured = Event.recorded // 2
        with timed("collective_wait", gpu):
            pass
    assert measured in (EAGER, EAGER + 1) and stamped == []
    assert times.take() == {"collective_wait": pytest.approx((10 * measured + 1) / 1e3)}
    capturing.append(True)
    with times.measured():
        for _ in range(sections):
            with timed("collective_wait", gpu, many=True):
                pass
    with timed("collective_wait", gpu):
        pass
    assert stamped == [-1, 1] * sections, "more in a graph, and nothing where nobody measures"
