"""Metrics on GPUs: one sync a step, times by events and inside CUDA graphs, and what they cost."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from moetrain import trainer
from moetrain.bench.metrics import measure_memory, measure_sections, measure_step
from moetrain.facts import read_memory
from moetrain.kernels.clock import stamp
from moetrain.metrics import read_records
from moetrain.metrics.device import CAPTURED, EAGER, DeviceTimes, timed
from tests.gpu.graph_cases import SIZES
from tests.gpu.metrics_cases import SLEEP_CYCLES as CYCLES
from tests.gpu.metrics_cases import slept_seconds
from tests.runs import MODEL, tiny_config, write_text

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("left_as_found"),
]
STEPS = 8


@pytest.fixture(scope="module")
def nap() -> float:
    """Seconds that CYCLES take."""
    return slept_seconds()


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_events_tell_the_time_of_a_section(gpu: torch.device, nap: float) -> None:
    times = DeviceTimes(gpu)
    with times.measured():
        for _ in range(3):
            with timed("collective_wait", gpu):
                torch.cuda._sleep(CYCLES)
            torch.cuda._sleep(CYCLES)
    torch.cuda.synchronize()
    assert times.take() == {"collective_wait": pytest.approx(3 * nap, rel=0.1)}


def test_what_the_host_runs_ahead_of_is_told_later(gpu: torch.device, nap: float) -> None:
    times = DeviceTimes(gpu)
    torch.cuda._sleep(10 * CYCLES)
    with times.behind("optimizer", gpu):
        torch.cuda._sleep(CYCLES)
    assert times.take() == {}, "the device is not there yet, and nobody has waited for it"
    torch.cuda.synchronize()
    assert times.take() == {"optimizer": pytest.approx(nap, rel=0.1)}


def test_a_sample_of_events_stands_for_all(gpu: torch.device, nap: float) -> None:
    times, sections, found = DeviceTimes(gpu), 10 * EAGER, []
    for _ in range(11):
        with times.measured():
            for _ in range(sections):
                with timed("collective_wait", gpu, many=True):
                    torch.cuda._sleep(CYCLES // 4)
        measured = len(times._spans)
        torch.cuda.synchronize()
        found.append(times.take()["collective_wait"])
    assert measured <= EAGER + 1
    assert found[0] == pytest.approx(sections * nap / 4, rel=0.1), "each of them, as nobody knows yet how many come"
    assert statistics.fmean(found[1:]) == pytest.approx(sections * nap / 4, rel=0.1)


def test_a_graph_counts_with_each_replay(gpu: torch.device, nap: float) -> None:
    """A capture of as many sections as the step before had, of which every second is measured."""
    times, graph, sections = DeviceTimes(gpu), torch.cuda.CUDAGraph(), 2 * CAPTURED
    with times.measured():
        for _ in range(sections):
            with timed("collective_wait", gpu, many=True):
                pass
    times.take()
    with times.measured(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(sections):
            with timed("collective_wait", gpu, many=True):
                torch.cuda._sleep(CYCLES // 4)
            torch.cuda._sleep(CYCLES // 4)
    assert int(times.counter) == 0, "a capture computes nothing"
    torch.cuda.synchronize()
    times.take()
    for _ in range(3):
        graph.replay()
    times.tell(int(times.counter))
    assert times.take()["collective_wait"] == pytest.approx(3 * sections * nap / 4, rel=0.1)


def test_what_measuring_inside_a_graph_costs(gpu: torch.device) -> None:
    """The stamps of a step of 240 exchanges, in a row: under 100 microseconds."""
    counter, graph = torch.zeros(1, dtype=torch.int64, device=gpu), torch.cuda.CUDAGraph()
    stamp(counter, 0)
    torch.cuda.synchronize()
    number = 2 * (CAPTURED + 2)
    with torch.cuda.graph(graph):
        for place in range(number):
            stamp(counter, 1 if place % 2 else -1)
    graph.replay()
    seconds = []
    for _ in range(50):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    print(f"{number} stamps in a graph: {1e6 * statistics.median(seconds):.0f} us")
    assert statistics.median(seconds) < 100e-6


def test_what_a_record_costs(gpu: torch.device) -> None:
    """On rank 0 of a model with 48 layers of 128 experts: under 100 microseconds of the host, memory included."""
    costs = {
        "record": measure_step(200),
        "of which memory": measure_memory(200),
        "events of 240 eager exchanges": measure_sections(200, gpu),
    }
    median = {name: statistics.median(cost.clock for cost in found) for name, found in costs.items()}
    print({name: f"{1e6 * seconds:.0f} us" for name, seconds in median.items()})
    assert median["record"] < 100e-6
    assert median["events of 240 eager exchanges"] < 250e-6


def test_the_peak_begins_anew(gpu: torch.device) -> None:
    read_memory(anew=True)
    before = read_memory(anew=True)
    large = torch.empty(64 << 20, dtype=torch.uint8, device=gpu)
    del large
    assert read_memory(anew=True).peak - before.peak == pytest.approx(64 << 20, rel=0.01)
    after = read_memory()
    assert after.peak == after.allocated == before.allocated
    assert after.total == torch.cuda.get_device_properties(gpu).total_memory


def test_a_step_waits_for_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that trains: eager steps, the capture and captured ones. The wait is the readback's."""
    step, waits = trainer.Run.step, []

    def watched(run: trainer.Run, number: int) -> bool:
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            stop = step(run, number)
            torch.cuda.set_sync_debug_mode("default")
        found = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
        waits.append([f"{Path(warning.filename).name}:{warning.lineno}" for warning in found])
        return stop

    monkeypatch.setattr(trainer.Run, "step", watched)
    write_text(tmp_path)
    create = {"vocab_size": 512, "config": MODEL | {name: SIZES[name] for name in SIZES if name != "vocab_size"}}
    config = tiny_config(
        tmp_path,
        model={"dtype": "bfloat16", "create": create},
        data={"seq_len": 128},
        train={"steps": STEPS, "grad_accum": 2, "cuda_graph": "on", "compile": "off"},
        checkpoint={"export": False},
    )
    trainer.train(config)
    captured = waits[-3:]
    assert all(len(found) == 1 and found[0].startswith("readback.py:") for found in captured), waits
    steps = [r for r in read_records(tmp_path / "out" / "metrics.jsonl") if r["kind"] == "step"]
    assert len(steps) == STEPS
    for record in steps[2:]:
        assert 0 < record["phase_seconds"]["optimizer"] < record["step_seconds"]
        assert 0 < record["memory_bytes"] < record["memory_total_bytes"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that reach each other")
def test_a_late_rank_shows_inside_a_graph() -> None:
    """Ranks that are on time wait for the late one in each layer; it waits for nobody."""
    ranks = min(torch.cuda.device_count(), 8)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    result = subprocess.run(
        [*command, "-m", "tests.gpu.metrics_cases"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    late = 0.0
    for rank, (seconds, status, slept) in enumerate(json.loads(line.removeprefix("RESULT "))):
        assert status.startswith("captured")
        late = 3 * slept
        if rank == 1:
            assert seconds < 0.3 * late
        else:
            assert seconds == pytest.approx(late, rel=0.3)
