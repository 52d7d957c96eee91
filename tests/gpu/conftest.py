"""What tests on GPUs share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def left_as_found() -> Iterator[None]:
    """For tests that watch syncs, compile and capture: the next one has none of it, and the memory."""
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
