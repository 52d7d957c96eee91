"""What `tests/dist/test_bench.py` runs in the processes of ranks; it imports little, so that they start soon."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from moetrain.bench import isolate
from moetrain.bench.isolate import Failure, Ranks


def sum_of_ranks(rank: int) -> float:
    tensor = torch.tensor(float(rank + 1))
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.item()


def run_out_of_memory(rank: int) -> None:
    """The last rank, while the others wait without noticing, as they do in NCCL."""
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB. GPU 1 has a total of 79 GiB.")
    time.sleep(1000)


def be_killed(rank: int) -> float:
    """The last rank, while the others wait for it."""
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return sum_of_ranks(rank)


def hang(rank: int) -> None:
    time.sleep(1000)


def refuse(rank: int) -> None:
    raise ValueError("that\n  cannot be")


def main() -> None:
    """As a rank: functions that fail, each followed by one that works; writes what came out."""
    isolate.GRACE_SECONDS = 1.0
    ranks = Ranks()
    outcomes = [
        ranks.run(f"{number}", function, ranks.rank)
        for number, function in enumerate((run_out_of_memory, sum_of_ranks, be_killed, sum_of_ranks))
    ]
    found = [(outcome.reason, outcome.rank) if isinstance(outcome, Failure) else outcome for outcome in outcomes]
    Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
