"""What GPUs and their links do, measured with torch; preflight.py runs it in processes that it can stop.

    python rates.py gpus                    each GPU of this machine: copy and matrix product
    RANK=... python rates.py all-reduce     this rank of one all-reduce

It prints one JSON object. Without GPUs `gpus` has an empty list, and `all-reduce` goes over gloo.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

COPY_BYTES = 2**30
MATRIX_SIZE = 8192
REPEATS = 20
ALL_REDUCE_BYTES = {"nccl": 2**30, "gloo": 2**22}
TIMEOUT = datetime.timedelta(seconds=60)


def gpus() -> dict[str, list[dict[str, float]]]:
    """GB/s of a device copy (read and written) and TFLOP/s of a bf16 product, of each GPU."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.set_device(index)
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy_seconds = _seconds(partial(target.copy_, source))
        left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda").bfloat16() for _ in range(2))
        product_seconds = _seconds(partial(torch.matmul, left, right))
        found.append(
            {
                "memory_gb_per_second": 2 * COPY_BYTES / copy_seconds / 1e9,
                "gemm_tflops": 2 * MATRIX_SIZE**3 / product_seconds / 1e12,
            }
        )
        del source, target, left, right
        torch.cuda.empty_cache()
    return {"gpus": found}


def all_reduce() -> dict[str, float]:
    """Bus bandwidth of an all-reduce over all ranks, in GB/s, and how far the clocks of the ranks are apart.

    Bus bandwidth is bytes / time * 2 (n - 1) / n: what each link carries, whatever the number of ranks n.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if backend == "nccl" else None)
    world = dist.get_world_size()
    size = ALL_REDUCE_BYTES[backend]
    data = torch.zeros(size, dtype=torch.uint8, device=device).view(torch.float32)
    seconds = _seconds(lambda: dist.all_reduce(data), on_gpu=backend == "nccl")

    dist.barrier()
    clock = torch.tensor([time.time()], dtype=torch.float64, device=device)
    clocks = [torch.zeros_like(clock) for _ in range(world)]
    dist.all_gather(clocks, clock)
    values = [float(value.item()) for value in clocks]
    result = {
        "bus_gb_per_second": size / seconds * 2 * (world - 1) / world / 1e9,
        "clock_skew_seconds": max(values) - min(values),
    }
    dist.destroy_process_group()
    return result


def _seconds(action: Callable[[], object], on_gpu: bool = True) -> float:
    """Mean time of an action, after a few that do not count."""

    def run(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            action()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    run(5)
    return run(REPEATS) / REPEATS


def main(argv: list[str]) -> int:
    verbs: dict[str, Callable[[], object]] = {"gpus": gpus, "all-reduce": all_reduce}
    result = verbs[argv[0]]()
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
