"""What keeps a run honest: stop requests, the non-finite stop, heartbeats with a hang report, an output of its own."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm and its tools warn of a job's end with one of the last two."""
BEAT_SECONDS = 2.0
"""At most one heartbeat file a rank in this time: 128 ranks may share one file system."""
CLAIM_SECONDS = 10.0
"""How long the ranks of a killed run may take to die, on GPUs too, before the next run gives up on their directory."""
_TIMED_OUT = 1
"""What ranks agree on: 0 goes on, 1 (SIGHUP's number, which is not ours) is out of time, else the signal's number."""


class Guard:
    """Watches one rank of a run from its construction, which must be in the main thread, to `close`.

    Args:
        output_dir: heartbeat and hang files go here; it must exist.
        rank: this process.
        hang_seconds: without a heartbeat for this long, every thread's stack is written to `hang-rank-N.txt`.
            Choose less than the timeout of the collectives, which ends the process.
    """

    signalled: str | None = None
    """Name of the signal that `should_stop` agreed on, the same on all ranks; None if it has not."""

    def __init__(self, output_dir: str | Path, rank: int, hang_seconds: float = 300.0) -> None:
        self.heartbeat_file = Path(output_dir) / f"heartbeat-rank-{rank}.json"
        self.hang_file = Path(output_dir) / f"hang-rank-{rank}.txt"
        self._rank = rank
        self._hang_seconds = hang_seconds
        self._signum = 0
        self._last_beat = time.monotonic()
        self._last_write = -math.inf
        self._closed = threading.Event()
        self._previous = {signum: signal.signal(signum, self._on_signal) for signum in STOP_SIGNALS}
        self._watchdog = threading.Thread(target=self._watch, name="moetrain-watchdog", daemon=True)
        self._watchdog.start()

    def close(self) -> None:
        """Stop watching and give the signals back."""
        self._closed.set()
        self._watchdog.join()
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def should_stop(self, timed_out: bool = False, group: ProcessGroup | None = None) -> bool:
        """Whether to stop after this step: a signal came, or a rank is `timed_out`.

        A signal may reach one rank or all of them, and clocks differ: one all-reduce of one int32 over `group` (None:
        all ranks) gives every rank the same answer at the same step. Without a process group the rank answers alone.
        """
        import torch  # here, because the launcher checks the output directory and has no use for torch
        import torch.distributed as dist

        code = self.stop_code(timed_out)
        if dist.is_initialized():
            on_cpu = "cpu" in dist.get_backend_config(group)
            flag = torch.tensor(code, dtype=torch.int32, device="cpu" if on_cpu else "cuda")
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
            code = int(flag.item())
        return self.agree(code)

    def stop_code(self, timed_out: bool = False) -> int:
        """Why this rank would stop, 0 if it would not: for those who reduce it over the ranks with other numbers."""
        return self._signum or (_TIMED_OUT if timed_out else 0)

    def agree(self, code: int) -> bool:
        """Whether to stop, given the greatest `stop_code` of all ranks."""
        if code > _TIMED_OUT:
            self.signalled = signal.Signals(code).name
        return code > 0

    def beat(self, step: int, phase: str = "train") -> None:
        """Say that this rank is alive; cheap enough for every step and micro-batch."""
        now = self._last_beat = time.monotonic()
        if now - self._last_write < BEAT_SECONDS:
            return
        self._last_write = now
        record = {"rank": self._rank, "step": step, "phase": phase, "time": round(time.time(), 3)}
        temporary = self.heartbeat_file.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a disk that is full for a moment must not end training here
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
            os.replace(temporary, self.heartbeat_file)

    def check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        """Stop before the optimizer touches the parameters when a step's numbers are no numbers.

        Args:
            loss, grad_norm: of all ranks together, so that every rank stops.

        Raises:
            FloatingPointError: names the step and the value.
        """
        values = (("loss", loss), ("gradient norm", grad_norm))
        bad = [f"the {name} is {value}" for name, value in values if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"step {step}: {' and '.join(bad)}. Stopped before the optimizer's update: the checkpoints written so "
                "far are whole. Usual remedies: a lower optim.lr, more optim.warmup_steps, optim.max_grad_norm, "
                "model.dtype=float32 to find the place, or a look at this step's data"
            )

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        self._signum = signum
        if signum == signal.SIGINT:
            # The second Ctrl-C ends the process at once, also inside a collective that never returns.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._rank == 0:  # not by print, which the signal may have interrupted
                os.write(2, b"\nmoetrain: stopping after this step, then saving; Ctrl-C again ends at once, unsaved\n")

    def _watch(self) -> None:
        """Write one hang report for each silence of `hang_seconds`."""
        reported = math.nan
        while not self._closed.wait(min(1.0, self._hang_seconds / 4)):
            silence = time.monotonic() - self._last_beat
            if silence < self._hang_seconds or self._last_beat == reported:
                continue
            reported = self._last_beat
            with self.hang_file.open("a", encoding="utf-8") as file:
                file.write(f"rank {self._rank}: no heartbeat for {silence:.0f} s; the stacks of all threads:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            print(
                f"moetrain: rank {self._rank} has been silent for {silence:.0f} s; stacks are in {self.hang_file}",
                file=sys.stderr,
                flush=True,
            )


def claim(output_dir: str | Path) -> TextIO:
    """Hold `output_dir` for this process, until the file is closed: two runs would spoil each other's files.

    The system lets go when the process ends, however it ends. File systems without locks let everyone in.

    Raises:
        ValueError: another process holds it, and still does after `CLAIM_SECONDS`; the message names the process.
    """
    file = (Path(output_dir) / "run.lock").open("a+", encoding="utf-8")
    deadline = time.monotonic() + CLAIM_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise ValueError(
                f"output_dir {output_dir} is in use by {holder}; stop that run, or choose another output_dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def check_writable(output_dir: str | Path, needed_bytes: int = 0) -> None:
    """Make `output_dir` and prove that it takes files, before any work is done.

    Raises:
        ValueError: it cannot be made or written, or has less than `needed_bytes` free.
    """
    output_dir = Path(output_dir)
    probe = output_dir / f".probe-{os.getpid()}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)  # a full disk accepts an empty file
    except OSError as error:
        raise ValueError(f"output_dir {output_dir} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    free = shutil.disk_usage(output_dir).free
    if free < needed_bytes:
        raise ValueError(
            f"output_dir {output_dir} has {free / 2**30:.1f} GiB free and the run needs about "
            f"{needed_bytes / 2**30:.1f} GiB; make room, choose another output_dir, or lower checkpoint.keep"
        )
