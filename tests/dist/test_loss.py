from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moetrain.kernels.linear_cross_entropy
from moetrain.loss import install_loss, without_logits
from tests.families import FAMILIES, batch
from tests.ranks import run_ranks

CASES = {
    "qwen3_moe": {},
    "qwen3_moe tied": {"tie_word_embeddings": True},
    "ernie4_5_moe": {},  # a head with a bias
    "granitemoe": {},  # scaled logits
}


def test_fused_loss_of_a_sharded_model_equals_plain_loss_of_one_process(tmp_path: Path) -> None:
    """FSDP2 with expert parallelism: the head's weight is a shard outside its forward."""
    for name, overrides in CASES.items():
        torch.manual_seed(0)
        config = FAMILIES[name.split()[0]]()
        for key, value in overrides.items():
            setattr(config, key, value)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / name)
    run_ranks(check_rank, 2, tmp_path)


def check_rank(rank: int, world: int, folder: Path) -> None:
    moetrain.kernels.linear_cross_entropy.CHUNK_LOGITS["cpu"] = 5 * 128  # chunks of 5 of the 32 tokens
    for name in CASES:
        plain: Any = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).train()
        config = DistributedConfig(fsdp_size=2, ep_size=2)
        sharded: Any = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config).train()
        assert "fused" in install_loss(sharded, "fused")
        passes = [[batch(10 * step + r) for r in range(world)] for step in range(2)]
        for rows in passes:
            rows[1]["labels"][0, :7] = -100
        items = sum((b["labels"][:, 1:] != -100).sum() for rows in passes for b in rows)
        for rows in passes:
            mine = sharded(**rows[rank], use_cache=False, num_items_in_batch=items / world)
            assert mine.logits is None
            mine.loss.backward()
            expected = sum(plain(**b, use_cache=False, num_items_in_batch=items).loss for b in rows)
            expected.backward()
            loss = mine.loss.detach().clone()
            dist.all_reduce(loss)
            torch.testing.assert_close(loss / world, expected.detach(), rtol=1e-5, atol=0)
        compare_gradients(name, sharded, plain)

        sharded.eval(), plain.eval()
        with torch.no_grad(), without_logits(sharded):
            mine = sharded(**passes[0][rank], use_cache=False)
        expected = plain(**passes[0][rank], use_cache=False)
        assert mine.logits is None
        torch.testing.assert_close(mine.loss, expected.loss, rtol=1e-5, atol=0)
        with torch.no_grad():
            logits = sharded(**passes[0][rank], use_cache=False).logits
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)


def compare_gradients(name: str, sharded: torch.nn.Module, plain: torch.nn.Module) -> None:
    reference = dict(plain.named_parameters())
    for parameter_name, p in sharded.named_parameters():
        expected = reference[parameter_name].grad
        assert (p.grad is None) == (expected is None), (name, parameter_name)
        if expected is not None:
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            error = (grad - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, (name, parameter_name, error)
