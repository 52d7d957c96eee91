"""Stop requests, the non-finite stop, heartbeats, the hang report and the output directory, on one rank."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moetrain import guard as guard_module
from moetrain.guard import Guard, check_writable


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    guard = Guard(tmp_path, rank=3)
    yield guard
    guard.close()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_only_sets_a_flag(guard: Guard, signum: signal.Signals) -> None:
    assert not guard.should_stop()
    assert guard.signalled is None
    os.kill(os.getpid(), signum)
    assert guard.should_stop()
    assert guard.signalled == signum.name
    assert guard.should_stop(), "the request stays"


def test_time_limit_stops_without_a_signal(guard: Guard) -> None:
    assert guard.should_stop(timed_out=True)
    assert guard.signalled is None
    assert not guard.should_stop()


def test_close_gives_the_signals_back(tmp_path: Path) -> None:
    before = [signal.getsignal(signum) for signum in guard_module.STOP_SIGNALS]
    guard = Guard(tmp_path, rank=0)
    assert signal.getsignal(signal.SIGTERM) not in before
    guard.close()
    assert [signal.getsignal(signum) for signum in guard_module.STOP_SIGNALS] == before
    assert not any(thread.name == "moetrain-watchdog" for thread in threading.enumerate())


def test_second_interrupt_ends_the_process_at_once(tmp_path: Path) -> None:
    script = (
        "import time; from moetrain.guard import Guard; guard = Guard('.', 0); print('ready', flush=True)\n"
        "while not guard._signum: time.sleep(0.01)\n"
        "print('flagged', flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    told = [process.stdout.readline() for _ in range(3)]
    assert "stopping after this step, then saving; Ctrl-C again ends at once" in told[1] and told[2] == "flagged\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT


@pytest.mark.parametrize(
    ("loss", "norm", "message"),
    [
        (math.nan, 1.0, "step 7: the loss is nan. Stopped before the optimizer"),
        (1.0, math.inf, "step 7: the gradient norm is inf. "),
        (-math.inf, math.nan, "step 7: the loss is -inf and the gradient norm is nan. "),
    ],
)
def test_non_finite_step_is_refused(guard: Guard, loss: float, norm: float, message: str) -> None:
    with pytest.raises(FloatingPointError, match=message.replace(".", r"\.")):
        guard.check_finite(7, loss, norm)


def test_finite_step_passes(guard: Guard) -> None:
    guard.check_finite(7, 0.0, 1e30)


def test_heartbeat_is_throttled(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    def step_on_disk() -> int:
        return int(json.loads(guard.heartbeat_file.read_text())["step"])

    guard.beat(1)
    assert json.loads(guard.heartbeat_file.read_text()).keys() == {"rank", "step", "phase", "time"}
    guard.beat(2)
    assert step_on_disk() == 1
    monkeypatch.setattr(guard_module, "BEAT_SECONDS", 0.0)
    guard.beat(3)
    assert step_on_disk() == 3
    assert guard.heartbeat_file.name == "heartbeat-rank-3.json"
    assert not list(guard.heartbeat_file.parent.glob("*.tmp"))


def test_heartbeat_survives_a_lost_directory(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    guard = Guard(folder, rank=0)
    shutil.rmtree(folder)
    guard.beat(1)
    guard.close()


def test_hang_is_reported_once_with_the_stacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    guard = Guard(tmp_path, rank=1, hang_seconds=0.2)

    def reports() -> int:
        return guard.hang_file.read_text().count("no heartbeat for") if guard.hang_file.exists() else 0

    try:
        the_call_that_hangs(lambda: reports() > 0, 0.6)
        assert reports() == 1
        guard.beat(1)
        assert wait_for(lambda: reports() == 2)
    finally:
        guard.close()
    assert "the_call_that_hangs" in guard.hang_file.read_text()
    assert "rank 1 has been silent for" in capfd.readouterr().err


def the_call_that_hangs(until: Callable[[], bool], seconds: float) -> None:
    """And for some seconds more."""
    assert wait_for(until, 60)
    time.sleep(seconds)


def test_no_hang_is_reported_while_it_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = 0.0, 0

    def clock() -> float:
        nonlocal looks
        looks += threading.current_thread().name == "moetrain-watchdog"
        return now

    monkeypatch.setattr(time, "monotonic", clock)
    guard = Guard(tmp_path, rank=0, hang_seconds=0.2)
    for step in range(5):
        guard.beat(step)
        now += 0.15
        looked = looks
        while looks < looked + 2:
            time.sleep(0.01)
    guard.close()
    assert not guard.hang_file.exists()


def test_output_directory_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", needed_bytes=1)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_output_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match=r"output_dir .*file cannot be written: "):
        check_writable(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "precious"


def test_read_only_file_system() -> None:
    with pytest.raises(ValueError, match="output_dir /proc/moetrain cannot be written: "):
        check_writable("/proc/moetrain")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        check_writable(tmp_path)


def test_too_small_a_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GiB free and the run needs about 1048576\.0 GiB; make room"):
        check_writable(tmp_path, needed_bytes=2**50)
