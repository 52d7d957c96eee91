"""A tiny random configuration for every mixture-of-experts family: the rows of the parity matrix.

A configuration is the family's own class with its sizes shrunk (`TINY`), and a few fields set by hand where the
family has something to keep: a dense layer before the sparse ones, a linear-attention or Mamba layer, a sliding
window, a latent. Names are model types of Transformers; `<model_type>+<what>` names a second form of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 128
HIDDEN = 32
EXPERTS = 8  # divisible by the 2, 4 and 8 ranks of the expert axis
TOP_K = 2

# Sizes by field name, used where the family's configuration has the field.
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # width and depth
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 6,
    # low-rank attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    # linear attention and Mamba
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # experts: each count under the four names it goes by
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_k": TOP_K,
    "moe_topk": TOP_K,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    # routing within groups, with a first dense layer
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # no randomness in the forward
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}


def tiny(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The family's configuration with the sizes of `TINY` where it has such a field, then `overrides`."""
    config_class = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in TINY.items() if name in fields} | overrides)


def composite(model_type: str, text_config: PretrainedConfig, **parts: Any) -> PretrainedConfig:
    """A multimodal configuration around a tiny text part; the causal-LM class builds the text part alone."""
    config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict({"text_config": text_config, **parts})
    return config


SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
MLA = {"num_key_value_heads": 4}  # low-rank attention expands to one key and value head a query head
# Attention over the `index_topk` keys that a small indexer picks; more keys than that stand in a row of 16 tokens.
INDEXER = {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 2}
QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [1],
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
}
GRANITE = {
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.25,
}
GEMMA4 = {
    "enable_moe_block": True,
    "top_k_experts": TOP_K,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    **SLIDING,
}
DOTS3_NOTE = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 16,
    "layer_types": ["indexed_attention", "sliding_attention"],
    "shared_experts_intermediate_size": 40,
    **MLA,
    **INDEXER,
}
INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 6,
    "d_rel": 4,
    "rel_extent": 8,
}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 8,
    "routed_scaling_factor": 2.5,
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "afmoe": lambda: tiny("afmoe", **SLIDING),
    "aria_text": lambda: tiny("aria_text"),
    "axk1": lambda: tiny("axk1", **DENSE_FIRST, **MLA),
    "axk2": lambda: tiny("axk2", gated_norm_rank=8, **DENSE_FIRST, **MLA, **INDEXER),
    "bailing_hybrid": lambda: tiny("bailing_hybrid", **LINEAR, **DENSE_FIRST, **MLA),
    "beam": lambda: tiny("beam", **SLIDING, **DENSE_FIRST),
    "cohere2_moe": lambda: tiny("cohere2_moe", num_shared_experts=1, **SLIDING, **DENSE_FIRST),
    "deepseek_v2": lambda: tiny("deepseek_v2", topk_method="group_limited_greedy", **MLA),
    "deepseek_v3": lambda: tiny("deepseek_v3", **MLA),
    "deepseek_v3+full_rank_q": lambda: tiny("deepseek_v3", q_lora_rank=None, **MLA),
    "deepseek_v32": lambda: tiny("deepseek_v32", **MLA, **INDEXER),
    "deepseek_v4": lambda: tiny(
        "deepseek_v4",
        num_hidden_layers=3,
        num_key_value_heads=1,
        layer_types=["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        partial_rotary_factor=0.5,
        o_groups=2,
        o_lora_rank=8,
        **INDEXER,
    ),
    "dots1": lambda: tiny("dots1"),
    "dots3_note": lambda: composite(
        "dots3_note",
        tiny("dots3_note_text", **DOTS3_NOTE),
        vision_config={"adapter_out_dim": HIDDEN},
        audio_config={"adapter_out_dim": HIDDEN},
    ),
    "dots3_note_text": lambda: tiny("dots3_note_text", **DOTS3_NOTE),
    "ernie4_5_moe": lambda: tiny("ernie4_5_moe", use_bias=True),
    "exaone_moe": lambda: tiny("exaone_moe", **SLIDING),
    "flex_olmo": lambda: tiny("flex_olmo"),
    "flint": lambda: tiny("flint", mlp_only_layers=[0], **SLIDING),
    "gemma4": lambda: composite("gemma4", tiny("gemma4_text", **GEMMA4)),
    "gemma4_text": lambda: tiny("gemma4_text", **GEMMA4),
    "glm4_moe": lambda: tiny("glm4_moe", use_qk_norm=True),
    "glm4_moe_lite": lambda: tiny("glm4_moe_lite", **MLA),
    "glm_moe_dsa": lambda: tiny("glm_moe_dsa", **MLA, **INDEXER),
    "gpt_oss": lambda: tiny("gpt_oss", **SLIDING),
    "granitemoe": lambda: tiny("granitemoe", **GRANITE),
    "granitemoe_swa": lambda: tiny("granitemoe_swa", shared_intermediate_size=40, **SLIDING, **GRANITE),
    "granitemoehybrid": lambda: tiny(
        "granitemoehybrid",
        **LINEAR,
        mamba_n_heads=4,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
        shared_intermediate_size=40,
        **GRANITE,
    ),
    "granitemoeshared": lambda: tiny("granitemoeshared", shared_intermediate_size=40, **GRANITE),
    "hunyuan_v1_moe": lambda: tiny("hunyuan_v1_moe"),
    "hy_v3": lambda: tiny("hy_v3"),
    "hy_v4": lambda: tiny("hy_v4", indexer_types=["full", "shared"], **MLA, **INDEXER),
    "inkling2_text": lambda: tiny(
        "inkling2_text", layer_types=["hybrid_sliding", "hybrid"], unpadded_vocab_size=VOCAB, **INKLING
    ),
    "inkling_text": lambda: tiny(
        "inkling_text",
        num_hidden_layers=3,
        local_layer_ids=[0],
        dense_mlp_idx=1,
        logits_mup_width_multiplier=2.0,
        **INKLING,
    ),
    "jamba": lambda: tiny("jamba", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
    "kimi_linear": lambda: tiny("kimi_linear", linear_head_dim=16, linear_num_heads=4, **LINEAR, **MLA),
    "kolibri1": lambda: tiny("kolibri1", **SLIDING),
    "laguna": lambda: tiny("laguna", **SLIDING),
    "lfm2_moe": lambda: tiny("lfm2_moe", num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "mellum": lambda: tiny("mellum", **SLIDING),
    "mimo_v2_flash": lambda: tiny("mimo_v2_flash", **SLIDING),
    "minimax": lambda: tiny("minimax", **LINEAR, block_size=8),
    "minimax_m2": lambda: tiny("minimax_m2"),
    "minimax_m3_vl_text": lambda: tiny(
        "minimax_m3_vl_text",
        dense_intermediate_size=48,
        shared_intermediate_size=40,
        rotary_dim=8,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=2,
        layer_types=["full_attention", "minimax_m3_sparse"],
        **DENSE_FIRST,
    ),
    "mixtral": lambda: tiny("mixtral"),
    "nemotron_h": lambda: tiny("nemotron_h", **NEMOTRON_H),
    "nemotron_h+latent": lambda: tiny("nemotron_h", moe_latent_size=16, **NEMOTRON_H),
    "olmoe": lambda: tiny("olmoe"),
    "phimoe": lambda: tiny("phimoe", router_jitter_noise=0.2),
    "qwen2_moe": lambda: tiny("qwen2_moe", mlp_only_layers=[0], num_hidden_layers=3),
    "qwen3_5_moe": lambda: composite("qwen3_5_moe", tiny("qwen3_5_moe_text", **LINEAR)),
    "qwen3_5_moe_text": lambda: tiny("qwen3_5_moe_text", **LINEAR),
    "qwen3_moe": lambda: tiny("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=3, head_dim=16),
    "qwen3_next": lambda: tiny("qwen3_next", **LINEAR),
    "qwen4_exp": lambda: composite("qwen4_exp", tiny("qwen4_exp_text", **QWEN4)),
    "qwen4_exp_text": lambda: tiny("qwen4_exp_text", **QWEN4),
    "solar_open": lambda: tiny("solar_open"),
    "zaya": lambda: tiny("zaya", num_experts_per_tok=1, router_hidden_size=16),
}


# Families whose router samples experts at random in training mode: their models stay in evaluation mode.
SAMPLED_ROUTING = frozenset({"phimoe"})


def build(family: str, seed: int = 0, **from_config: Any) -> PreTrainedModel:
    """The family's tiny model in fp32, in training mode (see `SAMPLED_ROUTING`), its weights a function of `seed`.

    Transformers starts biases at 0, norms at 1 and routers near 0. Here every parameter and every correction bias
    matters to the loss, so that no gradient is trivially zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32, **from_config)
        randomize(model)
    return model.eval() if family in SAMPLED_ROUTING else model.train()


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Draw matrices and decay rates anew, and move vectors and correction biases away from their initial values."""
    for name, parameter in model.named_parameters():
        # Zaya's three-layer router and hyper-connections ("hc") hardly tell one token from another at 0.1: all tokens
        # choose one expert, and gradients of 1e-5 of their neighbours' drown in rounding.
        std = 0.3 if "router_mlp" in name else 0.2 if "hc" in name else 0.1
        # Decay rates start as log(1..16): states that vanish within a token, and gradients with them.
        if parameter.ndim > 1 or name.endswith("A_log"):
            parameter.normal_(std=std)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=std)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # experts by token id, all 0 until loaded: draw distinct ones for each token
            buffer.copy_(torch.rand(len(buffer), EXPERTS).argsort(dim=-1)[:, : buffer.shape[1]])
        elif "bias" in name:
            noise = torch.randn_like(buffer)
            if name.endswith("balancing_biases"):
                noise[-1] = 0  # zaya's last one, "skip the experts", is set to -1 again by every load
            buffer.add_(noise, alpha=0.03)


def batch(seed: int, rows: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """Random tokens as `input_ids` and `labels`, int64 [rows, length]; special tokens 0 to 2 are left out."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (rows, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}
