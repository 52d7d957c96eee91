"""The seam on real GPUs with NCCL: sharded models against plain eager Transformers, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.test_trainer import losses, run
from tests.families import FAMILIES
from tests.parity import parity_of_families
from tests.ranks import run_ranks
from tests.runs import tiny_run, write_text

NAMED = [
    "qwen3_moe", "qwen3_next", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "nemotron_h", "nemotron_h+latent",
    "glm4_moe", "mixtral", "minimax_m2", "olmoe", "granitemoe", "ernie4_5_moe", "hunyuan_v1_moe", "phimoe", "dots1",
]  # fmt: skip
GPUS = torch.cuda.device_count()


def needs(ranks: int) -> Any:
    return pytest.mark.skipif(ranks > GPUS, reason=f"needs {ranks} GPUs, this machine has {GPUS}")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"fsdp_size": 2, "ep_size": 2}, id="ep2", marks=needs(2)),
        pytest.param({"fsdp_size": 4, "ep_size": 2}, id="ep2_efsdp2", marks=needs(4)),
        pytest.param({"fsdp_size": 8, "ep_size": 4}, id="ep4_efsdp2", marks=needs(8)),
        pytest.param({"dp_replicate_size": 2, "fsdp_size": 4, "ep_size": 4}, id="ep4_replicas2", marks=needs(8)),
    ],
)
def test_parity_with_nccl(layout: dict[str, Any], tmp_path: Path) -> None:
    assert set(NAMED) <= set(FAMILIES)
    ranks = layout["fsdp_size"] * layout.get("dp_replicate_size", 1)
    results = run_ranks(parity_of_families, ranks, NAMED, layout, str(tmp_path), timeout=400, backend="nccl")[0]
    errors = {family: result.error for family, result in results.items() if result.error}
    assert not errors, "\n".join(f"{family}: {error}" for family, error in errors.items())
    for family, result in results.items():
        assert max(result.loss, result.logits, result.gradients, result.norm) < 5e-5, (family, result)
        assert result.same_keys and result.same_weights, family


@pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, this machine has {GPUS}")
def test_two_gpus_learn_what_one_learns(tmp_path: Path) -> None:
    for ranks, name in ((1, "one"), (2, "two")):
        folder = tmp_path / name
        folder.mkdir()
        write_text(folder)
        sections: dict[str, Any] = {"data": {"batch_size": 4 // ranks}, "parallel": {"ep_size": ranks}}
        run_ranks(run, ranks, tiny_run(folder, **sections), backend="nccl")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-3)
    assert two[-1] < two[0] - 0.3
