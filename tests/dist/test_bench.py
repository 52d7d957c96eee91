"""The benchmark on several ranks: the comparison end to end, systems that fail, the layer by each dispatcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moetrain.bench import isolate, layer
from moetrain.bench.isolate import Ranks
from moetrain.launcher import free_port, rank_environment
from tests.dist import bench_cases
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=200)


def test_two_ranks_end_to_end(tmp_path: Path) -> None:
    words = [
        "bench",
        "tiny",
        "--processes",
        "2",
        "--seq-len",
        "64",
        "--warmup",
        "3",
        "--steps",
        "2",
        "--gate",
        "random",
    ]
    result = run("-m", "moetrain", *words, "--against", "transformers", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "tiny-2x1x64-random.json").read_text(encoding="utf-8"))
    systems = report["systems"]
    assert list(systems) == ["transformers fsdp2", "transformers ep", "moetrain"]
    assert report["world"] == 2 and report["case"]["ep_size"] == 2
    losses = [system["loss"] for system in systems.values()]
    assert max(losses) - min(losses) < 0.02 and 6.0 < losses[0] < 6.5  # ln 512 is 6.24; random gates draw apart
    best = max(systems["transformers fsdp2"]["tps_per_gpu"], systems["transformers ep"]["tps_per_gpu"])
    assert report["ratio"]["tps"] == pytest.approx(systems["moetrain"]["tps_per_gpu"] / best)
    assert (tmp_path / "tiny-2x1x64-random.png").exists()


def test_a_failure_is_everybodys_and_the_next_one_works(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = run(*torchrun, "-m", "tests.dist.bench_cases", str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    outcomes = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] == [["out of memory (wanted 2.32 GiB more)", 1], 3.0, ["killed by SIGKILL", 1], 3.0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_outcomes_of_one_rank(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`spawn` is what GPUs need."""
    for name, value in rank_environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(isolate, "start_method", lambda: method)
    ranks = Ranks()
    assert ranks.run("good", bench_cases.sum_of_ranks, 6) == 7.0
    failure = ranks.run("refused", bench_cases.refuse, 0)
    assert failure.reason == "ValueError: that cannot be" and "in refuse" in failure.details
    if method == "fork":
        assert ranks.run("late", bench_cases.hang, 0, limit=0.5).reason == "did not end within the time limit"


def layer_rows(rank: int, world_size: int) -> list[Any]:
    found: list[Any] = []
    for model in ("tiny", "tiny-gpt-oss"):
        rows = layer.bench_layer(model, tokens=24, ep_size=2, against_transformers=True)
        found.append([row.part for row in rows])
        assert all(row.ms > 0 and row.rate > 0 for row in rows)
    right, layer.moe_forward = layer.moe_forward, lambda *args: right(*args) * 1.1
    try:
        layer.bench_layer("tiny", tokens=24, ep_size=2)
    except AssertionError as error:
        found.append(str(error))
    return found


def test_layer_by_each_dispatcher() -> None:
    parts = [
        f"{system}, {part}, eager"
        for system in ("alltoall", "allgather", "transformers all_to_all")
        for part in ("forward", "forward + backward")
    ]
    for found in run_ranks(layer_rows, 2):
        assert found[:2] == [parts, parts]
        assert "alltoall differs from Transformers by" in found[2]


def test_ep_sizes_of_a_layer() -> None:
    for rank_found in run_ranks(layer_ep_sizes, 4):
        assert rank_found == {1: ["local"], 2: ["allgather"]}


def layer_ep_sizes(rank: int, world_size: int) -> dict[int, list[str]]:
    """Groups of two in a world of four, and no groups; each layer is checked against Transformers' as it runs."""
    found = {}
    for ep_size, dispatch in ((1, "local"), (2, "allgather")):
        rows = layer.bench_layer("tiny-nemotron-h", tokens=16, ep_size=ep_size, gate="sequential", dispatch=dispatch)
        found[ep_size] = sorted({row.part.split(",")[0] for row in rows})
    return found
