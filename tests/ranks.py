"""Run a function on several ranks of one machine, for tests."""

from __future__ import annotations

import faulthandler
import multiprocessing.connection
import os
import queue
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankKilled(AssertionError):
    """A signal has ended a rank."""


def _rank_main(
    rank: int, world_size: int, store: str, backend: str, fn: Callable[..., Any], args: tuple[Any, ...], out: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    faulthandler.enable()
    try:
        device = torch.device("cuda", rank) if backend == "nccl" else None
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",  # a port found free now may be taken when rank 0 binds it
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
            device_id=device,
        )
        out.put((rank, fn(rank, world_size, *args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        out.put((rank, None, traceback.format_exc()))
        raise SystemExit(1) from None


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0, backend: str = "gloo"
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` fresh processes joined by a process group; the results in
    rank order.

    `fn` is a top-level function; its result must be picklable and hold no tensors. With `nccl` each rank has a
    GPU of its own, which is its current device.

    Raises:
        AssertionError: a rank raised; the message holds its traceback.
        RankKilled: a rank was ended by a signal, whatever the others made of it.
        TimeoutError: the ranks did not finish within `timeout` seconds.
    """
    # a fork of a process that has imported everything starts in 0.1 s instead of 5, but may not use CUDA if any of that
    # has touched it
    context: Any = mp.get_context("spawn" if backend == "nccl" else "forkserver")
    if backend != "nccl":
        context.set_forkserver_preload(["moetrain.trainer", "tests.parity", "tests.families"])
    out = context.Queue()
    folder = tempfile.mkdtemp()
    processes = [
        context.Process(
            target=_rank_main, args=(rank, world_size, f"{folder}/store", backend, fn, args, out), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) < world_size:
            try:
                rank, value, error = out.get(timeout=1.0)
            except queue.Empty:
                dead = [r for r, p in enumerate(processes) if not p.is_alive() and r not in results]
                if dead and out.empty():
                    _look_for_killed(processes)
                    raise AssertionError(f"ranks {dead} died without a word") from None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"ranks did not finish in {timeout} s") from None
                continue
            if error is not None:
                _look_for_killed(processes, error)
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = value
    finally:
        if len(results) < world_size:
            for process in processes:
                process.kill()
        for process in processes:
            process.join(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
    return [results[rank] for rank in range(world_size)]


def _look_for_killed(processes: list[Any], error: str = "") -> None:
    """Raise RankKilled where a signal has ended a rank, or does so in the next second."""
    multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1.0)
    killed = {
        rank: signal.Signals(-process.exitcode).name
        for rank, process in enumerate(processes)
        if process.exitcode is not None and process.exitcode < 0
    }
    if killed:
        raise RankKilled(f"ranks were ended by signals: {killed}\n{error}") from None
