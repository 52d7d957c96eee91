"""What recording costs a training step: `python -m moetrain.bench.metrics`.

Everything that a step does for its record alone is timed, on rank 0, which does most: unpacking what came from the
device, phases, memory, the record and its hand-over. Between two steps the thread computes without Python's lock, as it
would wait for a GPU; the console, the file and the scrapes have that time. On a GPU the times of its exchanges are
measured too. Times are those of the clock and, to tell the load of the machine apart, of the thread itself.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console

from moetrain.config import MetricsConfig
from moetrain.facts import read_memory
from moetrain.metrics import Metrics, StepRecord
from moetrain.metrics.device import DeviceTimes, timed
from moetrain.readback import layer_loads

LAYERS, EXPERTS = 48, 128
SECTIONS = 5 * LAYERS
"""Exchanges of an eager step by all-to-all: counts, rows, their sums, and two gradients of each layer."""
WORK = bytes(4 << 20)
"""A few milliseconds of hashing."""


class Cost(NamedTuple):
    """Seconds of one step."""

    clock: float
    thread: float


def measure_step(steps: int, expert_matrix: bool = False, scrapes_per_second: float = 0.0) -> list[Cost]:
    """What each of `steps` steps spends on its record, of a model like Qwen3-30B-A3B on 128 ranks."""
    generator = np.random.default_rng(0)
    columns_L4, counts_LE = generator.random((LAYERS, 4)), generator.random((LAYERS, EXPERTS))
    config = MetricsConfig(prometheus_port=0, expert_matrix=expert_matrix)
    console, costs = Console(file=io.StringIO()), []
    with tempfile.TemporaryDirectory() as folder:
        metrics = Metrics(config, folder, 0, steps, console=console)
        metrics.describe({str(layer): EXPERTS for layer in range(LAYERS)}, {})
        done = threading.Event()
        scraper = threading.Thread(target=_scrape, args=(metrics, scrapes_per_second, done))
        scraper.start()
        for step in range(1, steps + 1):
            hashlib.sha256(WORK)
            costs.append(_cost_of(_record, metrics, step, columns_L4, counts_LE if expert_matrix else None))
        done.set()
        scraper.join()
        metrics.close()
    return costs


def measure_sections(steps: int, device: torch.device) -> list[Cost]:
    """What each of `steps` steps spends on measuring its exchanges, which do nothing here."""
    times = DeviceTimes(device)

    def sections() -> None:
        with times.measured():
            for _ in range(SECTIONS):
                with timed("collective_wait", device, many=True):
                    pass
        times.take()

    return [_cost_of(sections) for _ in range(steps)]


def measure_memory(steps: int) -> list[Cost]:
    """What each of `steps` steps spends on asking for its memory."""
    return [_cost_of(read_memory, True) for _ in range(steps)]


def _cost_of(work: Callable[..., object], *arguments: object) -> Cost:
    begin, own = time.perf_counter(), time.thread_time()
    work(*arguments)
    return Cost(time.perf_counter() - begin, time.thread_time() - own)


def _record(metrics: Metrics, step: int, columns_L4: np.ndarray, counts_LE: np.ndarray | None) -> None:
    """As `trainer.Run.step` does it."""
    for name in ("data_wait", "forward_backward", "optimizer"):
        with metrics.phase(name):
            pass
    metrics.move(1e-3, "forward_backward", "collective_wait")
    layers, memory = layer_loads(columns_L4), read_memory(anew=True)
    metrics.step(
        StepRecord(
            step=step,
            loss=1.0,
            grad_norm=1.0,
            lr=1e-4,
            tokens=524_288,
            tokens_per_second=1e6,
            step_seconds=0.5,
            memory_bytes=memory.peak,
            expert_load_max_over_mean=max(layers.max_over_mean),
            idle_experts=sum(layers.idle_experts),
            load_entropy=min(layers.entropy),
            seen_tokens=524_288,
            layers=layers,
            rank_tokens=4096,
            rank_label_tokens=4095,
            memory=memory,
            rank_seconds=[0.4] * 128,
            expert_tokens_LE=counts_LE,
        )
    )


def _scrape(metrics: Metrics, per_second: float, done: threading.Event) -> None:
    assert metrics.endpoint is not None
    url = f"http://127.0.0.1:{metrics.endpoint.port}/metrics"
    while per_second and not done.wait(1 / per_second):
        urllib.request.urlopen(url).read()


def _row(name: str, costs: Sequence[Cost]) -> str:
    clock, thread = (sorted(1e6 * cost[column] for cost in costs) for column in (0, 1))
    late = clock[int(0.99 * len(clock))]
    own = statistics.median(thread)
    return f"{name:<46}{own:>8.0f}{statistics.median(clock):>8.0f}{statistics.fmean(clock):>8.0f}{late:>8.0f}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time what recording costs a training step.")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="steps of each case (default: 1000)")
    args = parser.parse_args(words)
    print(f"{LAYERS} layers of {EXPERTS} experts, rank 0. Microseconds a step:")
    print(f"{'':<46}{'thread':>8}{'median':>8}{'mean':>8}{'99 %':>8}")
    cases = {"nobody scrapes": (False, 0.0), "a scrape a second": (False, 1.0), "the same, expert matrix": (True, 1.0)}
    for name, (matrix, scrapes) in cases.items():
        print(_row(name, measure_step(args.steps, matrix, scrapes)))
    print(_row("of which memory", measure_memory(args.steps)))
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        costs = measure_sections(args.steps, device)
        print(_row(f"{SECTIONS} exchanges outside a CUDA graph, besides", costs))


if __name__ == "__main__":
    main()
