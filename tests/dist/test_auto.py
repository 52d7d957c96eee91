"""The auto classes on several ranks: what is read, what is drawn, what recomputation sends, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.auto_cases import (
    bf16_parity,
    bytes_read,
    checkpointed,
    dense_fallback,
    dropped_weights,
    image_text,
    random_model,
    random_weights,
    refuses,
)
from tests.ranks import run_ranks


def test_each_rank_reads_only_its_own_bytes(tmp_path: Path) -> None:
    taken = run_ranks(bytes_read, 2, str(tmp_path))
    assert [rank["experts"] for rank in taken] == [taken[0]["all_experts"] // 2] * 2
    assert sum(rank["dense"] for rank in taken) == taken[0]["all_dense"]


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h+latent"])
def test_from_config_draws_every_shard_apart(family: str) -> None:
    layout = {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}
    ranks = run_ranks(random_model, 4, family, layout)
    first = ranks[0]
    assert first["on_meta"] == []
    assert all(4.0 < rank["loss"] < 6.0 for rank in ranks)  # ln(128) = 4.85
    # two ranks share a replica, up to the padding of odd sizes
    assert all(rank["local"] < 0.55 * first["total"] for rank in ranks)
    assert len(set(first["expert_sums"])) == len(first["expert_sums"])
    assert all(difference < 1e-6 for difference in first["buffers"].values())
    for name, (got, expected, numel) in first["spread"].items():
        if numel >= 1000:
            assert got == pytest.approx(expected, rel=0.2, abs=1e-3), name
    # ranks 0 and 2 hold the same shard of two replicas, as do 1 and 3
    assert ranks[0]["dense_shard_sum"] == ranks[2]["dense_shard_sum"]
    assert ranks[1]["dense_shard_sum"] == ranks[3]["dense_shard_sum"]
    assert ranks[0]["dense_shard_sum"] != ranks[1]["dense_shard_sum"]


def test_from_config_ties_embeddings_and_draws_what_a_parent_sets() -> None:
    for family, model in run_ranks(random_weights, 2, ["qwen3_moe", "qwen3_next"])[0].items():
        assert 4.0 < model["loss"] < 6.0, family  # ln(128) = 4.85
        assert model["tied"], family
        assert model["routers"], family
        for largest, std in model["routers"]:
            assert largest < 0.15, family
            assert std == pytest.approx(0.02, rel=0.2), family


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h+latent", "gpt_oss", "deepseek_v3"])
def test_selective_checkpointing_sends_nothing_again(family: str, tmp_path: Path) -> None:
    modes = run_ranks(checkpointed, 2, family, str(tmp_path))[0]
    exchanges = {mode: count for mode, (count, _) in modes.items()}
    assert exchanges["selective"] == exchanges["none"]
    assert exchanges["full"] > exchanges["none"]
    assert modes["full"][1] == 0.0
    assert modes["selective"][1] == 0.0


def test_dense_model_falls_back_to_fsdp(tmp_path: Path) -> None:
    result = run_ranks(dense_fallback, 2, str(tmp_path))[0]
    assert result["gradients"] < 1e-6
    assert result["sharded"]
    assert result["ep_size"] == 1


def test_bf16_is_as_near_to_fp32_as_plain_bf16(tmp_path: Path) -> None:
    families = ["qwen3_moe", "gpt_oss", "nemotron_h+latent", "deepseek_v3", "mixtral"]
    results = run_ranks(bf16_parity, 2, families, str(tmp_path))[0]
    for family, (sharded, plain) in results.items():
        assert sharded < 1.3 * plain + 1e-3, (family, sharded, plain)


def test_indivisible_experts_name_the_valid_sizes(tmp_path: Path) -> None:
    message = run_ranks(refuses, 2, str(tmp_path))[0]
    assert "9 experts" in message
    assert "[1]" in message


def test_weights_that_transformers_drops_are_written_back(tmp_path: Path) -> None:
    results = run_ranks(dropped_weights, 2, str(tmp_path))[0]
    assert results["nemotron_h"] == {"kept": ["mtp.layers.0.norm.weight"], "same": True}
    assert results["deepseek_v3"] == {"kept": ["model.layers.3.eh_proj.weight"], "same": True}


def test_image_text_to_text(tmp_path: Path) -> None:
    result = run_ranks(image_text, 2, str(tmp_path))[0]
    assert result["class"] == "Qwen3VLMoeForConditionalGeneration"
    assert result["logits"] < 1e-5
    assert result["same"]
