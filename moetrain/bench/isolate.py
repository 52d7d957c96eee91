"""One function after the other on all ranks, each in fresh processes with a process group of their own.

What a system leaves behind cannot reach the next one: memory, a CUDA context that an error has broken, ranks that wait
in a collective for one that ran out of memory. The processes of the ranks themselves never touch a GPU; they keep the
store at which the groups meet, and through which one rank's failure becomes everybody's.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from moetrain import mesh
from moetrain.moe.dispatch.static import forget_exchanges

POLL_SECONDS = 0.1
LIMIT_SECONDS = 1800.0
"""For one function with all that it builds and compiles; then it counts as hung."""
GRACE_SECONDS = 10.0
"""After one rank has failed the others get this long to fail by themselves."""


@dataclass(frozen=True)
class Failure:
    """Why a function gave no result: the rank that failed, and how."""

    reason: str
    rank: int
    details: str
    """Its traceback."""


class Ranks:
    """This process as one of the ranks that torchrun, Slurm or our launcher has started."""

    def __init__(self) -> None:
        self.store, self.rank, self.world = next(iter(dist.rendezvous("env://")))

    def run(self, name: str, function: Callable[..., Any], *args: Any, limit: float = LIMIT_SECONDS) -> Any | Failure:
        """Call `function(*args)` on every rank; returns its result here, or the same failure on every rank.

        Every rank makes the same calls, each with a name of its own. The function is a top-level one, its result
        picklable. It has ended on all ranks when this returns.
        """
        context: Any = mp.get_context(start_method())
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(there, name, function, args), daemon=True)
        process.start()
        there.close()
        try:
            outcome = self._await(process, here, name, time.monotonic() + limit)
        finally:
            process.kill()
            process.join()
        self._meet(f"{name}/ended")
        return self._worst_failure(name) or outcome

    def _await(self, process: Any, connection: Connection, name: str, deadline: float) -> Any:
        """The child's result; None where it has failed, or was given up after another rank's had."""
        failures = f"{name}/failures"
        while True:
            if connection.poll(POLL_SECONDS):
                try:
                    outcome = connection.recv()
                except EOFError:
                    process.join()
                    outcome = Failure(_describe_exit(process.exitcode), self.rank, "")
                break
            if time.monotonic() > deadline:
                if self.store.check([failures]):
                    return None
                outcome = Failure("did not end within the time limit", self.rank, "")
                break
            if self.store.check([failures]):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if isinstance(outcome, Failure):
            self.store.set(f"{failures}/{self.store.add(failures, 1)}", json.dumps(asdict(outcome)))
        return outcome

    def _worst_failure(self, name: str) -> Failure | None:
        """The failure that explains the others: their ranks find that one is gone."""
        key = f"{name}/failures"
        if not self.store.check([key]):
            return None
        number = self.store.add(key, 0)
        failures = [Failure(**json.loads(self.store.get(f"{key}/{n}"))) for n in range(1, number + 1)]
        return min(failures, key=lambda failure: not failure.reason.startswith(_CAUSES))

    def _meet(self, key: str) -> None:
        """Wait for all ranks."""
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.world:
            time.sleep(POLL_SECONDS)


def start_method() -> str:
    """How processes are made: a forked one cannot use a GPU once its parent has asked for one, and saves the imports
    elsewhere."""
    return "spawn" if torch.cuda.is_available() else "fork"


def _child(connection: Connection, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _die_with_parent()
    rank = int(os.environ["RANK"])
    try:
        join_group(name)
        connection.send(function(*args))
    except Exception as error:
        traceback.print_exc()
        connection.send(Failure(_describe(error), rank, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    # no teardown: it can wait for ever for a collective of a captured graph, or of a rank that has failed
    os._exit(0)


def join_group(name: str | None = None) -> torch.device:
    """Join the other ranks, if there are any; this rank's device.

    Args:
        name: of the group, where the ranks meet more than once.
    """
    device, world = mesh.device(), mesh.world_size()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if world > 1:
        store: Any = None
        if name is not None:
            port = int(os.environ["MASTER_PORT"])
            tcp = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(minutes=5))
            store = dist.PrefixStore(f"moetrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}", tcp)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=mesh.rank(),
            world_size=world,
            device_id=device if on_gpu else None,
        )
    return device


def leave_group() -> None:
    if dist.is_initialized():
        forget_exchanges()  # their buffers go before the group that they were made with
        dist.destroy_process_group()


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, even by SIGKILL."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


_OUT_OF_MEMORY, _KILLED, _ENDED = "out of memory", "killed by", "ended with exit code"
_CAUSES = (_OUT_OF_MEMORY, _KILLED, _ENDED)
"""How reasons begin that no other rank's failure can be the reason of."""


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY in text.lower():
        wanted = text.partition("Tried to allocate ")[2].partition(". ")[0]
        return _OUT_OF_MEMORY + (f" (wanted {wanted} more)" if wanted else "")
    return f"{type(error).__name__}: {text[:300]}"


def _describe_exit(code: int) -> str:
    return f"{_KILLED} {signal.Signals(-code).name}" if code < 0 else f"{_ENDED} {code}"
