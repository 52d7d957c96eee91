"""The GPU's own clock, for times inside a CUDA graph, where events tell none."""

from __future__ import annotations

import time
from typing import Any

import torch

from moetrain.kernels._triton import INTERPRETED, tl, triton

if triton is not None:
    from triton.language.extra.cuda import globaltimer


def stamp(counter: torch.Tensor, weight: int) -> None:
    """Add `weight` times the clock, in nanoseconds, to `counter`, int64 [1]: with -1 before a section and 1 after it,
    the counter grows by what the section took. Sums wrap around, so a larger weight is as exact. On a CPU the clock is
    the host's. One kernel of one program."""
    if counter.is_cuda and not INTERPRETED:
        _stamp[(1,)](counter, weight, num_warps=1)
    else:
        counter += (weight * time.perf_counter_ns() + 2**63) % 2**64 - 2**63


def _add_clock(counter, weight):  # type: ignore[no-untyped-def]
    tl.atomic_add(counter, globaltimer() * weight)


# a weight of 1 would be a kernel of its own, to be compiled in the middle of a capture
_stamp: Any = _add_clock if triton is None else triton.jit(_add_clock, do_not_specialize=["weight"])
