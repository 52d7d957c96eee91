from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.families import experts_modules
from moetrain.moe.router import random_gate, sequential_gate, set_gate
from tests.families import EXPERTS, TOP_K, batch, build


def record(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Expert ids and weights that reach each experts module, in order of the calls."""
    seen: list[tuple[Tensor, Tensor]] = []
    for _, module in experts_modules(model):
        module.register_forward_pre_hook(lambda module, args: seen.append((args[1], args[2].detach())))
    return seen


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "minimax_m2", "nemotron_h+latent"])
def test_sequential_gate_in_models(family: str) -> None:
    model = build(family)
    set_gate(model, "sequential")
    seen = record(model)
    model(**batch(0), use_cache=False).loss.backward()
    assert len(seen) == len(experts_modules(model))
    for ids, weights in seen:
        assert ids.tolist() == [[t * TOP_K % EXPERTS, (t * TOP_K + 1) % EXPERTS] for t in range(32)]
        assert torch.equal(weights, torch.full((32, TOP_K), 1 / TOP_K))
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    set_gate(model, "learned")
    model.zero_grad()
    model(**batch(0), use_cache=False).loss.backward()
    assert without == [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_router_gets_a_gradient_of_zeros() -> None:
    model = build("mixtral")
    set_gate(model, "random")
    model(**batch(0), use_cache=False).loss.backward()
    for layer in model.model.layers:
        assert torch.equal(layer.mlp.gate.weight.grad, torch.zeros_like(layer.mlp.gate.weight))
        assert layer.mlp.experts.down_proj.grad.abs().sum() > 0


def test_learned_restores_the_model() -> None:
    model = build("qwen3_moe")
    expected = model(**batch(0), use_cache=False).loss
    set_gate(model, "sequential")
    set_gate(model, "random")
    assert model(**batch(0), use_cache=False).loss != expected
    set_gate(model, "learned")
    assert torch.equal(model(**batch(0), use_cache=False).loss, expected)


def test_random_gate_is_uniform_over_distinct_experts() -> None:
    torch.manual_seed(0)
    ids = random_gate(torch.empty(60_000, 3, dtype=torch.int64), 7)
    assert ids.sort(dim=1).values.diff(dim=1).min() > 0
    counts = torch.bincount(ids.flatten(), minlength=7).double()
    # 5 sigma of a hypergeometric share of 3/7
    assert (counts - 60_000 * 3 / 7).abs().max() < 5 * (60_000 * 3 / 7 * 4 / 7) ** 0.5
    pairs = torch.bincount(ids.sort(dim=1).values[:, :2] @ torch.tensor([7, 1]), minlength=49).double()
    assert (pairs > 0).sum() == 15  # every pair of smallest two that leaves room for a third


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 8), (5, 3, 7), (16, 8, 8), (9, 4, 64)])
def test_sequential_gate_balances_to_one(tokens: int, top_k: int, experts: int) -> None:
    ids = sequential_gate(torch.empty(tokens, top_k, dtype=torch.int64), experts)
    counts = torch.bincount(ids.flatten(), minlength=experts)
    assert counts.sum() == tokens * top_k and counts.max() - counts.min() <= 1
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_random_gate_survives_recomputation_and_follows_the_seed() -> None:
    def gradients(checkpointing: bool, seed: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        model: Any = build("qwen3_moe")
        set_gate(model, "random")
        seen = record(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(seed)
        model(**batch(0), use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}, [ids for ids, _ in seen]

    plain, ids = gradients(False, 0)
    recomputed, ids_twice = gradients(True, 0)
    assert len(ids_twice) == 2 * len(ids)
    assert all(torch.equal(ids[i], ids_twice[i]) for i in range(len(ids)))
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    assert not torch.equal(gradients(False, 1)[1][0], ids[0])


def test_bad_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="learned, random, sequential"):
        set_gate(build("mixtral"), "roundrobin")
    with pytest.raises(ValueError, match="needs a model with experts"):
        set_gate(nn.Linear(2, 2), "random")
    set_gate(nn.Linear(2, 2), "learned")
