"""The three places a record goes to: console, metrics.jsonl, Prometheus."""

from __future__ import annotations

import io
import json
import math
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from moetrain.config import MetricsConfig
from moetrain.metrics import EvalRecord, Metrics, StepRecord, bytes_text, read_records


def step_record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "loss": 8.3 / step,
        "grad_norm": 1.25,
        "lr": 3e-3,
        "tokens": 1000 + step,
        "tokens_per_second": 12345.6,
        "step_seconds": 0.2,
        "memory_bytes": 812 * 2**20,
        "expert_load_max_over_mean": 1.5,
        "idle_experts": 2,
        "load_entropy": 0.9,
    }
    return StepRecord(**values | changes)


def metrics(folder: Path, rank: int = 0, console: Console | None = None, **config: Any) -> Metrics:
    console = console or Console(file=io.StringIO())
    return Metrics(MetricsConfig(**config), folder, rank, 10, run="r", info={"vocab_size": 64}, console=console)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in lines(folder) if record["kind"] == "step"]


def write_run(folder: Path, steps: range, resume: int | None = None) -> None:
    out = metrics(folder)
    if resume is not None:
        out.resume(resume)
    for step in steps:
        out.step(step_record(step))
        if step % 2 == 0:
            out.eval(EvalRecord(step=step, loss=2.0, tokens=64))
    out.close()


def test_file_holds_the_records(tmp_path: Path) -> None:
    out = metrics(tmp_path)
    out.eval(EvalRecord(step=0, loss=4.25, tokens=128))
    out.step(step_record(1))
    # read before close: each line is flushed as it is written
    run, evaluation, step = lines(tmp_path)
    assert run["kind"] == "run" and run["vocab_size"] == 64 and run["total_steps"] == 10
    assert (evaluation["kind"], evaluation["step"], evaluation["loss"], evaluation["tokens"]) == ("eval", 0, 4.25, 128)
    expected = {"kind": "step", "step": 1, "loss": 8.3, "tokens": 1001, "idle_experts": 2, "load_entropy": 0.9}
    assert expected.items() <= step.items()
    out.close()


def test_values_that_json_lacks_become_null(tmp_path: Path) -> None:
    out = metrics(tmp_path)
    out.step(step_record(1, loss=math.nan, grad_norm=math.inf, expert_load_max_over_mean=None))
    out.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    record = lines(tmp_path)[-1]
    assert record["loss"] is None and record["grad_norm"] is None and record["expert_load_max_over_mean"] is None


def test_only_rank_0_writes(tmp_path: Path) -> None:
    text = io.StringIO()
    out = metrics(tmp_path, rank=1, console=Console(file=text))
    out.step(step_record(1))
    out.eval(EvalRecord(step=1, loss=1.0, tokens=1))
    out.say("hello")
    out.close()
    assert not (tmp_path / "metrics.jsonl").exists()
    assert text.getvalue() == ""


def test_resume_has_each_step_once(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 8))
    write_run(tmp_path, range(5, 11), resume=4)
    assert steps_of(tmp_path) == list(range(1, 11))
    assert [r["step"] for r in lines(tmp_path) if r["kind"] == "eval"] == [2, 4, 6, 8, 10]


def test_an_evaluation_that_a_resumed_run_repeats_is_there_once(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 5))
    out = metrics(tmp_path)
    out.resume(4)
    out.eval(EvalRecord(step=4, loss=2.0, tokens=64))
    out.close()
    assert [r["step"] for r in lines(tmp_path) if r["kind"] == "eval"] == [2, 4]


@pytest.mark.parametrize("torn", [b'{"kind": "step", "step": 4, "lo', b'{"kind"', b"\x00\x00\x00\x00", b'{"a": "\xff'])
def test_torn_last_line_is_repaired(tmp_path: Path, torn: bytes) -> None:
    write_run(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "step"] == [1, 2, 3]
    write_run(tmp_path, range(4, 6), resume=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_fresh_start_keeps_the_older_run(tmp_path: Path) -> None:
    for _ in range(3):
        write_run(tmp_path, range(1, 3))
    assert steps_of(tmp_path) == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]


def test_file_without_steps_is_not_worth_keeping(tmp_path: Path) -> None:
    for _ in range(2):
        out = metrics(tmp_path)
        out.eval(EvalRecord(step=0, loss=4.0, tokens=1))
        out.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(lines(tmp_path)) == 2


def test_console_lines_without_a_terminal(tmp_path: Path) -> None:
    text = io.StringIO()
    out = metrics(tmp_path, console=Console(file=text, width=80), log_every=2)
    out.eval(EvalRecord(step=0, loss=8.3178, tokens=65536))
    for step in range(1, 11):
        out.step(step_record(step, step_seconds=1234.5678, tokens_per_second=12_345_678.9, grad_norm=123456.0))
    out.say("saved")
    out.close()
    printed = text.getvalue()
    assert "\x1b" not in printed and "\r" not in printed
    header, evaluation, *steps, said = printed.splitlines()
    assert header.split() == ["step", "loss", "tokens/s", "seconds", "balance", "memory", "lr", "grad"]
    assert evaluation.split()[:2] == ["0", "8.3178"] and "65,536 tokens" in evaluation
    assert [line.split()[0] for line in steps] == ["2", "4", "6", "8", "10"]
    assert steps[0].split() == ["2", "4.1500", "12,345,679", "1234.568", "1.50", "812", "MiB", "3.00e-03", "1.23e+05"]
    assert said == "saved"
    assert len({len(line) for line in [header, *steps]}) == 1, "columns are aligned"
    assert len(header) < 80


def test_console_of_a_dense_model(tmp_path: Path) -> None:
    text = io.StringIO()
    out = metrics(tmp_path, console=Console(file=text))
    out.step(step_record(1, expert_load_max_over_mean=None, idle_experts=None, load_entropy=None))
    out.close()
    assert text.getvalue().splitlines()[1].split()[4] == "-"


def test_terminal_has_a_progress_bar_below_the_lines(tmp_path: Path) -> None:
    text = io.StringIO()
    out = metrics(tmp_path, console=Console(file=text, force_terminal=True, width=80))
    out.step(step_record(1))
    out.step(step_record(2))
    out.close()
    printed = text.getvalue()
    assert "2/10" in printed and "training" in printed
    assert printed.rindex("2/10") > printed.rindex("4.1500")
    assert printed.rindex("\x1b[?25h") > printed.rindex("\x1b[?25l"), "the cursor is shown again at the end"


def scrape(port: int) -> dict[str, tuple[dict[str, str], float]]:
    """Sample name to (labels, value)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {sample.name: (sample.labels, sample.value) for family in families for sample in family.samples}


def test_prometheus_serves_the_run(tmp_path: Path) -> None:
    out = metrics(tmp_path, prometheus_port=0)
    for step in (1, 2, 3):
        out.step(step_record(step, step_seconds=0.5))
    out.eval(EvalRecord(step=3, loss=1.75, tokens=64))
    assert out.prometheus is not None
    found = scrape(out.prometheus.port)
    assert all(labels["run"] == "r" and labels["rank"] == "0" for labels, _ in found.values())
    values = {name: value for name, (_, value) in found.items()}
    assert values["moetrain_tokens_total"] == 1001 + 1002 + 1003
    assert values["moetrain_loss"] == pytest.approx(8.3 / 3)
    assert values["moetrain_validation_loss"] == 1.75
    assert values["moetrain_step_duration_seconds_sum"] == 1.5
    assert values["moetrain_step_duration_seconds_count"] == 3
    assert values["moetrain_memory_bytes"] == 812 * 2**20
    assert values["moetrain_expert_load_max_over_mean"] == 1.5
    assert not [name for name in values if name.endswith("_created")]
    out.close()


def test_other_ranks_serve_their_own_values_only(tmp_path: Path) -> None:
    out = metrics(tmp_path, rank=3, prometheus_port=0)
    out.step(step_record(1))
    out.eval(EvalRecord(step=1, loss=1.0, tokens=1))
    assert out.prometheus is not None
    found = scrape(out.prometheus.port)
    assert found["moetrain_memory_bytes"] == ({"run": "r", "rank": "3"}, 812 * 2**20)
    assert "moetrain_tokens_total" not in found and "moetrain_loss" not in found
    out.close()


def test_prometheus_listens_on_loopback_and_lets_go(tmp_path: Path) -> None:
    out = metrics(tmp_path, prometheus_port=0)
    assert out.prometheus is not None
    assert out.prometheus.address == "127.0.0.1"
    port = out.prometheus.port
    out.close()
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) != 0


def test_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        taken = sock.getsockname()[1]
        with pytest.raises(ValueError, match=rf"rank 1 .* port {taken}: .* metrics\.prometheus_port"):
            metrics(tmp_path, rank=1, prometheus_port=taken - 1)


def test_port_beyond_the_last_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"port 65536: .* metrics\.prometheus_port"):
        metrics(tmp_path, rank=1, prometheus_port=65535)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MiB"), (2**20 * 812, "812 MiB"), (2**30, "1.0 GiB"), (2**30 * 39.74, "39.7 GiB")]
)
def test_bytes_text(count: float, text: str) -> None:
    assert bytes_text(count) == text
