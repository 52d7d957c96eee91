"""The families: what is found in Transformers, the tiny models of the parity matrix, and the plans made for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from moetrain import families
from moetrain.families import decorated_families, ep_plan, experts_modules, fallback_reason, fsdp_plan, is_moe
from moetrain.mesh import check_ep_divides
from tests.families import FAMILIES, VOCAB, batch, build, tiny

TOLERANCE = 1e-5
# Trained by no loss: the top-k of an indexer has no gradient, and a correction bias only chooses experts.
WITHOUT_GRADIENT = (".indexer.", "e_score_correction_bias", "expert_bias")
UNDECORATED: dict[str, dict[str, Any]] = {
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"rope_theta": 1e4}},
    "doge": {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 16, "num_experts_per_tok": 2, "is_moe": True},
    "jetmoe": {"hidden_size": 32, "num_hidden_layers": 2, "num_local_experts": 4, "intermediate_size": 32},
    "llama4_text": {"hidden_size": 32, "num_hidden_layers": 2, "num_local_experts": 4, "intermediate_size": 32},
    "longcat_flash": {"hidden_size": 32, "num_layers": 1, "n_routed_experts": 4, "ffn_hidden_size": 32},
    "nllb-moe": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_experts": 4, "encoder_sparse_step": 1},
    "step3p7": {"text_config": {"hidden_size": 32, "num_hidden_layers": 4, "n_routed_experts": 4}},
    "switch_transformers": {"d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "num_experts": 4, "d_ff": 32},
}


def on_meta(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(FAMILIES[family]())


def stored_keys(folder: Path) -> set[str]:
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            keys |= set(reader.keys())
    return keys


def gradients(model: PreTrainedModel) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(**batch(1), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_every_causal_lm_with_decorated_experts_has_a_tiny_configuration() -> None:
    """A new version of Transformers with a new family fails here until the family is added to the matrix."""
    assert {name.partition("+")[0] for name in FAMILIES} == set(decorated_families().causal_lm)


def test_families_are_found_without_importing_a_model() -> None:
    decorated_families.cache_clear()
    before = set(sys.modules)
    found = decorated_families()
    assert not [name for name in set(sys.modules) - before if ".modeling_" in name]
    assert found.causal_lm["qwen3_moe"] == "Qwen3MoeForCausalLM"
    assert found.image_text_to_text["mistral4"] == "Mistral4ForCausalLM"
    assert found.unreachable == ("openai_privacy_filter",)
    named = {*found.causal_lm, *found.image_text_to_text, *found.unreachable}
    assert not named & {"llama", "qwen3", *UNDECORATED}


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_trains_in_plain_transformers(family: str) -> None:
    """Every parameter has a gradient, eager and grouped_mm agree, and a step against the gradient lowers the loss."""
    model = build(family, experts_implementation="eager")
    loss, eager = gradients(model)
    grouped_loss, grouped = gradients(build(family, experts_implementation="grouped_mm"))
    assert loss == pytest.approx(grouped_loss, rel=TOLERANCE)
    largest = max(gradient.abs().max() for gradient in eager.values())
    for name, _ in model.named_parameters():
        if name not in eager:
            assert any(part in name for part in WITHOUT_GRADIENT), f"{name} has no gradient"
            continue
        # deepseek_v4 has scalars whose gradient sums terms 300 times its size: compared on the scale of the others
        scale = max(eager[name].abs().max(), 1e-2 * largest)
        assert eager[name].any(), f"the gradient of {name} is zero"
        assert (eager[name] - grouped[name]).abs().max() / scale < TOLERANCE, name
    with torch.no_grad():
        squared_norm = torch.stack([gradient.square().sum() for gradient in eager.values()]).sum()
        for name, parameter in model.named_parameters():
            if name in eager:
                # to first order the loss falls by 1e-3; larger steps send tokens to other experts
                parameter.sub_(1e-3 * eager[name] / squared_norm)
        after = model(**batch(1), use_cache=False).loss.item()
    assert after == pytest.approx(loss - 1e-3, abs=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_survives_saving_and_loading(family: str, tmp_path: Path) -> None:
    model = build(family, seed=1)
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    again.save_pretrained(tmp_path / "second")
    assert stored_keys(tmp_path / "first") == stored_keys(tmp_path / "second")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_cover_the_model(family: str) -> None:
    model = on_meta(family)
    experts = {
        f"{replace_layer_number_by_wildcard(module)}.{name}"
        for module, part in experts_modules(model)
        for name, _ in part.named_parameters()
    }
    plan = ep_plan(model)
    assert experts
    assert {name for name, style in plan.items() if style == "grouped_gemm"} == experts
    own = {name: style for name, style in model.ep_plan.items() if style in set(plan.values())}
    assert plan == own, "differs from the plan of Transformers"

    names = {replace_layer_number_by_wildcard(name) for name, _ in model.named_modules()}
    plan = fsdp_plan(model)
    assert plan.keys() <= names
    root = [name for name, _ in model.named_parameters() if not any(under(name, rule) for rule in plan)]
    # a norm and the head are kept together, or the head is in the root group, which is kept too
    kept = [name for name, style in plan.items() if style == "keep_full_weight"]
    paired = any(name.split(".")[-1] == "norm" for name in kept)
    assert ("lm_head" in kept) == paired and len(kept) == 1 + paired
    # nothing else as large as an embedding or a layer is left to the root group
    assert all(model.get_parameter(name).numel() < 40 * 32 for name in root if name != "lm_head.weight"), root


def under(name: str, rule: str) -> bool:
    return f"{replace_layer_number_by_wildcard(name)}.".startswith(f"{rule}.")


def test_fsdp_plan_of_a_family_with_names_of_its_own() -> None:
    assert fsdp_plan(on_meta("nemotron_h")) == {
        "model.embeddings": "free_full_weight",
        "model.layers.*": "free_full_weight",
        "model.norm_f": "keep_full_weight",
    }
    qwen = on_meta("qwen3_moe")
    assert fsdp_plan(qwen) == qwen.fsdp_plan


def test_ep_plan_leaves_out_rules_for_dense_parts() -> None:
    gemma = on_meta("gemma4_text")
    assert gemma.ep_plan["model.layers.*.mlp.gate_proj"] == "colwise"
    assert ep_plan(gemma) == {
        "model.layers.*.experts.gate_up_proj": "grouped_gemm",
        "model.layers.*.experts.down_proj": "grouped_gemm",
        "model.layers.*.experts": "ep_dispatch_experts",
    }


def test_ep_plan_refuses_a_parameter_that_is_not_stacked_by_expert() -> None:
    model = on_meta("qwen3_moe")
    name, experts = experts_modules(model)[0]
    experts.scale = nn.Parameter(torch.empty(3, 8, device="meta"))
    with pytest.raises(ValueError, match=rf"{name}\.scale has shape \(3, 8\).*8 experts"):
        ep_plan(model)


@pytest.mark.parametrize("model_type", UNDECORATED)
def test_undecorated_mixtures_fall_back(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](**UNDECORATED[model_type])
    assert is_moe(config)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert experts_modules(model) == [] and ep_plan(model) == {}
    reason = fallback_reason(model)
    assert reason is not None and model_type in reason and "does not decorate" in reason


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, intermediate_size=32),
        tiny("gemma4_text", enable_moe_block=False, vocab_size_per_layer_input=VOCAB),
        tiny("granitemoehybrid", num_local_experts=0, layer_types=["full_attention"] * 2, mamba_n_heads=4),
        tiny("qwen3_moe", mlp_only_layers=[0, 1], num_experts=0),
    ],
    ids=lambda config: config.model_type,
)
def test_dense_models_fall_back(config: PretrainedConfig) -> None:
    assert not is_moe(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    reason = fallback_reason(model)
    assert reason is not None and config.model_type in reason and "dense" in reason
    plan = fsdp_plan(model)
    assert {"model.embed_tokens", "model.layers.*", "model.norm", "lm_head"} <= plan.keys()


def test_families_with_decorated_experts_need_no_fallback() -> None:
    for family in ("qwen3_moe", "jamba", "gemma4", "dots3_note"):
        model = on_meta(family)
        assert is_moe(model.config) and fallback_reason(model) is None


def test_unsupported_family_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES["dots3_note"]()
    families.check_supported(config)
    monkeypatch.setitem(families.UNSUPPORTED, "dots3_note_text", "its experts are asleep.")
    with pytest.raises(ValueError, match=r"'dots3_note_text'.*its experts are asleep\."):
        families.check_supported(config)
    families.check_supported(FAMILIES["mixtral"]())


def test_time_steps_of_nemotron_h_follow_the_configuration() -> None:
    """Steps of about 1e-6: clamped from below to 1e-3 as built, free after the correction."""
    model = build("nemotron_h")
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        mixer.dt_bias.fill_(-14)
        before = model(**batch(1), use_cache=False).loss.item()
        families.correct_after_load(model)
        after = model(**batch(1), use_cache=False).loss.item()
    assert mixer.time_step_limit == tuple(model.config.time_step_limit) == (0.0, float("inf"))
    assert before != after


def test_more_ranks_than_experts_names_the_replicas() -> None:
    check_ep_divides(8, 8, 8)
    check_ep_divides(2, 1, 4)  # without expert parallelism the experts' matrices are sharded, not their number
    with pytest.raises(ValueError, match=r"2 experts cannot be spread over the 4 ranks .* dp_replicate_size to 2"):
        check_ep_divides(2, 2, 4)
