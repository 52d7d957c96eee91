from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moetrain.moe.balance import BiasUpdate, LoadStats
from moetrain.moe.router import set_gate
from tests.families import batch, build
from tests.ranks import run_ranks

# where the bias lies: a buffer of the router, a parameter [1, E] in a module of the router, a parameter of the block
FAMILIES = ["deepseek_v3", "ernie4_5_moe", "afmoe"]
RATE = 0.01


def test_load_and_biases_of_a_sharded_model_equal_one_process(tmp_path: Path) -> None:
    for family in FAMILIES:
        build(family).save_pretrained(tmp_path / family)
    run_ranks(check_rank, 2, tmp_path)


def check_rank(rank: int, world: int, folder: Path) -> None:
    for family in FAMILIES:
        plain = AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32).train()
        sharded = load_sharded(folder / family)
        assert any(isinstance(bias, DTensor) for bias in biases(sharded).values()) == (family != "deepseek_v3")
        plain_stats, stats = LoadStats.attach(plain), LoadStats.attach(sharded)
        plain_update, update = BiasUpdate(plain, RATE, plain_stats), BiasUpdate(sharded, RATE, stats)
        before = {name: bias.detach().clone() for name, bias in biases(plain).items()}
        for step in range(3):
            for micro in range(2):
                rows = [batch(100 * step + 10 * micro + r) for r in range(world)]
                sharded(**rows[rank], use_cache=False).loss.backward()
                with torch.no_grad():
                    for each in rows:
                        plain(**each, use_cache=False)
            # the routers of both see the same scores, so the loads are equal to the token
            assert stats.read() == plain_stats.read(), family
            update.step()
            plain_update.step()
        for name, bias in biases(sharded).items():
            value = bias.full_tensor() if isinstance(bias, DTensor) else bias
            assert torch.equal(value, biases(plain)[name]), (family, name)
            assert not torch.equal(value, before[name])
            copies = [torch.empty_like(value) for _ in range(world)]
            dist.all_gather(copies, value.contiguous())
            assert torch.equal(*copies)
    check_gates(folder)
    check_sharded_bf16_is_refused(folder)


def check_gates(folder: Path) -> None:
    """Global expert ids under expert parallelism, where a module counts its own experts alone."""
    model = load_sharded(folder / "deepseek_v3")
    set_gate(model, "sequential")
    stats = LoadStats.attach(model)
    model(**batch(0), use_cache=False).loss.backward()
    load = stats.read()
    assert (load.max_over_mean, load.idle_experts) == (1.0, 0)


def check_sharded_bf16_is_refused(folder: Path) -> None:
    model = load_sharded(folder / "deepseek_v3")
    router = model.model.layers[1].mlp.gate
    sharded = DTensor.from_local(
        torch.zeros(4, dtype=torch.bfloat16), router.weight.device_mesh, router.weight.placements, run_check=False
    )
    del router.e_score_correction_bias
    router.e_score_correction_bias = torch.nn.Parameter(sharded, requires_grad=False)
    with pytest.raises(ValueError, match=r"sharded in torch\.bfloat16"):
        BiasUpdate(model, RATE, LoadStats.attach(model))


def load_sharded(folder: Path) -> Any:
    config = DistributedConfig(fsdp_size=2, ep_size=2)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config).train()


def biases(model: torch.nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: t for name, t in tensors.items() if name.endswith(("e_score_correction_bias", "expert_bias"))}
