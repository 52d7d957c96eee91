"""The simulated cluster says what a real one says, and behaves as one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import Qwen3MoeConfig

from moetrain import facts
from moetrain.config import MetricsConfig
from moetrain.metrics import LayerLoads, Memory, Metrics, StepRecord
from moetrain.metrics.discovery import Target, write_targets
from monitoring.demo import server
from monitoring.demo.faults import ALERT_OF, Fault, active, parse_fault, timetable
from monitoring.demo.hardware import NODE_METRICS, dcgm_page, gpu_samples, node_page, read_counters
from monitoring.demo.run import TOKENS, Run, Shape
from tests.cpu.test_metrics import wait_for
from tests.runs import tiny_config

ROOT = Path(__file__).parents[2]
SHAPE = Shape("d", nodes=2, gpus=2, step_seconds=4.0, layers=2, experts=4)


def simulated(*faults: Fault, shape: Shape = SHAPE, seconds: float = 0.0) -> Run:
    run = Run(shape, faults, epoch=1e9)
    for now in np.arange(0, seconds, 0.5):
        run.advance(float(now))
    return run


def samples(page: bytes) -> dict[str, float]:
    """Values by name and labels."""
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={text}" for key, text in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def families(page: bytes) -> dict[str, tuple[str, set[tuple[str, ...]]]]:
    """Type and names of labels by name."""
    return {
        family.name: (family.type, {tuple(sorted(sample.labels)) for sample in family.samples})
        for family in text_string_to_metric_families(page.decode())
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_exports_what_a_real_one_does(rank: int, tmp_path: Path) -> None:
    real = Metrics(MetricsConfig(expert_matrix=True), tmp_path, rank, total_steps=10)
    infos = facts.infos(tiny_config(tmp_path), Qwen3MoeConfig())
    real.describe({"0": 4, "1": 4}, infos, checkpoint_every=5)
    loads = LayerLoads([1.0, 1.0], [1.0, 1.0], [0, 0], [1.0, 1.0])
    record = StepRecord(1, 2.0, 1.0, 1e-5, 10, 10.0, 1.0, 5, layers=loads, memory=Memory(1, 2, 3, 4))
    real.step(StepRecord(**(vars(record) | {"expert_tokens_LE": np.ones((2, 4))})))
    ours, theirs = families(simulated(seconds=30).page(rank)), families(real.series.page())
    real.close()
    assert ours == theirs
    assert len([name for name in ours if name.endswith("_info") or ours[name][0] == "info"]) == (3 if rank == 0 else 1)


def test_discovery_has_the_labels_of_real_ranks(tmp_path: Path) -> None:
    write_targets(tmp_path / "real.json", "d", [Target(0, "n", "127.0.0.1", 1, "http")])
    (real,) = json.loads((tmp_path / "real.json").read_text())
    ours = server.rank_targets(simulated(), 1)
    assert len(ours) == 4
    assert ours[0].keys() == real.keys()
    assert ours[0]["labels"].keys() - {"__metrics_path__"} == real["labels"].keys()


def test_gpus_export_what_the_counters_file_asks_for() -> None:
    run = simulated(Fault("xid"), seconds=20)
    found = families(dcgm_page(run, "d-02", 20.0))
    wanted = {counter.name: counter.kind for counter in read_counters() if counter.kind != "label"}
    assert {name: kind for name, (kind, _) in found.items()} == {
        name.removesuffix("_TOTAL") if name not in found else name: kind for name, kind in wanted.items()
    }
    assert gpu_samples(run, 0, 20.0).keys() == wanted.keys()
    assert {counter.name for counter in read_counters() if counter.kind == "label"} <= set(
        next(iter(found["DCGM_FI_DEV_GPU_TEMP"][1]))
    )
    # A code has no series before its first error.
    assert "DCGM_EXP_XID_ERRORS_TOTAL{" not in dcgm_page(run, "d-01", 20.0).decode()
    assert set(samples(node_page(run, "d-01", 20.0))) >= {
        "node_load1",
        "node_infiniband_state_id{device=mlx5_1,port=1}",
    }
    assert len(families(node_page(run, "d-01", 20.0))) == len(NODE_METRICS)


def test_the_phases_add_up_to_the_time_that_passed() -> None:
    run = simulated(shape=Shape("d", 1, 2, 1.0, 2, 4), seconds=400)
    page = samples(run.page(1))
    spent = {key.partition("phase=")[2][:-1]: v for key, v in page.items() if "phase_seconds_total" in key}
    assert sum(spent.values()) == pytest.approx(400, abs=15)  # what is going on is not told yet
    assert all(
        spent[name] > 0 for name in ("forward_backward", "optimizer", "collective_wait", "evaluate", "checkpoint")
    )
    steps = page["moetrain_step_duration_seconds_count"]
    assert page["moetrain_step"] == steps and page["moetrain_tokens_total"] == steps * TOKENS
    in_steps = ("forward_backward", "optimizer", "collective_wait", "data_wait")
    total = page["moetrain_step_duration_seconds_sum"]
    assert sum(spent[name] for name in in_steps) == pytest.approx(0.98 * total, rel=1e-3)
    first = samples(run.page(0))
    assert first["moetrain_checkpoint_saves_total"] == steps // 60
    assert first["moetrain_last_checkpoint_timestamp_seconds"] > 1e9
    assert first["moetrain_loss"] < 2.4 < samples(simulated(seconds=30).page(0))["moetrain_loss"]
    matrix = [value for key, value in first.items() if "expert_tokens_total" in key]
    assert sum(matrix) == pytest.approx(steps * 2 * TOKENS * 2 * 8, rel=1e-3)


def sent_bytes(run: Run) -> float:
    key = "node_infiniband_port_data_transmitted_bytes_total{device=mlx5_0,port=1}"
    return samples(node_page(run, "d-01", 0.0))[key]


def own_seconds(run: Run) -> list[float]:
    key = "moetrain_phase_seconds_total{phase=forward_backward}"
    return [samples(run.page(rank))[key] for rank in range(run.shape.ranks)]


def test_a_straggler_is_slow_by_itself_and_all_wait_for_it() -> None:
    run = simulated(Fault("straggler"), seconds=120)
    own = own_seconds(run)
    others = [seconds for rank, seconds in enumerate(own) if rank != run.victim]
    assert own[run.victim] == pytest.approx(1.3 * np.mean(others), rel=0.02)
    healthy = samples(simulated(seconds=120).page(0))["moetrain_step"]
    assert samples(run.page(0))["moetrain_step"] < 0.9 * healthy


def test_gpus_that_wait_for_another_work_less() -> None:
    key = "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"
    run, healthy = simulated(Fault("straggler"), seconds=122), simulated(seconds=122)
    active = [gpu_samples(run, rank, 0.0)[key] for rank in range(run.shape.ranks)]
    before = [gpu_samples(healthy, rank, 0.0)[key] for rank in range(run.shape.ranks)]
    assert all((now > was) == (rank == run.victim) for rank, (now, was) in enumerate(zip(active, before, strict=True)))
    assert active[0] < 0.9 * before[0]


@pytest.mark.parametrize("fault", ["stall", "rank-down", "node-loss", "crash"])
def test_nothing_moves_while_a_rank_is_missing(fault: str) -> None:
    run = simulated(Fault(fault, 60, 100), seconds=70)
    step, sent = samples(run.page(0))["moetrain_step"], sent_bytes(run)
    run.advance(99.0)
    assert samples(run.page(0))["moetrain_step"] == step and sent_bytes(run) == sent > 0
    down = [rank for rank in range(4) if not run.answers(rank, 90)]
    assert down == {"stall": [], "rank-down": [3], "node-loss": [2, 3], "crash": [0, 1, 2, 3]}[fault]
    for now in range(100, 130):
        run.advance(float(now))
    assert samples(run.page(0))["moetrain_step"] > step
    assert all(run.answers(rank, 101) for rank in range(4))


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (3, 5), (16, 8)])
def test_a_fault_hits_a_rank_of_any_cluster(nodes: int, gpus: int) -> None:
    run = simulated(Fault("straggler"), Fault("memory"), shape=Shape("d", nodes, gpus, 4.0, 2, 4), seconds=60)
    full = [samples(run.page(rank))["moetrain_gpu_memory_bytes{kind=peak}"] for rank in range(run.shape.ranks)]
    assert [rank for rank, peak in enumerate(full) if peak == max(full)] == [run.victim]
    assert run.shape.node(run.victim) in run.shape.node_names


def test_a_restart_begins_new_counters_at_the_last_checkpoint() -> None:
    shape = Shape("d", 1, 2, 1.0, 2, 4)
    before = samples(simulated(shape=shape, seconds=140).page(0))
    run = simulated(Fault("restart-loop", 140, 145), shape=shape, seconds=142)
    after = samples(run.page(0))
    assert after["moetrain_restarts"] == 1 and after["moetrain_tokens_total"] == 0
    assert after["moetrain_step"] == before["moetrain_last_checkpoint_step"] == 60
    assert after["moetrain_phase{phase=setup}"] == 1
    assert after["moetrain_productive_seconds_total"] == pytest.approx(
        before["moetrain_productive_seconds_total"], abs=3
    )


@pytest.mark.parametrize(
    ("fault", "series", "expected"),
    [
        ("nan", "moetrain_loss", math.nan),
        ("dead-expert", "moetrain_idle_experts{layer=1}", 1),
        ("overflow", "moetrain_overflow_redos_total", 6),
        ("memory", "moetrain_gpu_memory_bytes{kind=peak}", 0.97 * 141e9),
        ("slow-save", "moetrain_phase{phase=checkpoint}", 1),
    ],
)
def test_a_fault_shows(fault: str, series: str, expected: float) -> None:
    shape = Shape("d", 2, 2, step_seconds=4.0, layers=2, experts=4)
    rank = 3 if fault == "memory" else 0
    found = samples(simulated(Fault(fault), shape=shape, seconds=124).page(rank))[series]
    assert found == pytest.approx(expected, nan_ok=True)
    assert samples(simulated(shape=shape, seconds=124).page(rank))[series] != found


def test_faults_are_read() -> None:
    assert parse_fault("nan@60-300") == Fault("nan", 60, 300)
    assert parse_fault("nan@60") == Fault("nan", 60)
    assert active([parse_fault("nan"), parse_fault("stall@5-6")], 5.5) == {"nan", "stall"}
    assert active([parse_fault("stall@5-6")], 6.0) == frozenset()
    with pytest.raises(ValueError, match=r"there is no fault 'nann'; there are stall, .*straggler"):
        parse_fault("nann")
    with pytest.raises(ValueError, match="'a-b' is not BEGIN or BEGIN-END"):
        parse_fault("nan@a-b")
    with pytest.raises(ValueError, match="ends before it begins"):
        parse_fault("nan@9-3")


def test_the_timetable_has_each_fault_once_and_one_at_a_time() -> None:
    faults = timetable(ALERT_OF, 10, 5, 2)
    assert [fault.name for fault in faults] == list(ALERT_OF)
    assert faults[0].begin == 10 and all(a.end + 2 == b.begin for a, b in pairwise(faults))


def test_pages_and_discovery_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(server.Demo, "seconds", property(lambda _: now[-1]))
    run = Run(SHAPE, [Fault("rank-down"), Fault("vanish", 30, 80)], epoch=1e9)
    demo = server.Demo([run], tmp_path)

    def get(path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{demo.port}{path}", timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    try:
        listed = [
            group["labels"]["__metrics_path__"]
            for path in tmp_path.glob("*.json")
            for group in json.loads(path.read_text())
        ]
        assert len(listed) == 4 + 2 + 2
        assert {path: get(path) for path in listed} == {path: 503 if path == "/rank/d/3" else 200 for path in listed}
        assert get("/rank/d/9") == get("/rank/other/0") == get("/dcgm/d/other") == get("/") == 503
        discovery = tmp_path / "moetrain-d.json"
        assert discovery.exists()
        now.append(31.0)
        wait_for(lambda: not discovery.exists())
        now.append(81.0)
        wait_for(discovery.exists)
    finally:
        demo.close()
    assert not list(tmp_path.iterdir())


def test_the_demo_from_a_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "monitoring.demo", "--discovery", str(tmp_path), "--nodes", "1"]
    result = subprocess.run([*command, "--fault", "nix"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and "error: there is no fault 'nix'" in result.stderr
    started = subprocess.Popen([*command, "--fault", "nan"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert "8 ranks on 1 nodes" in started.stdout.readline()
    assert "nan begins, NonFiniteLoss is to fire" in started.stdout.readline()
    started.terminate()
    assert started.wait(60) == 0 and not list(tmp_path.iterdir())
