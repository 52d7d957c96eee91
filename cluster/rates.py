"""What GPUs and their links do, measured with torch; preflight.py runs it in processes that it can stop.

    python rates.py gpus                    each GPU of this machine: copy and matrix product
    RANK=... python rates.py all-reduce     this rank of one all-reduce
    RANK=... python rates.py links          the same, then between every two ranks

It prints one JSON object. Without GPUs `gpus` has an empty list, and the others go over gloo.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

COPY_BYTES = 2**30
MATRIX_SIZE = 8192
GPU_SECONDS = 0.5
"""A GPU's clock settles within tenths of a second; what is measured before flatters or slights it."""
REPEATS = 20
CLOCK_READINGS = 5
"""A process that is held up between the barrier and its clock seems late; in one of several readings none is."""
ALL_REDUCE_BYTES = {"nccl": 2**30, "gloo": 2**22}
PAIR_BYTES = {"nccl": 2**28, "gloo": 2**20}
TIMEOUT = datetime.timedelta(seconds=60)


def gpus() -> dict[str, Any]:
    """GB/s of a device copy (read and written) and TFLOP/s of a bf16 product, of each GPU; the CUDA of torch."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.set_device(index)
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy_seconds = _settled_seconds(partial(target.copy_, source))
        left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda").bfloat16() for _ in range(2))
        product_seconds = _settled_seconds(partial(torch.matmul, left, right))
        found.append(
            {
                "memory_gb_per_second": 2 * COPY_BYTES / copy_seconds / 1e9,
                "gemm_tflops": 2 * MATRIX_SIZE**3 / product_seconds / 1e12,
            }
        )
        del source, target, left, right
        torch.cuda.empty_cache()
    return {"gpus": found, "cuda": torch.version.cuda}


def all_reduce() -> dict[str, Any]:
    """Bus bandwidth of an all-reduce over all ranks, in GB/s, and how far the clocks of the ranks are apart.

    Bus bandwidth is bytes / time * 2 (n - 1) / n: what each link carries, whatever the number of ranks n.
    """
    device = _join()
    result = _all_reduce(device)
    dist.destroy_process_group()
    return result


def links() -> dict[str, Any]:
    """What `all_reduce` returns, and GB/s from each rank (row) to each other (column) while all send and receive."""
    device = _join()
    result = _all_reduce(device)
    rank, world = dist.get_rank(), dist.get_world_size()
    size = PAIR_BYTES[dist.get_backend()]
    sent, received = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def exchange(shift: int) -> None:
        to, source = (rank + shift) % world, (rank - shift) % world
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, received, source)])
        for work in works:
            work.wait()

    rates = torch.zeros(world, dtype=torch.float64, device=device)
    for shift in range(1, world):  # everyone sends to the one who is `shift` further
        seconds = _seconds(partial(exchange, shift), on_gpu=device.type == "cuda")
        rates[(rank + shift) % world] = size / seconds / 1e9
    rows = [torch.zeros_like(rates) for _ in range(world)]
    dist.all_gather(rows, rates)
    dist.destroy_process_group()
    return result | {"pair_gb_per_second": [row.tolist() for row in rows]}


def _join() -> torch.device:
    """Meet the other ranks; this rank's device."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=TIMEOUT)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    return device


def _all_reduce(device: torch.device) -> dict[str, Any]:
    world, size = dist.get_world_size(), ALL_REDUCE_BYTES[dist.get_backend()]
    data = torch.zeros(size, dtype=torch.uint8, device=device).view(torch.float32)
    seconds = _seconds(lambda: dist.all_reduce(data), on_gpu=device.type == "cuda")

    return {
        "bus_gb_per_second": size / seconds * 2 * (world - 1) / world / 1e9,
        "clock_skew_seconds": min(_clock_skew(device) for _ in range(CLOCK_READINGS)),
    }


def _clock_skew(device: torch.device) -> float:
    """Seconds between the earliest and the latest clock of the ranks, and what they leave a barrier apart."""
    dist.barrier()
    clock = torch.tensor([time.time()], dtype=torch.float64, device=device)
    clocks = [torch.zeros_like(clock) for _ in range(dist.get_world_size())]
    dist.all_gather(clocks, clock)
    values = [float(value.item()) for value in clocks]
    return max(values) - min(values)


def _settled_seconds(action: Callable[[], object]) -> float:
    """Mean time of a GPU's action over `GPU_SECONDS`, after as long a time that does not count."""
    times = math.ceil(GPU_SECONDS / _seconds(action))
    return _seconds(action, skip=times, repeats=times)


def _seconds(action: Callable[[], object], on_gpu: bool = True, skip: int = 5, repeats: int = REPEATS) -> float:
    """Mean time of an action, after a few that do not count. Ranks of one action must agree on the numbers."""

    def run(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            action()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    run(skip)
    return run(repeats) / repeats


def main(argv: list[str]) -> int:
    verbs: dict[str, Callable[[], object]] = {"gpus": gpus, "all-reduce": all_reduce, "links": links}
    result = verbs[argv[0]]()
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
