"""The third place that a record goes to: Prometheus. Its names, its values, and where it finds the ranks."""

from __future__ import annotations

import io
import json
import math
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from moetrain.bench.metrics import measure_step
from moetrain.config import MetricsConfig, parse_config
from moetrain.metrics import EvalRecord, Expectation, LayerLoads, Memory, Metrics, StepRecord
from moetrain.metrics import endpoint as endpoint_module
from moetrain.metrics.discovery import Target, discovery_file, reachable_host, write_targets
from moetrain.metrics.endpoint import exposure
from tests.cpu.test_metrics import step_record

Sample = tuple[str, frozenset[tuple[str, str]]]
PER_RANK = {
    "tokens_total", "label_tokens_total", "model_flops_total", "phase_seconds_total", "step_duration_seconds_bucket",
    "step_duration_seconds_sum", "step_duration_seconds_count", "last_step_seconds", "last_step_timestamp_seconds",
    "step", "steps_planned", "gpu_memory_bytes", "gpu_memory_total_bytes", "gpu_peak_flops", "phase",
    "nonfinite_steps_total", "overflow_redos_total", "rank_info",
}  # fmt: skip
WHOLE_RUN = {
    "loss", "validation_loss", "gradient_norm", "learning_rate", "expected_tokens_per_second_per_gpu", "restarts",
    "start_timestamp_seconds", "resumed_step", "checkpoint_saves_total", "checkpoint_failures_total",
    "checkpoint_seconds_total", "last_checkpoint_timestamp_seconds", "last_checkpoint_step",
    "checkpoint_interval_seconds", "expert_load_max_over_mean", "expert_load_min_over_mean", "idle_experts",
    "expert_load_entropy_ratio", "productive_seconds_total", "run_info", "version_info",
}  # fmt: skip
INFOS = {"rank": {"ep": 1}, "run": {"model": "m", "git": 'a"b\\c\n'}, "version": {"torch": "2"}}


@pytest.fixture(autouse=True)
def fresh_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "PAGE_SECONDS", 0.0)
    monkeypatch.setattr(endpoint_module, "CONNECTIONS_PER_SECOND", 1000.0)


def metrics(folder: Path, rank: int = 0, **config: Any) -> Metrics:
    config = {"prometheus_port": 0} | config
    out = Metrics(MetricsConfig(**config), folder, rank, 10, console=Console(file=io.StringIO()))
    out.describe({"0": 4, "7": 2}, INFOS, checkpoint_every=50)
    return out


def scrape(out: Metrics) -> dict[Sample, float]:
    """Sample and labels to value."""
    assert out.endpoint is not None
    with urllib.request.urlopen(f"http://127.0.0.1:{out.endpoint.port}/metrics", timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return {
        (sample.name.removeprefix("moetrain_"), frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: dict[Sample, float], name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def full_record(step: int, **changes: Any) -> StepRecord:
    loads = LayerLoads([2.0, 1.5], [0.0, 0.25], [1, 0], [0.75, 0.9])
    memory = Memory(allocated=10, reserved=20, peak=30, total=40)
    values = {"layers": loads, "memory": memory, "rank_tokens": 4096, "rank_label_tokens": 4000, "step_seconds": 0.5}
    return step_record(step, **(values | changes))


@pytest.mark.parametrize("rank", [0, 3])
def test_every_series_is_there_from_the_start(tmp_path: Path, rank: int) -> None:
    out = metrics(tmp_path, rank)
    samples = scrape(out)
    assert {name for name, _ in samples} == PER_RANK | (WHOLE_RUN if rank == 0 else set())
    names = {label for _, labels in samples for label, _ in labels}
    assert not names & {"run", "job", "node", "instance"}, "service discovery sets these"
    assert not [name for name, _ in samples if name.endswith("_created")]
    for (name, labels), number in samples.items():
        if name.endswith("_total") and ("phase", "other") not in labels:
            assert number == 0, name
    phases = {dict(labels)["phase"] for name, labels in samples if name == "phase_seconds_total"}
    expected = {"data_wait", "forward_backward", "collective_wait", "optimizer", "evaluate", "checkpoint", "other"}
    assert phases == expected
    assert value(samples, "phase", phase="setup") == 1 and value(samples, "phase", phase="train") == 0
    if rank == 0:
        assert math.isnan(value(samples, "loss")) and math.isnan(value(samples, "idle_experts", layer="7"))
        assert value(samples, "run_info", model="m", git='a"b\\c\n') == 1
    out.close()


def test_counters_add_up_and_gauges_follow(tmp_path: Path) -> None:
    out = metrics(tmp_path)
    out.expect(Expectation(tokens_per_second_per_gpu=9000.0, flops_per_token=2e9, peak_flops=989e12))
    for step, seconds in ((1, 0.05), (2, 0.2), (3, 0.25), (4, 400.0)):
        out.step(full_record(step, step_seconds=seconds, redos=step % 2))
    out.eval(EvalRecord(step=3, loss=1.75, tokens=64))
    samples = scrape(out)
    assert value(samples, "tokens_total") == 4 * 4096 and value(samples, "label_tokens_total") == 4 * 4000
    assert value(samples, "model_flops_total") == 4 * 4096 * 2e9
    assert value(samples, "overflow_redos_total") == 2
    assert value(samples, "step") == 4 and value(samples, "steps_planned") == 10
    assert value(samples, "loss") == pytest.approx(8.3 / 4) and value(samples, "validation_loss") == 1.75
    assert value(samples, "productive_seconds_total") == 400.5
    assert value(samples, "step_duration_seconds_sum") == 400.5 and value(samples, "step_duration_seconds_count") == 4
    buckets = {dict(labels)["le"]: n for (name, labels), n in samples.items() if name == "step_duration_seconds_bucket"}
    assert [buckets[bound] for bound in ("0.05", "0.1", "0.2", "0.3", "300.0", "+Inf")] == [1, 1, 2, 3, 3, 4]
    assert value(samples, "last_step_seconds") == 400.0
    assert value(samples, "checkpoint_interval_seconds") == pytest.approx(50 * 400.5 / 4)
    assert value(samples, "gpu_peak_flops") == 989e12
    assert value(samples, "expected_tokens_per_second_per_gpu") == 9000.0
    assert [value(samples, "gpu_memory_bytes", kind=kind) for kind in ("allocated", "reserved", "peak")] == [10, 20, 30]
    assert value(samples, "gpu_memory_total_bytes") == 40
    assert value(samples, "expert_load_max_over_mean", layer="0") == 2.0
    assert value(samples, "expert_load_min_over_mean", layer="7") == 0.25
    assert value(samples, "idle_experts", layer="0") == 1
    assert value(samples, "expert_load_entropy_ratio", layer="7") == 0.9
    assert value(samples, "phase", phase="train") == 1
    assert not [name for name, _ in samples if name == "expert_tokens_total"], "only on request"
    out.close()


def test_other_ranks_tell_their_own_values_only(tmp_path: Path) -> None:
    out = metrics(tmp_path, rank=3)
    out.step(full_record(1))
    with out.checkpoint(1):
        pass
    samples = scrape(out)
    assert value(samples, "tokens_total") == 4096 and value(samples, "gpu_memory_bytes", kind="peak") == 30
    assert value(samples, "phase_seconds_total", phase="checkpoint") > 0
    assert not {name for name, _ in samples} & WHOLE_RUN
    out.close()


def test_the_matrix_of_experts_on_request(tmp_path: Path) -> None:
    out = metrics(tmp_path, expert_matrix=True)
    counts_LE = np.array([[5.0, 0.0, 3.0, 8.0], [7.0, 9.0, 0.0, 0.0]])
    out.step(full_record(1, expert_tokens_LE=counts_LE))
    out.step(full_record(2, expert_tokens_LE=counts_LE))
    samples = scrape(out)
    found = {tuple(sorted(labels)): n for (name, labels), n in samples.items() if name == "expert_tokens_total"}
    assert len(found) == 4 + 2, "a layer of two experts has two series"
    assert value(samples, "expert_tokens_total", layer="0", expert="3") == 16
    assert value(samples, "expert_tokens_total", layer="7", expert="1") == 18
    out.close()


def test_long_phases_show_while_they_last(tmp_path: Path) -> None:
    out = metrics(tmp_path)
    out.step(full_record(1))
    with out.checkpoint(1):
        assert value(scrape(out), "phase", phase="checkpoint") == 1
    samples = scrape(out)
    assert value(samples, "phase", phase="train") == 1 and value(samples, "phase", phase="checkpoint") == 0
    assert value(samples, "checkpoint_saves_total") == 1 and value(samples, "last_checkpoint_step") == 1
    spent = value(samples, "checkpoint_seconds_total")
    assert spent == pytest.approx(value(samples, "phase_seconds_total", phase="checkpoint"), rel=0.1)
    with pytest.raises(OSError, match="full"), out.checkpoint(2):
        raise OSError("full")
    assert value(scrape(out), "checkpoint_failures_total") == 1
    assert value(scrape(out), "last_checkpoint_step") == 1
    out.finish()
    assert value(scrape(out), "phase", phase="done") == 1
    out.close()


def test_a_step_that_is_not_finite_is_counted(tmp_path: Path) -> None:
    out = metrics(tmp_path)
    out.nonfinite(5, math.nan, math.inf, False)
    samples = scrape(out)
    assert value(samples, "nonfinite_steps_total") == 1 and math.isnan(value(samples, "loss"))
    out.close()


def test_it_listens_on_loopback_and_lets_go(tmp_path: Path) -> None:
    out = metrics(tmp_path)
    assert out.endpoint.address == "127.0.0.1"
    port = out.endpoint.port
    scrape(out)
    out.close()
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) != 0


def test_only_metrics_are_served(tmp_path: Path) -> None:
    out = metrics(tmp_path)
    for path in ("/", "/../etc/passwd", "/metrics/x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{out.endpoint.port}{path}", timeout=10)
    out.close()


def test_a_port_that_is_taken_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        out = metrics(tmp_path, rank=10, prometheus_port=taken - 2)
        try:
            assert 0 < out.endpoint.port - taken <= endpoint_module.PORTS_TRIED, "the next one that is free"
            assert out.target() == Target(10, socket.gethostname(), "127.0.0.1", out.endpoint.port, "http")
        finally:
            out.close()


def test_beyond_the_last_port_any_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "5")
    out = metrics(tmp_path, prometheus_port=65535)
    assert 1024 <= out.endpoint.port < 65536
    out.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_here_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str) -> None:
    out = metrics(tmp_path, prometheus_host=host)
    assert out.endpoint is None and out.target() is None
    assert f"cannot serve metrics on {host}" in caplog.text and "metrics.prometheus_host" in caplog.text
    out.step(full_record(1))
    out.close()


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, None),
        ({"prometheus_host": "::1"}, None),
        ({"prometheus_host": "localhost"}, None),
        ({"prometheus_host": "0.0.0.0"}, "lets everyone who reaches this machine read the metrics; set metrics.user"),
        ({"prometheus_host": "::", "tls_certificate": "c", "tls_key": "k"}, "lets everyone"),
        ({"prometheus_host": "10.0.0.1", "username": "u", "password_file": "p"}, "the password crosses the network"),
        (
            {"prometheus_host": "::", "username": "u", "password_file": "p", "tls_certificate": "c", "tls_key": "k"},
            None,
        ),
        ({"prometheus_host": "::", "tls_client_ca": "a", "tls_certificate": "c", "tls_key": "k"}, None),
    ],
)
def test_warning_of_what_others_can_read(sections: dict[str, Any], expected: str | None) -> None:
    warning = exposure(MetricsConfig(**sections))
    assert warning is None if expected is None else expected in warning


def test_rank_0_says_the_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for rank in (0, 1):
        metrics(tmp_path, rank, prometheus_host="0.0.0.0").close()
    assert caplog.text.count("lets everyone who reaches this machine") == 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"username": "u"}, "username needs password_file"),
        ({"password_file": "p"}, "password_file needs username"),
        ({"tls_key": "k"}, "tls_key needs tls_certificate"),
        ({"tls_client_ca": "c"}, "tls_client_ca needs tls_certificate and tls_key"),
        ({"username": "a:b", "password_file": "p"}, "metrics.username: "),
    ],
)
def test_half_of_a_setting_is_an_error(sections: dict[str, Any], message: str) -> None:
    raw = {
        "output_dir": "o",
        "model": {"path": "m"},
        "data": {"train": [{"path": "t"}]},
        "train": {"steps": 1},
        "metrics": sections,
    }
    with pytest.raises(ValueError, match="metrics") as caught:
        parse_config(raw)
    assert message in str(caught.value)


def test_discovery_names_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURMD_NODENAME", "node-3")
    out = metrics(tmp_path / "qwen 3", discovery_dir=str(tmp_path / "targets"))
    out.announce([out.target(), Target(1, "node-4", "::1", 9641, "https"), None])
    (file,) = (tmp_path / "targets").iterdir()
    assert file == discovery_file(tmp_path / "qwen 3", "qwen 3", str(tmp_path / "targets"))
    assert file.suffix == ".json" and file.name.startswith("moetrain-qwen_3-") and file.stat().st_mode & 0o044
    labels = {"run": "qwen 3", "slurm_job_id": "4711"}
    assert json.loads(file.read_text()) == [
        {"targets": [f"127.0.0.1:{out.endpoint.port}"], "labels": labels | {"node": "node-3", "rank": "0"}},
        {"targets": ["[::1]:9641"], "labels": labels | {"node": "node-4", "rank": "1", "__scheme__": "https"}},
    ]
    out.finish()
    out.close()
    assert list((tmp_path / "targets").iterdir()) == []


def test_discovery_stays_after_a_crash_and_is_replaced(tmp_path: Path) -> None:
    crashed = metrics(tmp_path)
    crashed.announce([crashed.target()])
    crashed.close()
    (file,) = (tmp_path / "discovery").iterdir()
    again = metrics(tmp_path)
    again.announce([again.target()])
    assert list((tmp_path / "discovery").iterdir()) == [file]
    assert json.loads(file.read_text())[0]["targets"] == [f"127.0.0.1:{again.endpoint.port}"]
    again.finish()
    again.close()
    assert not file.parent.exists()


def test_runs_of_one_name_do_not_share_a_file(tmp_path: Path) -> None:
    here, there = discovery_file("a/run", "run", str(tmp_path)), discovery_file("b/run", "run", str(tmp_path))
    assert here != there and here == discovery_file(Path("a/run").absolute(), "run", str(tmp_path))


def test_the_address_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node-3")
    assert reachable_host("0.0.0.0") == reachable_host("::") == "node-3"
    assert reachable_host("10.1.2.3") == "10.1.2.3"


def test_discovery_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert not write_targets(tmp_path / "file" / "x.json", "run", [Target(0, "n", "h", 1, "http")])
    assert "Prometheus does not find this run" in caplog.text


def test_what_a_step_pays_for_its_record() -> None:
    # of the thread's own time, which other processes change for a while, by the caches; 40 microseconds were measured
    assert any(sorted(cost.thread for cost in measure_step(90))[45] < 1e-4 for _ in range(20))


def test_the_peak_of_memory_is_that_of_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape a minute sees an evaluation's peak, and no peak stays."""
    out = metrics(tmp_path)
    now, seen = 1e9, []
    monkeypatch.setattr(time, "time", lambda: now)
    for step, peak in enumerate([30, 35, 30, 30, 30, 30, 30, 31], start=1):
        out.step(full_record(step, memory=Memory(10, 20, peak, 40)))
        seen.append(value(scrape(out), "gpu_memory_bytes", kind="peak"))
        now += 25 if step < 7 else 500
    assert seen == [30, 35, 35, 35, 35, 35, 30, 31]
    out.close()
