"""What recording costs a training step: `python -m moetrain.bench.metrics`.

Everything that a step does for its record alone is timed, on rank 0, which does most: unpacking what came from the
device, phases, memory, the record and its hand-over. Between two steps the thread sleeps, as it waits for a GPU; the
console, the file and the scrapes have that time.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from moetrain.config import MetricsConfig
from moetrain.facts import read_memory
from moetrain.metrics import Metrics, StepRecord
from moetrain.readback import layer_loads

LAYERS, EXPERTS = 48, 128
WAIT_SECONDS = 0.005


def measure_step(steps: int, expert_matrix: bool = False, scrapes_per_second: float = 0.0) -> list[float]:
    """Seconds that each of `steps` steps spends on its record, of a model like Qwen3-30B-A3B on 128 ranks."""
    generator = np.random.default_rng(0)
    columns_L4, counts_LE = generator.random((LAYERS, 4)), generator.random((LAYERS, EXPERTS))
    config = MetricsConfig(prometheus_port=0, expert_matrix=expert_matrix)
    console, seconds = Console(file=io.StringIO()), []
    with tempfile.TemporaryDirectory() as folder:
        metrics = Metrics(config, folder, 0, steps, console=console)
        metrics.describe({str(layer): EXPERTS for layer in range(LAYERS)}, {})
        done = threading.Event()
        scraper = threading.Thread(target=_scrape, args=(metrics, scrapes_per_second, done))
        scraper.start()
        for step in range(1, steps + 1):
            time.sleep(WAIT_SECONDS)
            begin = time.perf_counter()
            _record(metrics, step, columns_L4, counts_LE if expert_matrix else None)
            seconds.append(time.perf_counter() - begin)
        done.set()
        scraper.join()
        metrics.close()
    return seconds


def _record(metrics: Metrics, step: int, columns_L4: np.ndarray, counts_LE: np.ndarray | None) -> None:
    """As `trainer.Run.step` does it."""
    for name in ("data_wait", "forward_backward", "optimizer"):
        with metrics.phase(name):
            pass
    metrics.move(1e-3, "forward_backward", "collective_wait")
    layers, memory = layer_loads(columns_L4), read_memory()
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


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time what recording costs a training step.")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="steps of each case (default: 1000)")
    args = parser.parse_args(words)
    print(f"{LAYERS} layers of {EXPERTS} experts, rank 0, microseconds a step:  median   mean    99 %")
    cases = {"nobody scrapes": (False, 0.0), "a scrape a second": (False, 1.0), "the same, expert matrix": (True, 1.0)}
    for name, (matrix, scrapes) in cases.items():
        micros = sorted(1e6 * value for value in measure_step(args.steps, matrix, scrapes))
        middle, mean, late = statistics.median(micros), statistics.fmean(micros), micros[int(0.99 * len(micros))]
        print(f"{name:<58}{middle:>8.0f}{mean:>7.0f}{late:>8.0f}")


if __name__ == "__main__":
    main()
