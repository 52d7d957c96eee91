"""`moetrain train` on two ranks, killed at one moment after another: it goes on, and ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import moetrain
from moetrain.config import CreateConfig
from moetrain.create import create_checkpoint
from tests.runs import MODEL, tiny_run, write_text

ROOT = Path(moetrain.__file__).parents[1]
STEPS = 12
EVERY = 4

HOLD = '''
"""Stops this process at one moment, which then lasts until a file is deleted; says when a signal has come meanwhile."""
import contextlib, os, re, signal, sys, time

def hook(event, args):
    global reached
    if not reached and event == wanted and re.search(pattern, str(args[0])):
        reached = True
        hold_amid_a_step() if pattern == "heartbeat" else hold()

def hold_amid_a_step():
    """Between the backward pass and the update, in the second step from here; the other rank waits for this one."""
    guard = sys.modules["moetrain.guard"].Guard
    check, calls = guard.check_finite, []

    def hold_and_check(*args):
        calls.append(args)
        if len(calls) == 2:
            hold()
        check(*args)

    guard.check_finite = hold_and_check

def hold():
    open(file, "w").close()
    while os.path.exists(file):
        with contextlib.suppress(BlockingIOError):
            os.read(told, 1)
            open(file + ".told", "w").close()
        time.sleep(0.01)

if "HOLD" in os.environ:
    told, tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(tell)
    rank, wanted, pattern, file = os.environ["HOLD"].split(" ")
    reached = os.environ.get("RANK") != rank
    sys.addaudithook(hook)
'''


@dataclass(frozen=True)
class Fault:
    """What happens to one start of the run, and how it must end.

    `at` is the moment: rank, audit event of Python, pattern of its first argument. `newest` is the step of the newest
    complete checkpoint afterwards.
    """

    name: str
    at: tuple[int, str, str]
    signum: signal.Signals
    to: str
    code: int
    newest: int = 0


KILL, TERM, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1
FAULTS = [
    Fault("start: a rank is killed", (1, "import", "^transformers$"), KILL, "rank 1", 137),
    Fault("start: told to stop", (0, "import", "^transformers$"), TERM, "launcher", 143),
    Fault("start: the launcher is killed, the model half made", (0, "open", r"/start\.tmp/"), KILL, "launcher", -9),
    Fault("start: all are killed, the text half tokenised", (0, "os.rename", r"\.partial$"), KILL, "ranks", 137),
    Fault("step 2: a rank is killed", (1, "open", "heartbeat"), KILL, "rank 0", 137),
    Fault("checkpoint: a rank is killed", (1, "open", r"\.incomplete/rank-00001"), KILL, "rank 1", 137),
    Fault("checkpoint: the launcher is killed", (0, "open", r"\.incomplete/rank-00000"), KILL, "launcher", -9),
    Fault(
        "checkpoint: all are killed, complete but for its name",
        (0, "os.rename", r"\d\.incomplete$"),
        KILL,
        "ranks",
        137,
    ),
    Fault("checkpoint: told to stop", (1, "open", r"\.incomplete/rank-00001"), TERM, "launcher", 75, newest=4),
    Fault("step 7: the launcher is killed", (0, "open", "heartbeat"), KILL, "launcher", -9, newest=4),
    # told amid a step, whose numbers the ranks have exchanged: they agree in the next one
    Fault("step 7: told to stop", (1, "open", "heartbeat"), USR1, "launcher", 75, newest=8),
    Fault("export: a rank is killed", (1, "open", r"/model\.incomplete/"), KILL, "rank 1", 137, newest=STEPS),
    Fault("export: all are killed", (0, "os.rename", r"/model\.incomplete$"), KILL, "ranks", 137, newest=STEPS),
]


@dataclass
class Started:
    """A launcher that the test has started, and the processes under it."""

    process: subprocess.Popen[bytes]
    mark: bytes
    log: Path
    at: float

    def pids(self, with_variable: str = "") -> list[int]:
        """Its processes alive, the launcher included; those with `NAME=value` in their environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = (path / "environ").read_bytes().split(b"\0")
                alive = (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except OSError:
                continue
            if alive and self.mark in variables and (not with_variable or with_variable.encode() in variables):
                found.append(int(path.name))
        return found

    def send(self, signum: int, to: str) -> None:
        variable = {"rank 0": "RANK=0", "rank 1": "RANK=1", "ranks": "WORLD_SIZE=2"}.get(to)
        targets = self.pids(variable) if variable else [self.process.pid]
        assert len(targets) == (2 if to == "ranks" else 1), f"{to}: {targets}"
        for pid in targets:
            os.kill(pid, signum)

    def wait_for(self, file: Path, what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not file.exists():
            assert self.process.poll() is None, f"[{what}] it ended before: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"[{what}] the moment did not come: {self.log.read_text()}"
            time.sleep(0.01)

    def end(self, seconds: float = 120) -> tuple[int, str]:
        """Exit code and output; no process is left then."""
        code = self.process.wait(seconds)
        deadline = time.monotonic() + 5
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left, f"processes outlive the launcher: {left}"
        return code, self.log.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts `moetrain train` on the folder's run.yaml; whatever is left of it at the test's end is killed."""
    everything: list[Started] = []
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOLD)

    def begin(folder: Path, hold: tuple[int, str, str] | None = None) -> Started:
        mark = uuid.uuid4().hex
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {"MOETRAIN_TEST": mark, "OMP_NUM_THREADS": "1"}
        if hold is not None:
            environment |= {"PYTHONPATH": str(hook), "HOLD": " ".join([*map(str, hold), str(tmp_path / "held")])}
        command = [sys.executable, "-m", "moetrain", "train", str(folder / "run.yaml")]
        log = tmp_path / f"output-{len(everything)}.txt"
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        everything.append(Started(process, f"MOETRAIN_TEST={mark}".encode(), log, time.time()))
        return everything[-1]

    yield begin
    for started in everything:
        for pid in started.pids():
            os.kill(pid, signal.SIGKILL)


def write_run(folder: Path, **sections: dict[str, Any]) -> Path:
    folder.mkdir()
    write_text(folder)
    raw = tiny_run(folder, **{"parallel": {"ep_size": 2, "processes": 2}, "train": {"steps": STEPS}, **sections})
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Records of metrics.jsonl in file order; a torn line at its end is left out."""
    path = folder / "out" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in parsed if record["kind"] == kind]


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    manifests = (folder / "out" / "checkpoints").glob("step-????????/SHA256SUMS")
    return max((int(path.parent.name[5:]) for path in manifests), default=0)


def suffer(folder: Path, fault: Fault, start: Any, held: Path) -> None:
    """One start of the run with its fault; checks how it ends and what is left."""
    before = newest(folder)
    started: Started = start(folder, fault.at)
    started.wait_for(held, fault.name)
    started.send(fault.signum, fault.to)
    told = held.with_name(f"{held.name}.told")
    if fault.signum != KILL and not fault.name.startswith("start"):  # where it kills: nobody listens yet
        started.wait_for(told, fault.name)
        held.unlink()
    code, output = started.end()
    for file in (held, told):
        file.unlink(missing_ok=True)
    assert code == fault.code, f"[{fault.name}] {output}"
    assert newest(folder) == fault.newest, fault.name
    if fault.to.startswith("rank"):
        assert "was killed by SIGKILL; the other ranks were stopped" in output, f"[{fault.name}] {output}"
    if code == 75:
        assert f"stopped by {fault.signum.name} after step {fault.newest}" in output, f"[{fault.name}] {output}"
    begun = [record["start_step"] for record in records(folder, "run") if record["time"] > started.at]
    assert begun == ([] if fault.name.startswith("start") else [before]), f"[{fault.name}] it went on from {begun}"


@pytest.mark.timeout(600)
def test_a_run_that_is_killed_at_every_turn_ends_as_if_it_were_not(tmp_path: Path, start: Any) -> None:
    reference = write_run(tmp_path / "reference")
    code, output = start(reference).end()
    assert code == 0, output

    folder = write_run(tmp_path / "killed", checkpoint={"every": EVERY})
    exported = folder / "out" / "model"
    for fault in FAULTS:
        suffer(folder, fault, start, tmp_path / "held")
        assert not exported.exists(), f"[{fault.name}] half an export"
    code, output = start(folder).end()
    assert code == 0, output
    assert records(folder, "run")[-1]["start_step"] == STEPS

    steps, expected = records(folder, "step"), records(reference, "step")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1)), "each step exactly once, in order"
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [record[name] for record in steps] == [record[name] for record in expected], name
    assert records(folder, "eval")[-1]["loss"] == records(reference, "eval")[-1]["loss"]

    ours = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(reference / "out" / "model").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    text = "def f"
    assert AutoTokenizer.from_pretrained(exported)(text) == AutoTokenizer.from_pretrained(reference / "start")(text)
    wrecks = [p for pattern in ("*.incomplete", "*.tmp", "*.partial", "*.replaced") for p in folder.rglob(pattern)]
    assert wrecks == []
    assert len(list((folder / "out" / "checkpoints").iterdir())) == 2


def truncate_a_shard(folder: Path) -> None:
    """The second of two files of weights, whose header rank 1 reads."""
    created = folder / "start"
    create_checkpoint(created, CreateConfig(config=MODEL, vocab_size=300), ["def f(x): return x"], seed=0)
    AutoModelForCausalLM.from_pretrained(created).save_pretrained(created, max_shard_size="150KB")
    (created / "model.safetensors").unlink()
    (created / "SHA256SUMS").unlink()
    os.truncate(created / "model-00002-of-00002.safetensors", 50_000)


MISTAKES: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "layout": (lambda _: None, {"parallel": {"ep_size": 3}}, "ep_size=3 does not divide the 2 ranks"),
    "a shard": (truncate_a_shard, {}, "model-00002-of-00002.safetensors is truncated"),
    "learning rate": (lambda _: None, {"optim": {"lr": 1e30}}, "step 2: the loss is nan"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_any_rank_finds_stops_all_and_is_told_once(tmp_path: Path, start: Any, case: str) -> None:
    spoil, sections, message = MISTAKES[case]
    parallel = {"ep_size": 2, "processes": 2} | sections.pop("parallel", {})
    folder = write_run(tmp_path / "run", **sections, parallel=parallel)
    spoil(folder)
    code, output = start(folder).end()
    assert code == 2 and "Traceback" not in output, output
    assert output.count("error: ") == 1 and message in output, output
    assert not (folder / "out" / "model").exists() and newest(folder) == 0
    assert case != "layout" or not (folder / "start").exists(), "a wrong layout is found before anything is made"
