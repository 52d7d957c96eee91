from __future__ import annotations

import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

GPU_TESTS = Path(__file__).parent / "gpu"


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell starts what runs in the background so, and the processes of the tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests under tests/gpu, and those marked `gpu`, are skipped where there is no CUDA device."""
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in each test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
