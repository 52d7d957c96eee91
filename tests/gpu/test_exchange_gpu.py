"""The NVLink exchange on several GPUs. The benchmark checks every row, sum and gradient before it measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sizes", [(64, 64, 48, 3), (514, 2880, 160, 4)])
def test_exchange_and_layer(sizes: tuple[int, int, int, int]) -> None:
    """Widths that are no power of two, an odd number of choices, few tokens."""
    tokens, hidden, intermediate, top_k = sizes
    ranks = min(torch.cuda.device_count(), 8)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "moetrain", "bench", "dispatch", "--tokens", str(tokens), "--hidden", str(hidden)]
    command += ["--intermediate", str(intermediate), "--experts", str(4 * ranks), "--top-k", str(top_k)]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
