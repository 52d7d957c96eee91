"""Start the ranks of a run: in this process under torchrun or Slurm, else as local processes that never outlive it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from moetrain.config import RunConfig, load_config
from moetrain.guard import check_writable, claim
from moetrain.metrics import FILE_NAME
from moetrain.report import CONFIG_FILE, config_yaml, write_report

POLL_SECONDS = 0.05
OWN_EXIT_SECONDS = 3.0
"""After one rank has died, the others get this long to fail by themselves: their errors say what they waited for."""
TERM_SECONDS = 5.0
"""From SIGTERM to SIGKILL for ranks that outlive a dead one."""
TAIL_LINES = 25
LOG_HEADER = "--- started "
USER_ERROR = 2
"""Exit code of a rank that has told the user what to mend."""
CONTINUE = os.EX_TEMPFAIL
"""Exit code, 75, of a run that a signal stopped: it has saved, and the same command goes on from there."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def launch(config_path: str, overrides: Sequence[str] = (), processes: int | None = None) -> int:
    """Train as the configuration says; returns the exit code for the shell.

    Where RANK and WORLD_SIZE are set (torchrun, Slurm) this process is one rank. Otherwise `processes` ranks start
    on this machine: the argument, else `parallel.processes`, else one a GPU, else one. At the end rank 0 writes the
    report and names the files.

    Raises:
        ValueError: the configuration is wrong, or its output directory cannot be written or belongs to another run.
    """
    config = load_config(config_path, list(overrides))
    if not is_rank():
        check_writable(config.output_dir)
        processes = processes or num_processes(config)
        if processes > 1:
            command = [sys.executable, "-m", "moetrain", "train", config_path, *overrides]
            return run_local(command, processes, Path(config.output_dir) / "logs")
        os.environ.update(rank_environment(0, 1, free_port()))
    if os.environ["RANK"] == "0":
        check_writable(config.output_dir)
        with claim(config.output_dir), _reported(Path(config.output_dir)), _on_record(config):
            done = _train(config)
        _name_files(Path(config.output_dir))
    else:
        done = _train(config)
    return 0 if done else CONTINUE


def _train(config: RunConfig) -> bool:
    from moetrain.plan.monitored import expect  # here, because the launcher has no use for torch
    from moetrain.trainer import train

    return train(config, expect)


@contextlib.contextmanager
def _reported(output_dir: Path) -> Iterator[None]:
    """Write the report at the end, also of a run that fails, unless nothing was recorded. A disk that does not take it
    changes nothing about how the run has ended. SIGTERM is not heard meanwhile: where all ranks have failed, a launcher
    stops the last one, which is this, and its error is still to be told."""
    metrics = output_dir / FILE_NAME
    recorded = metrics.stat().st_mtime_ns if metrics.exists() else None
    try:
        yield
    finally:
        if metrics.exists() and metrics.stat().st_mtime_ns != recorded:
            previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                write_report(output_dir)
            except (OSError, ValueError) as error:
                _say(f"no report: {error}")
            finally:
                signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _on_record(config: RunConfig) -> Iterator[None]:
    """Write the configuration to the output directory; a run that ends before its first record restores the old one."""
    file, metrics = (Path(config.output_dir) / name for name in (CONFIG_FILE, FILE_NAME))
    earlier = file.read_bytes() if file.exists() else None
    recorded = metrics.stat().st_mtime_ns if metrics.exists() else None
    file.write_text(config_yaml(config), encoding="utf-8")
    try:
        yield
    except Exception:
        if earlier is not None and recorded == (metrics.stat().st_mtime_ns if metrics.exists() else None):
            file.write_bytes(earlier)
        raise


def is_rank() -> bool:
    """Whether a launcher, ours or another, has made this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def num_processes(config: RunConfig) -> int:
    """Processes of a run that is started here: as configured, else one a GPU, else one."""
    if config.parallel.processes is not None:
        return config.parallel.processes
    import torch

    return torch.cuda.device_count() or 1


def run_local(command: Sequence[str], processes: int, log_dir: Path) -> int:
    """Run `command` once a rank with torchrun's variables set, and wait; returns the exit code for the shell.

    Rank 0 writes to this terminal, rank r to `log_dir/rank-r.log`. SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on
    once, a second SIGINT kills. When a rank dies the others are stopped within seconds, and its last lines are printed.
    The ranks die with this process, whatever kills it.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    ranks: list[subprocess.Popen[bytes]] = []

    def note(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)

    previous = {signum: signal.signal(signum, note) for signum in FORWARDED}
    try:
        with reserved_port() as port:
            for rank in range(processes):
                ranks.append(_start(command, rank_environment(rank, processes, port), log_dir / f"rank-{rank}.log"))
            return _supervise(ranks, received, log_dir)
    finally:
        _kill(ranks)
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set for a rank of one machine."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # gloo would otherwise look up the machine's own name, which need not resolve, and listen on that address.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port on loopback for the store of ranks that take seconds to start. Inside, the kernel gives it to no other
    program, since it is bound; the store may listen on it, since both reuse addresses and this socket does not listen.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        yield port


def free_port() -> int:
    """A TCP port on loopback that nobody has now; for a process alone, which has no ranks to meet."""
    with reserved_port() as port:
        return port


def _start(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start one rank in a session of its own: Ctrl-C reaches the launcher alone, which passes it on once."""
    env = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
    if environment["RANK"] == "0":
        return subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_die_with_parent())
    with log.open("ab", buffering=0) as file:
        file.write(f"{LOG_HEADER}{time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        return subprocess.Popen(
            command, env=env, stdout=file, stderr=file, start_new_session=True, preexec_fn=_die_with_parent()
        )


def _die_with_parent() -> Callable[[], None]:
    """For the child, between fork and exec: the kernel kills it when this process ends, even by SIGKILL."""
    pr_set_pdeathsig = 1
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def arm() -> None:
        prctl(pr_set_pdeathsig, int(signal.SIGKILL))
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return arm


def _supervise(ranks: list[subprocess.Popen[bytes]], received: list[int], log_dir: Path) -> int:
    """Wait for all ranks or for the first failure, passing signals on. Ranks that stop to be continued agree on it."""
    forwarded: set[int] = set()
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0, CONTINUE)]
        if failed:
            break
        if None not in codes:
            return CONTINUE if CONTINUE in codes else 0
        while received:
            signum = received.pop(0)
            if signum == signal.SIGINT and signum in forwarded:
                _say("second interrupt: killing all ranks, nothing is saved")
                return 128 + signum
            if signum not in forwarded:
                forwarded.add(signum)
                _signal(ranks, signum)
        time.sleep(POLL_SECONDS)
    code = codes[failed[0]]
    assert code is not None
    _stop(ranks)
    # a rank that waited for the one that tells the user what to mend may have failed before it
    telling = [rank for rank, process in enumerate(ranks) if process.poll() == USER_ERROR]
    if telling:
        failed, code = telling, USER_ERROR
    signum = -code if code < 0 else code - 128
    if signum in forwarded:
        _say(f"stopped by {signal.Signals(signum).name} before training had begun to listen for it")
    else:
        _report(failed, [rank.poll() for rank in ranks], log_dir)
    return 128 - code if code < 0 else code


def _report(failed: list[int], codes: list[int | None], log_dir: Path) -> None:
    """Say who died first and how, with the end of its log; rank 0 has already written to this terminal."""
    if codes[0] == USER_ERROR == codes[failed[0]]:
        return
    for rank in failed:
        code = codes[rank]
        assert code is not None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        _say(f"rank {rank} {how}; the other ranks were stopped")
    loggers = [rank for rank in failed if rank > 0]
    if loggers and 0 not in failed:
        log = log_dir / f"rank-{loggers[0]}.log"
        output = log.read_text(encoding="utf-8", errors="replace").rpartition(LOG_HEADER)[2]
        lines = output.splitlines()[1:][-TAIL_LINES:]
        _say(f"last lines of rank {loggers[0]} ({log}):")
        print("\n".join(f"  {line}" for line in lines), file=sys.stderr, flush=True)


def _stop(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Let the ranks end: by themselves, then by SIGTERM; the caller kills what is left."""
    _wait(ranks, OWN_EXIT_SECONDS)
    _signal(ranks, signal.SIGTERM)
    _wait(ranks, TERM_SECONDS)


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Kill each rank with its whole process group, loader workers included."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def _signal(ranks: list[subprocess.Popen[bytes]], signum: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signum)


def _wait(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(POLL_SECONDS)


def _name_files(output_dir: Path) -> None:
    """Print what the run has left, one line a thing."""
    contents = {
        "model": "checkpoint in Hugging Face format",
        "checkpoints": "training checkpoints, to resume from",
        FILE_NAME: "one record a step",
        "run.png": "the run as a picture",
        "balance.png": "load of the experts by layer",
        "report.html": "the run as a page",
        CONFIG_FILE: "the whole configuration",
        "logs": "output of the other ranks",
    }
    print(f"\nfiles in {output_dir}:")
    for name, what in contents.items():
        if (output_dir / name).exists():
            print(f"  {name:<14} {what}", flush=True)


def _say(text: str) -> None:
    print(f"moetrain: {text}", file=sys.stderr, flush=True)
