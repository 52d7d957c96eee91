"""The terminal view: from a file that comes, grows and changes, in any width, and as plain lines."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moetrain import cli
from moetrain.top.follow import FileSource, Follower
from moetrain.top.snapshot import Rank, Snapshot, warnings
from moetrain.top.view import ASCII_BLOCKS, BLOCKS, line, screen, sparkline
from tests.cpu.test_metrics import wait_for

NOW = 1_795_000_000.0


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "step", "time": NOW + step, "step": step, "loss": 8.0 / step, "grad_norm": 1.5, "lr": 1e-3,
        "tokens_per_second": 8000.0, "step_seconds": 0.5, "memory_bytes": 60 * 2**30,
        "memory_reserved_bytes": 70 * 2**30, "memory_total_bytes": 80 * 2**30, "expert_load_max_over_mean": 2.0,
        "idle_experts": 0, "layers": {"max_over_mean": [1.5, 2.0]}, "slow_ranks": [{"rank": 3, "seconds": 0.3}],
        "median_rank_seconds": 0.29, "phase_seconds": {"forward_backward": 0.4, "other": 0.1},
    } | changes  # fmt: skip


ABOUT = {
    "kind": "run", "time": NOW, "run": "mine", "total_steps": 100, "start_step": 0, "world_size": 8,
    "expected_tokens_per_second_per_gpu": 1250.0, "flops_per_token": 1e9, "peak_flops": 1e13, "layers": ["1", "4"],
}  # fmt: skip


def write(folder: Path, *records: dict[str, Any], mode: str = "a") -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def drawn(shot: Snapshot, width: int, source: str = "runs/mine") -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(screen(shot, source, console))
    return console.file.getvalue()


def test_everything_that_a_file_tells(tmp_path: Path) -> None:
    write(tmp_path, ABOUT, *(step_record(s) for s in range(1, 41)), {"kind": "eval", "step": 40, "loss": 2.5})
    write(tmp_path, {"kind": "event", "event": "checkpoint", "step": 40, "seconds": 2.0, "time": NOW + 41})
    shot = FileSource(tmp_path).read()
    assert (shot.run, shot.state, shot.step, shot.total_steps, shot.ended) == ("mine", "train", 40, 100, False)
    assert shot.losses == [8.0 / s for s in range(1, 41)] and shot.validation_loss == 2.5
    assert shot.speed == 1000 and shot.of_plan == pytest.approx(0.8)
    assert shot.mfu == pytest.approx(0.1)
    assert shot.left_seconds == pytest.approx(60)  # a second a step by the clock, though steps take half of one
    assert shot.memory_share == pytest.approx(0.75)
    assert (shot.balance, shot.balance_layer) == (2.0, "4")
    assert shot.phases == pytest.approx({"forward_backward": 0.8, "other": 0.2})
    assert shot.slow_ranks == [Rank("3", 0.3)]
    assert shot.checkpoint_step == 40
    text = drawn(shot, 110)
    for words in (
        "step 40 of 100  1 min 00 s left", "0.2000  validation 2.5000", "1,000  80.0 % of plan 1,250", "10.0 %",
        "60.0 GiB of 80.0 GiB (75.0 %)", "busiest 2.00 x mean, layer 4", "3 +3.4 % against the median",
        "forward_backward 80 %  other 20 %", "checkpoint: 2 s",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("width", [24, 40, 72, 80, 200])
def test_any_width(tmp_path: Path, width: int) -> None:
    write(tmp_path, ABOUT | {"run": "r" * 90}, *(step_record(s) for s in range(1, 90)))
    lines = drawn(FileSource(tmp_path).read(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(BLOCKS[0] in text for text in lines)


def test_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    write(tmp_path, ABOUT, *(step_record(s) for s in range(1, 9)))
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=raw, width=80, force_terminal=True, color_system=None)
    console.print(screen(FileSource(tmp_path).read(), "here", console))
    raw.flush()
    assert b"#" in raw.buffer.getvalue()


def test_names_command_no_terminal(tmp_path: Path) -> None:
    evil = "a\x1b]0;owned\x07\x1b[2J[bold]b"
    write(tmp_path, ABOUT | {"run": evil}, step_record(1), {"kind": "event", "event": evil, "step": 1})
    shot = FileSource(tmp_path).read()
    waiting = line(Snapshot(run=evil, now=NOW, state=evil))
    for text in (drawn(shot, 200), waiting):
        assert "\x1b" not in text and "\x07" not in text
        assert text.count("[bold]b") == 2


def test_the_file_comes_later_grows_and_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    source = FileSource(folder)
    assert source.read().state == "waiting"
    write(folder, ABOUT)
    assert source.read().state == "setup"
    write(folder, *(step_record(s) for s in range(1, 6)))
    assert source.read().step == 5
    # half a line is not read before the rest is there
    whole = json.dumps(step_record(6, loss=1.0)) + "\n"
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write(whole[:40])
    assert source.read().step == 5
    with path.open("a") as file:
        file.write(whole[40:] + "not json\n[]\n{}\n")
    assert source.read().losses[-1] == 1.0
    # a resumed run replaces the file by a shorter one, another run by one that is longer
    os.replace(path, folder / "old")
    write(folder, ABOUT, *(step_record(s, loss=3.0) for s in range(1, 4)))
    assert source.read().losses == [3.0] * 3
    os.replace(path, folder / "old")
    write(folder, ABOUT | {"time": NOW + 5}, *(step_record(s, loss=4.0) for s in range(1, 40)))
    assert source.read().losses == [4.0] * 39
    write(folder, ABOUT | {"time": NOW + 9}, step_record(1, loss=5.0), mode="w")  # cut short in place
    assert source.read().losses == [5.0]
    write(folder, ABOUT | {"time": NOW + 8}, step_record(1, loss=6.0), mode="w")  # as long as it was, in place
    assert source.read().losses == [6.0]
    path.unlink()
    assert source.read().state == "waiting"


def test_steps_that_a_restart_repeats_count_once(tmp_path: Path) -> None:
    write(tmp_path, ABOUT, *(step_record(s) for s in range(1, 11)), ABOUT | {"start_step": 6}, step_record(7, loss=1.0))
    shot = FileSource(tmp_path).read()
    assert shot.step == 7 and len(shot.losses) == 7 and shot.restarts == 1


def test_long_files_are_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    path.write_bytes(b"a\nb\nc")
    assert follower.poll() == (False, [b"a", b"b"])
    assert follower.poll() == (False, [])
    with path.open("ab") as file:
        file.write(b"d\n\n")
    assert follower.poll() == (False, [b"cd", b""])


@pytest.mark.parametrize(
    ("event", "state"),
    [
        ({"event": "stop", "signal": "SIGTERM"}, "stopped by SIGTERM, the same command goes on"),
        ({"event": "nonfinite"}, "failed"),
        ({"event": "done"}, "done"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_how_a_run_ends(tmp_path: Path, event: dict[str, str], state: str) -> None:
    last = {"kind": "event", "step": 1, "time": NOW}
    write(tmp_path, ABOUT, step_record(1), last | event)
    shot = FileSource(tmp_path).read()
    assert (shot.state, shot.ended) == (state, True)
    write(tmp_path, last | {"event": "checkpoint", "seconds": 0.1})  # a run that is told to stop saves after it says so
    shot = FileSource(tmp_path).read()
    assert (shot.state, shot.ended, shot.checkpoint_step) == (state, True, 1)
    write(tmp_path, ABOUT | {"start_step": 1}, step_record(2))
    assert not FileSource(tmp_path).read().ended
    write(tmp_path, step_record(100))
    assert FileSource(tmp_path).read().state == "done"


def test_old_files_and_dense_models(tmp_path: Path) -> None:
    old = {"kind": "step", "step": 3, "loss": None, "tokens_per_second": 10.0, "expert_load_max_over_mean": None}
    write(tmp_path, old)
    shot = FileSource(tmp_path).read()
    assert shot.nonfinite and shot.step == 3
    text = drawn(shot, 80)
    assert "balance" not in text and "slow ranks" not in text and "not finite" in text


WELL = {
    "run": "r", "now": NOW, "state": "train", "step": 10, "step_seconds": 1.0, "last_step_time": NOW - 1, "speed": 95.0,
    "expected_speed": 100.0, "memory": 60.0, "memory_total": 100.0, "balance": 2.0, "idle_experts": 0.0, "ranks": 8,
    "ranks_up": 8, "slow_ranks": [Rank("3", 0.52)], "median_rank_seconds": 0.5, "checkpoint_time": NOW - 100,
    "checkpoint_interval": 100.0, "redos_share": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"last_step_time": NOW - 130}, "no step for 2 min 10 s"),
        ({"last_step_time": NOW - 130, "step_seconds": 20.0}, None),
        ({"last_step_time": NOW - 130, "state": "checkpoint"}, None),
        ({"last_step_time": NOW - 130, "ended": True}, None),
        ({"nonfinite": True}, "not finite"),
        ({"speed": 79.0}, "79.0 % of the planned speed"),
        ({"expected_speed": math.nan, "speed": 1.0}, None),
        ({"slow_ranks": [Rank("37", 0.56, "n4")]}, "rank 37 (n4) computes 12.0 % longer"),
        ({"slow_ranks": [Rank("37", 0.056)], "median_rank_seconds": 0.05}, None),  # 6 ms of a second
        ({"memory": 96.0}, "memory left"),
        ({"balance": 8.5}, "8.5 times the mean"),
        ({"idle_experts": 2.0}, "2 experts without a token"),
        ({"ranks_up": 7}, "1 of 8 ranks do not answer"),
        ({"redos_share": 0.1}, "10.0 % of the steps ran again"),
        ({"checkpoint_failed": True}, "could not be written"),
        ({"checkpoint_time": NOW - 600}, "the newest checkpoint is 10 min 00 s old"),
        ({"alerts": ["StragglerRank"]}, "alerts firing: StragglerRank"),
    ],
)
def test_warnings(changes: dict[str, Any], words: str | None) -> None:
    found = warnings(Snapshot(**WELL | changes))
    assert len(found) == (words is not None), found
    assert words is None or words in found[0]


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BLOCKS
    assert sparkline([0, 0, 7, 7], 2, ASCII_BLOCKS) == "_#"
    assert sparkline([1.0, math.nan, 2.0], 9, ASCII_BLOCKS) == "_ #"
    assert sparkline([3.0] * 4, 4, ASCII_BLOCKS) == "____"
    assert sparkline([math.nan], 4) == " " and sparkline([], 4) == "" and sparkline([1.0], 0) == ""


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, ABOUT, step_record(99), step_record(100))
    assert cli.main(["top", str(tmp_path)]) == 0  # the run is over, and so is this
    printed = capsys.readouterr().out
    assert printed.startswith("step 100/100  loss 0.0800") and printed.rstrip().endswith("done")
    assert "\x1b" not in printed


def test_lines_follow_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)

    def wait_to_read(words: str) -> None:
        wait_for(lambda: words in output.getvalue(), 60)

    def train() -> None:
        try:
            wait_to_read(": waiting\n")
            write(tmp_path, ABOUT)
            wait_to_read(": setup\n")
            for step in (1, 2, 3):
                write(tmp_path, step_record(step, idle_experts=5))
                wait_to_read(f"step {step}/100")
        finally:
            write(tmp_path, {"kind": "event", "event": "done", "step": 3, "time": NOW})

    thread = threading.Thread(target=train)
    thread.start()
    assert cli.main(["top", str(tmp_path), "--interval", "0.02"]) == 0
    thread.join()
    printed = output.getvalue().splitlines()
    assert printed[0].endswith(": waiting") and printed[1] == "mine: setup"
    assert [text.split()[1] for text in printed if text.startswith("step")][:3] == ["1/100", "2/100", "3/100"]
    assert printed.count("! 5 experts without a token") == 1


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", str(tmp_path), "--once"]) == 2
    assert "name the output_dir of a run" in capsys.readouterr().err


def run_in_terminal(folder: Path | str, *words: str) -> tuple[subprocess.Popen[bytes], int]:
    """`moetrain top` on a pseudo terminal; the process and the terminal's other end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "moetrain", "top", str(folder), *words]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "60", "LINES": "30", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    return process, ours


def read_until(descriptor: int, words: bytes, seconds: float = 30.0) -> bytes:
    """What a terminal shows until it shows some words, or to its end."""
    shown, deadline = b"", time.monotonic() + seconds
    while words not in shown and time.monotonic() < deadline:
        try:
            shown += os.read(descriptor, 65536)
        except OSError:  # the other end is closed
            break
    return shown


def test_live_in_a_terminal_until_ctrl_c(tmp_path: Path) -> None:
    write(tmp_path, ABOUT, *(step_record(s) for s in range(1, 41)))
    process, terminal = run_in_terminal(tmp_path, "--interval", "0.05")
    try:
        assert b"step 40 of 100" in read_until(terminal, b"step 40 of 100")
        write(tmp_path, step_record(41))
        assert b"step 41 of 100" in read_until(terminal, b"step 41 of 100")
        process.send_signal(signal.SIGINT)
        after = read_until(terminal, b"never shown")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(terminal)
    left, _, last = after.rpartition(b"\x1b[?1049l")  # the alternate screen is left, and the newest view stays
    assert b"\x1b[?25h" in left + last and b"step 41 of 100" in last
    assert b"Traceback" not in after
