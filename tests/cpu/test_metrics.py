"""Console and metrics.jsonl: two of the three places that a record goes to."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moetrain.config import MetricsConfig
from moetrain.metrics import (
    PHASES,
    EvalRecord,
    LayerLoads,
    Memory,
    Metrics,
    StepRecord,
    bytes_text,
    read_records,
)
from moetrain.metrics.phases import PhaseClock


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
    return Metrics(MetricsConfig(**config), folder, rank, 10, info={"vocab_size": 64}, console=console)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in lines(folder) if record["kind"] == "step"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("metrics*"))


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
    # read before close: each line is written as soon as it comes
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(lines(tmp_path)) == 3)
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
    assert files(tmp_path) == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]


def test_file_without_steps_is_not_worth_keeping(tmp_path: Path) -> None:
    for _ in range(2):
        out = metrics(tmp_path)
        out.eval(EvalRecord(step=0, loss=4.0, tokens=1))
        out.close()
    assert files(tmp_path) == ["metrics.jsonl"]
    assert [record["kind"] for record in lines(tmp_path)] == ["run", "event", "eval"]


def test_a_step_tells_phases_layers_and_slow_ranks(tmp_path: Path) -> None:
    out = metrics(tmp_path)
    out.describe({"3": 4, "5": 4}, {"run": {"model": "m"}, "rank": {"ep": 1}})
    begin = time.perf_counter()
    with out.phase("data_wait"):
        time.sleep(0.02)
    waited = time.perf_counter() - begin
    loads = LayerLoads([2.0, 1.5], [0.0, 0.123456], [1, 0], [0.75, 0.9])
    ranks = [0.2, 0.25, 0.3, 0.21, 0.9]
    memory = Memory(allocated=1, reserved=2, peak=3, total=4)
    out.step(step_record(1, layers=loads, rank_seconds=ranks, memory=memory, redos=2, seen_tokens=4096))
    out.step(step_record(2))
    out.close()
    run, overflow, first, second = lines(tmp_path)
    assert run["layers"] == ["3", "5"] and run["model"] == "m" and "ep" not in run
    assert (overflow["event"], overflow["step"], overflow["redos"]) == ("overflow", 1, 2)
    assert first["layers"] == {
        "max_over_mean": [2.0, 1.5], "min_over_mean": [0.0, 0.1235], "idle_experts": [1, 0], "entropy": [0.75, 0.9]
    }  # fmt: skip
    assert first["slow_ranks"] == [{"rank": r, "seconds": ranks[r]} for r in (4, 2, 1)]
    assert step_record(3, rank_seconds=[0.2, 0.4]).fields()["median_rank_seconds"] == 0.3, "as in Prometheus' quantile"
    assert first["median_rank_seconds"] == 0.25 and first["seen_tokens"] == 4096
    assert [first[f"memory_{name}_bytes"] for name in ("allocated", "reserved", "total")] == [1, 2, 4]
    assert set(first["phase_seconds"]) == set(PHASES)
    assert 0.02 <= first["phase_seconds"]["data_wait"] <= round(waited, 4)
    assert second["phase_seconds"]["data_wait"] == 0, "of this step, not of all"
    assert "layers" not in second and "slow_ranks" not in second


def test_phases_are_disjoint_and_add_up() -> None:
    now = 100.0
    clock = PhaseClock(lambda: now)
    now += 1  # other
    with clock.phase("forward_backward"):
        now += 2
        with clock.phase("collective_wait"):
            now += 4
        now += 8
    now += 16
    assert clock.read() == dict.fromkeys(PHASES, 0.0) | {"other": 17, "forward_backward": 10, "collective_wait": 4}
    with clock.phase("forward_backward"):
        now += 3
        assert clock.move(2, "forward_backward", "collective_wait") == 2
        assert clock.move(50, "forward_backward", "collective_wait") == 1, "what was read stays"
    assert clock.read()["forward_backward"] == 10
    assert clock.read()["collective_wait"] == 7
    assert sum(clock.read().values()) == now - 100


def test_time_that_an_exception_ends_is_charged() -> None:
    now = 0.0
    clock = PhaseClock(lambda: now)
    with pytest.raises(RuntimeError), clock.phase("checkpoint"):
        now += 5
        raise RuntimeError
    now += 1
    assert (clock.read()["checkpoint"], clock.read()["other"]) == (5, 1)


def test_a_checkpoint_leaves_an_event(tmp_path: Path) -> None:
    out = metrics(tmp_path)
    with out.checkpoint(4):
        pass
    with pytest.raises(OSError, match="full"), out.checkpoint(8):
        raise OSError("disk full")
    out.close()
    _, saved, failed = lines(tmp_path)
    assert (saved["kind"], saved["event"], saved["step"]) == ("event", "checkpoint", 4)
    assert (failed["event"], failed["step"], failed["error"]) == ("checkpoint_failed", 8, "OSError: disk full")


def test_a_resumed_run_knows_its_past(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 8))
    first = lines(tmp_path)[0]["time"]
    for restarts in (1, 2):
        out = metrics(tmp_path)
        out.resume(4)
        values = out.series._shown.values
        assert (values["restarts"], values["resumed_step"], values["step"]) == (restarts, 4, 4)
        assert values["start_timestamp_seconds"] == first
        assert values["productive_seconds"] == pytest.approx(4 * 0.2), "steps 5 to 7 are lost"
        out.step(step_record(5))
        out.close()
    events = [record for record in lines(tmp_path) if record["kind"] == "event"]
    assert [(event["event"], event["restarts"], event["step"]) for event in events] == [
        ("restart", 1, 4),
        ("restart", 2, 4),
    ]


def restarts(out: Metrics) -> tuple[float, float]:
    values = out.series._shown.values
    return values["restarts"], values["start_timestamp_seconds"]


def test_starts_without_a_checkpoint_count(tmp_path: Path) -> None:
    """Each fails before its first step, or after some; the run that is done at last is none to go on with."""
    seen = []
    for steps in (0, 2, 0, 3):
        out = metrics(tmp_path)
        seen.append(restarts(out))
        for step in range(1, steps + 1):
            out.step(step_record(step))
        if steps == 3:
            out.done(3)
        out.close()
    assert [count for count, _ in seen] == [0, 1, 2, 3] and len({first for _, first in seen}) == 1
    run, restart, *_ = lines(tmp_path)
    assert run["restarts"] == restart["restarts"] == 3 and (restart["event"], restart["step"]) == ("restart", 0)
    out = metrics(tmp_path)
    assert restarts(out)[0] == 0 and restarts(out)[1] > seen[0][1]
    out.resume(3)  # more steps
    assert restarts(out)[0] == 1
    out.close()


def test_a_run_that_is_not_to_go_on_counts_anew(tmp_path: Path) -> None:
    metrics(tmp_path).close()
    for _ in range(2):
        out = Metrics(MetricsConfig(), tmp_path, 0, 10, goes_on=False, console=Console(file=io.StringIO()))
        assert restarts(out)[0] == 0
        out.close()
    out = metrics(tmp_path)
    assert restarts(out)[0] == 1
    out.close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"number": "x", "first": 1}', '{"number": 3}'])
def test_starts_that_cannot_be_read_or_written(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "starts.json").write_text(content)
    out = metrics(tmp_path)
    assert restarts(out)[0] == 0 and not caplog.text
    out.close()
    out = metrics(tmp_path / "no" / "such" / "folder")
    assert restarts(out)[0] == 0 and "this start will not count" in caplog.text
    out.close()


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


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MiB"), (2**20 * 812, "812 MiB"), (2**30, "1.0 GiB"), (2**30 * 39.74, "39.7 GiB")]
)
def test_bytes_text(count: float, text: str) -> None:
    assert bytes_text(count) == text
