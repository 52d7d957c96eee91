"""Ranks of one machine: what they are told, how they end, and that none outlives the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moetrain import launcher
from moetrain.config import RunConfig, load_config
from moetrain.launcher import launch, rank_environment, run_local
from moetrain.metrics import EvalRecord, Metrics

ROOT = Path(launcher.__file__).parents[1]
PREAMBLE = """
import json, os, pathlib, signal, sys, time
rank = int(os.environ["RANK"])
here = pathlib.Path(sys.argv[1])
def publish(name, text=""):
    (here / f"{name}-{rank}.tmp").write_text(str(text))
    os.replace(here / f"{name}-{rank}.tmp", here / f"{name}-{rank}")
"""
SAVES_ON_SIGNAL = """
received = []
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(signum, lambda number, frame: received.append(number))
publish("pid", os.getpid())
while not received: time.sleep(0.01)
publish("received")
while not (here / "repeated").exists(): time.sleep(0.01)
time.sleep(0.5)
publish("signals", json.dumps(received))
"""
NEVER_ENDS = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, lambda *_: publish("interrupted"))
publish("pid", os.getpid())
end = time.monotonic() + 600
while time.monotonic() < end: time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def _outside_of_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def command(folder: Path, body: str) -> list[str]:
    script = folder / "rank.py"
    script.write_text(PREAMBLE + body)
    return [sys.executable, str(script), str(folder)]


def read(folder: Path, name: str, ranks: int, seconds: float = 120.0) -> list[str]:
    """What the ranks published under a name, as soon as all have."""
    files = [folder / f"{name}-{rank}" for rank in range(ranks)]
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"{[file.name for file in files if not file.exists()]} did not come"
        time.sleep(0.02)
    return [file.read_text() for file in files]


def alive(pid: int) -> bool:
    """Running, that is neither gone nor a zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Launchers that the test started; killed with their ranks at its end."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
    for file in tmp_path.glob("pid-*"):
        if alive(int(file.read_text())):
            os.kill(int(file.read_text()), signal.SIGKILL)


def start_launcher(folder: Path, body: str, ranks: int, started: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    call = f"run_local({command(folder, body)!r}, {ranks}, pathlib.Path({str(folder / 'logs')!r}))"
    # a test run under nohup hands down an ignored SIGHUP
    hang_up = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code = f"{hang_up}; import pathlib, sys; from moetrain.launcher import run_local; sys.exit({call})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True
    )
    started.append(process)
    return process


def test_ranks_are_told_who_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
publish("told", json.dumps({name: os.environ[name] for name in names}))
print(f"output of rank {rank}")
print(f"errors of rank {rank}", file=sys.stderr)
"""
    assert run_local(command(tmp_path, body), 3, tmp_path / "logs") == 0
    told = [json.loads(text) for text in read(tmp_path, "told", 3)]
    for rank, variables in enumerate(told):
        assert variables["RANK"] == variables["LOCAL_RANK"] == str(rank)
        assert variables["WORLD_SIZE"] == variables["LOCAL_WORLD_SIZE"] == "3"
        assert variables["MASTER_ADDR"] == "127.0.0.1"
        assert variables["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert len({variables["MASTER_PORT"] for variables in told}) == 1
    printed = capfd.readouterr()
    assert printed.out == "output of rank 0\n" and printed.err == "errors of rank 0\n"
    header, *lines = (tmp_path / "logs" / "rank-2.log").read_text().splitlines()
    assert header.startswith("--- started ") and lines == ["output of rank 2", "errors of rank 2"]
    assert not (tmp_path / "logs" / "rank-0.log").exists()


def test_no_other_program_gets_the_port_before_the_ranks_listen(tmp_path: Path) -> None:
    body = """
import socket
try:
    socket.socket().bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    publish("port", "taken")
except OSError:
    publish("port", "reserved")
"""
    assert run_local(command(tmp_path, body), 2, tmp_path / "logs") == 0
    assert read(tmp_path, "port", 2) == ["reserved", "reserved"]


def test_ranks_meet_on_the_reserved_port_and_nobody_else_can(tmp_path: Path) -> None:
    body = """
import types
import torch, torch.distributed as dist
from moetrain.prepare import start_process_group
start_process_group(types.SimpleNamespace(parallel=types.SimpleNamespace(timeout_seconds=60)))
total = torch.ones(1)
dist.all_reduce(total)
mine = {os.readlink(file) for file in pathlib.Path("/proc/self/fd").iterdir() if file.is_symlink()}
rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/self/net/{name}")][1:]
listening = {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}
publish("met", json.dumps([total.item(), os.environ["MASTER_PORT"], sorted(listening)]))
dist.barrier()
dist.destroy_process_group()
"""
    assert run_local(command(tmp_path, body), 2, tmp_path / "logs") == 0
    for rank, text in enumerate(read(tmp_path, "met", 2)):
        total, port, listening = json.loads(text)
        assert total == 2 and {address.split(":")[0] for address in listening} == {"0100007F"}, listening
        assert (f"0100007F:{int(port):04X}" in listening) == (rank == 0)


def test_a_later_run_keeps_the_log_and_shows_its_own_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_local(command(tmp_path, "print('first run')"), 2, tmp_path / "logs")
    run_local(command(tmp_path, "print('second run'); sys.exit(3 * rank)"), 2, tmp_path / "logs")
    log = (tmp_path / "logs" / "rank-1.log").read_text()
    assert "first run" in log and "second run" in log
    errors = capfd.readouterr().err
    assert "second run" in errors and "first run" not in errors and "--- started" not in errors


def test_threads_chosen_by_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rank_environment(0, 2, 1)["OMP_NUM_THREADS"] == "7"


def test_dead_rank_stops_the_others_and_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
publish("pid", os.getpid())
if rank == 1:
    while not all((here / f"pid-{other}").exists() for other in range(3)): time.sleep(0.01)
    publish("ends", time.monotonic()); print("the reason"); sys.exit(5)
time.sleep(600)
"""
    assert run_local(command(tmp_path, body), 3, tmp_path / "logs") == 5
    assert time.monotonic() - float((tmp_path / "ends-1").read_text()) < 10
    assert wait_until_gone([int(pid) for pid in read(tmp_path, "pid", 3)], 0) == []
    errors = capfd.readouterr().err
    assert "rank 1 ended with exit code 5; the other ranks were stopped" in errors
    assert "last lines of rank 1" in errors and "  the reason\n" in errors


def test_ranks_that_ignore_sigterm_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "OWN_EXIT_SECONDS", 0.2)
    monkeypatch.setattr(launcher, "TERM_SECONDS", 0.2)
    last = """
if rank == 2:
    while not all((here / f"pid-{other}").exists() for other in range(2)): time.sleep(0.01)
    os.kill(os.getpid(), 9)
end ="""
    body = NEVER_ENDS.replace("\nend =", last)
    assert run_local(command(tmp_path, body), 3, tmp_path / "logs") == 128 + signal.SIGKILL
    assert wait_until_gone([int(pid) for pid in read(tmp_path, "pid", 3)], 0) == []
    assert "rank 2 was killed by SIGKILL" in capfd.readouterr().err


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that end by themselves are given the time that a busy machine takes to start them."""
    monkeypatch.setattr(launcher, "OWN_EXIT_SECONDS", 120.0)


@pytest.mark.usefixtures("patient")
def test_error_that_rank_0_has_told_is_not_told_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_local(command(tmp_path, "print('mend this', file=sys.stderr); sys.exit(2)"), 2, tmp_path / "logs") == 2
    assert capfd.readouterr().err == "mend this\n"


@pytest.mark.usefixtures("patient")
def test_error_to_mend_wins_over_what_it_did_to_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 loses its connection to rank 1 and is gone before rank 1 has ended."""
    body = "time.sleep(rank)\nprint('mend this' if rank else 'connection closed', file=sys.stderr); sys.exit(1 + rank)"
    assert run_local(command(tmp_path, body), 2, tmp_path / "logs") == 2
    errors = capfd.readouterr().err
    assert "rank 1 ended with exit code 2" in errors and "  mend this\n" in errors and "rank 0" not in errors


def test_a_report_of_a_failed_run_takes_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 writes it while the launcher stops the ranks, and tells the error then."""
    monkeypatch.setattr(launcher, "OWN_EXIT_SECONDS", 0.2)
    monkeypatch.setattr(launcher, "TERM_SECONDS", 120.0)
    body = """
from moetrain import launcher
def write(folder):
    publish("begun")
    time.sleep(2)
    publish("report")
launcher.write_report = write
try:
    if rank == 0:
        with launcher._reported(here):
            (here / launcher.FILE_NAME).write_text("")
            raise FloatingPointError("mend this")
    while not (here / "begun-0").exists(): time.sleep(0.01)
    raise FloatingPointError("mend this")
except FloatingPointError as error:
    sys.exit(print(error, file=sys.stderr) or 2)
"""
    assert run_local(command(tmp_path, f"sys.path.insert(0, {str(ROOT)!r})\n" + body), 2, tmp_path / "logs") == 2
    assert (tmp_path / "report-0").exists()
    assert capfd.readouterr().err == "mend this\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_reaches_each_rank_once(
    tmp_path: Path, started: list[subprocess.Popen[str]], signum: signal.Signals
) -> None:
    process = start_launcher(tmp_path, SAVES_ON_SIGNAL, 2, started)
    read(tmp_path, "pid", 2)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does: to all processes of its foreground group
    else:
        process.send_signal(signum)
        read(tmp_path, "received", 2)
        process.send_signal(signum)  # a scheduler may repeat itself
    (tmp_path / "repeated").touch()
    assert process.wait(timeout=60) == 0
    assert [json.loads(text) for text in read(tmp_path, "signals", 2)] == [[signum], [signum]]


def test_ranks_that_have_saved_end_in_their_own_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "time.sleep(0 if rank else 1); publish('left'); sys.exit(75)"
    with mock.patch.object(launcher, "OWN_EXIT_SECONDS", 0.1):
        assert run_local(command(tmp_path, body), 2, tmp_path / "logs") == 75
    assert read(tmp_path, "left", 2) == ["", ""] and capfd.readouterr().err == ""


def test_a_rank_that_fails_beside_ranks_that_have_saved_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_local(command(tmp_path, "sys.exit(3 if rank else 75)"), 2, tmp_path / "logs") == 3
    assert "rank 1 ended with exit code 3" in capfd.readouterr().err


def test_second_interrupt_kills(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    process = start_launcher(tmp_path, NEVER_ENDS, 2, started)
    pids = [int(pid) for pid in read(tmp_path, "pid", 2)]
    process.send_signal(signal.SIGINT)
    read(tmp_path, "interrupted", 2)
    assert [alive(pid) for pid in pids] == [True, True]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert wait_until_gone(pids, 0) == []


@pytest.mark.parametrize("handler", ["signal.SIG_DFL", "lambda *_: sys.exit(130)"], ids=["killed", "exits"])
def test_interrupt_before_training_listens(tmp_path: Path, started: list[subprocess.Popen[str]], handler: str) -> None:
    body = f"signal.signal(signal.SIGINT, {handler}); publish('pid', os.getpid()); time.sleep(600)"
    process = start_launcher(tmp_path, body, 2, started)
    read(tmp_path, "pid", 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT" in errors and "ended with" not in errors and "last lines" not in errors


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGHUP])
def test_no_rank_outlives_the_launcher(
    tmp_path: Path, started: list[subprocess.Popen[str]], signum: signal.Signals
) -> None:
    process = start_launcher(tmp_path, NEVER_ENDS, 3, started)
    pids = [int(pid) for pid in read(tmp_path, "pid", 3)]
    assert all(alive(pid) for pid in pids)
    process.send_signal(signum)
    process.wait(timeout=30)
    assert wait_until_gone(pids, 30) == []


def test_children_of_a_rank_die_with_it(tmp_path: Path) -> None:
    body = """
import subprocess
worker = subprocess.Popen(["sleep", "600"])
publish("pid", worker.pid)
while not all((here / f"pid-{other}").exists() for other in range(2)): time.sleep(0.01)
os._exit(3 if rank == 1 else 0)
"""
    assert run_local(command(tmp_path, body), 2, tmp_path / "logs") == 3
    assert wait_until_gone([int(pid) for pid in read(tmp_path, "pid", 2)], 30) == []


def test_one_rank_that_is_told_to_stop_stops_all_at_the_same_step(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    body = """
import torch.distributed as dist
from moetrain.guard import Guard
dist.init_process_group("gloo")
guard, step = Guard(here, rank), 0
while not guard.should_stop():
    step += 1
    if step == 3: publish("pid", os.getpid())
    time.sleep(0.02 * (1 + rank))
publish("stopped", json.dumps([step, guard.signalled]))
guard.close()
dist.destroy_process_group()
"""
    process = start_launcher(tmp_path, f"sys.path.insert(0, {str(ROOT)!r})\n" + body, 2, started)
    pids = read(tmp_path, "pid", 2)
    os.kill(int(pids[1]), signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    first, second = (json.loads(text) for text in read(tmp_path, "stopped", 2))
    assert first == second
    assert first[1] == "SIGTERM" and first[0] >= 3


@pytest.fixture
def run_config(tmp_path: Path) -> str:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"output_dir: {tmp_path}/out\nmodel: {{path: start}}\ntrain: {{steps: 1}}\ndata: {{train: [{{path: a.txt}}]}}\n"
    )
    return str(config)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, dict[str, str]]]:
    """Configurations and environments that the trainer was called with; it writes one record."""
    calls: list[tuple[RunConfig, dict[str, str]]] = []

    def train(config: RunConfig, expect: object) -> bool:
        calls.append((config, dict(os.environ)))
        out = Metrics(config.metrics, config.output_dir, int(os.environ["RANK"]), config.train.steps)
        out.eval(EvalRecord(step=0, loss=2.0, tokens=8))
        out.close()
        return config.train.steps == 1

    trainer = types.ModuleType("moetrain.trainer")
    trainer.train = train
    monkeypatch.setitem(sys.modules, "moetrain.trainer", trainer)
    return calls


def test_one_process_trains_here_and_leaves_a_report(
    tmp_path: Path, run_config: str, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.dict(os.environ):
        assert launch(run_config, ["train.seed=3"], processes=1) == 0
    ((config, environment),) = trained
    assert config.train.seed == 3
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    assert load_config(tmp_path / "out" / "config.yaml") == config
    printed = capsys.readouterr().out
    for name in ("config.yaml", "metrics.jsonl", "report.html", "run.png"):
        assert (tmp_path / "out" / name).exists() and f"  {name} " in printed
    assert "checkpoints" not in printed


def test_rank_of_another_launcher_trains_here(tmp_path: Path, run_config: str, trained: list[Any]) -> None:
    with mock.patch.dict(os.environ, {"RANK": "1", "WORLD_SIZE": "4"}):
        assert launch(run_config, processes=2) == 0
    assert len(trained) == 1
    assert not (tmp_path / "out").exists(), "rank 0 alone writes"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_that_was_told_to_stop_says_so(run_config: str, trained: list[Any], rank: str) -> None:
    with mock.patch.dict(os.environ, {"RANK": rank, "WORLD_SIZE": "2"}):
        assert launch(run_config, ["train.steps=9"]) == 75


def test_each_local_process_is_a_rank_of_the_verb(run_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def run(*args: Any) -> int:
        calls.append(args)
        return 4

    monkeypatch.setattr(launcher, "run_local", run)
    assert launch(run_config, ["parallel.processes=3"]) == 4
    command, processes, logs = calls[0]
    assert command == [sys.executable, "-m", "moetrain", "train", run_config, "parallel.processes=3"]
    assert processes == 3 and logs == Path(load_config(run_config).output_dir) / "logs"


def test_output_that_cannot_be_written_starts_nothing(run_config: str, trained: list[Any]) -> None:
    with pytest.raises(ValueError, match="output_dir /dev/null/out cannot be written"):
        launch(run_config, ["output_dir=/dev/null/out"], processes=2)
    assert trained == []


def test_wrong_configuration_starts_nothing(tmp_path: Path, run_config: str) -> None:
    with pytest.raises(ValueError, match=r"data\.train: List should have at least 1 item"):
        launch(run_config, ["data.train=[]"], processes=2)
    assert not (tmp_path / "out").exists()
