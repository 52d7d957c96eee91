"""Captured steps on GPUs: equal to eager ones, without a host sync, with what a run may ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain.graph import Passes, watch_syncs
from tests.gpu.graph_cases import batch, build, train

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("left_as_found"),
]
TOLERANCE = 2e-2
"""Losses of bf16 runs whose updates are rounded stochastically, after some steps at a large learning rate."""


@pytest.mark.parametrize(
    ("family", "checkpointing", "accum", "documents"),
    [
        ("qwen3_moe", "none", 1, None),
        ("qwen3_moe", "full", 2, None),
        ("qwen3_moe", "selective:2", 1, None),
        ("qwen3_moe", "none", 2, 4),
        ("gpt_oss", "none", 1, None),
        ("gpt_oss", "full", 2, 4),
    ],
)
def test_captured_equals_eager(family: str, checkpointing: str, accum: int, documents: int | None) -> None:
    """Changing weights, learning rates and documents, some passes a step, activation checkpointing."""
    arguments = (5, accum, documents is not None)
    model = build(family, checkpointing=checkpointing, documents=documents)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    eager = train(model, "off", *arguments)
    model.load_state_dict(state)
    captured = train(model, "on", *arguments)
    assert captured[2].startswith("captured") and eager[2].startswith("eager")
    assert captured[0] == pytest.approx(eager[0], rel=TOLERANCE) and captured[1] == pytest.approx(eager[1], rel=0.1)
    assert captured[0][0] == pytest.approx(eager[0][0], rel=1e-3)
    assert len(set(captured[0])) == 5, "each step has its own batch"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_no_host_sync(family: str) -> None:
    """Forward and backward under the debug mode that raises where the host waits."""
    model = build(family)
    inputs = {name: tensor.cuda() for name, tensor in batch(0).items()}
    scale = torch.full((), 512.0, device="cuda")
    for _ in range(2):
        model(**inputs, num_items_in_batch=scale, use_cache=False).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    model(**inputs, num_items_in_batch=scale, use_cache=False).loss.backward()


def test_a_host_sync_is_named_and_the_step_stays_eager() -> None:
    model = build("qwen3_moe")
    model.get_decoder().register_forward_pre_hook(lambda *_: torch.ones(1, device="cuda").item() and None)
    passes = Passes(model)
    for _ in range(4):
        passes(batch(0), 512.0)
        passes.overflowed()
    assert passes.status.startswith("eager") and not passes._graphs
    assert "test_graph_gpu.py" in passes.status


def test_watch_syncs() -> None:
    with watch_syncs() as found:
        torch.ones(1, device="cuda").item()
    assert found and "test_graph_gpu.py" in found[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that reach each other")
def test_nvlink_captured_equals_alltoall_eager() -> None:
    """Over all GPUs: plain, with both checkpointings and accumulation, and with an overflow at each layer."""
    ranks = min(torch.cuda.device_count(), 8)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    result = subprocess.run(
        [*command, "-m", "tests.gpu.graph_cases", "none", "full", "selective"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    lines = [line.split(" ", 2) for line in result.stdout.splitlines() if line.startswith("RESULT")]
    assert [case for _, case, _ in lines] == ["none", "full", "selective"]
    for _, _, text in lines:
        outcome = json.loads(text)
        losses, norms, status = outcome["captured"]
        assert status.startswith("captured")
        assert losses == pytest.approx(outcome["plain"][0], rel=TOLERANCE)
        assert losses[0] == pytest.approx(outcome["plain"][0][0], rel=1e-3)
        assert norms == pytest.approx(outcome["plain"][1], rel=0.1)
        for wanted, loss, error in outcome["overflows"]:
            assert loss == pytest.approx(wanted, rel=1e-3) and error < 0.05
    assert len(json.loads(lines[0][2])["overflows"]) == 3
