"""The published models whose shapes are measured, as Transformers configurations, and tiny ones of the same families.

Sizes are those of the models' own `config.json` on the Hugging Face hub: Qwen/Qwen3-30B-A3B, Qwen/Qwen3-235B-A22B,
nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16, openai/gpt-oss-20b, openai/gpt-oss-120b, deepseek-ai/DeepSeek-V3. A test
holds the number of parameters that they give against the published one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_experts_per_tok": 4, "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": QWEN3 | {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "intermediate_size": 6144,
        "moe_intermediate_size": 768,
    },
    "qwen3-235b-a22b": QWEN3 | {
        "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
    },
    "nemotron-3-nano-30b-a3b": {
        "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 2688,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 1856,
        "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4,
        "chunk_size": 128, "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        "max_position_embeddings": 262144,
    },
    "gpt-oss-20b": GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "deepseek-v3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 18432,
        "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
        "norm_topk_prob": True, "max_position_embeddings": 163840,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
        },
    },
    "tiny": TINY | {"model_type": "qwen3_moe", "num_experts": 8},
    "tiny-gpt-oss": TINY | {
        "model_type": "gpt_oss", "intermediate_size": 32, "num_local_experts": 8, "sliding_window": 16
    },
    "tiny-nemotron-h": TINY | {
        "model_type": "nemotron_h", "hybrid_override_pattern": "ME*E", "n_routed_experts": 8, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 32,
        "moe_shared_expert_intermediate_size": 64,
    },
    "tiny-deepseek-v3": TINY | {
        "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8, "first_k_dense_replace": 1,
        "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
    },
}  # fmt: skip
"""Mappings of configurations; the `tiny` ones are for a look on a CPU."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


_NEMOTRON_3: dict[str, Any] = {
    "model_type": "nemotron_h", "vocab_size": 131072, "num_key_value_heads": 2, "head_dim": 128,
    "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "chunk_size": 128,
    "n_routed_experts": 512, "num_experts_per_tok": 22, "routed_scaling_factor": 5.0, "norm_topk_prob": True,
}  # fmt: skip

LARGE: dict[str, dict[str, Any]] = {
    "nemotron-3-super-120b-a12b": _NEMOTRON_3 | {
        "hidden_size": 4096, "num_attention_heads": 32, "mamba_num_heads": 128, "moe_latent_size": 1024,
        "moe_intermediate_size": 2688, "moe_shared_expert_intermediate_size": 5376,
        "hybrid_override_pattern":
            "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    },
    "nemotron-3-ultra-550b-a55b": _NEMOTRON_3 | {
        "hidden_size": 8192, "num_attention_heads": 64, "mamba_num_heads": 256, "moe_latent_size": 2048,
        "moe_intermediate_size": 5120, "moe_shared_expert_intermediate_size": 10240,
        "max_position_embeddings": 1048576,
        "hybrid_override_pattern":
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    },
}  # fmt: skip
"""Models that need many nodes, to plan with and to launch: nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16 and
-Ultra-550B-A55B-BF16. Their layers for multi-token prediction are left out, as Transformers leaves them out."""


@dataclass(frozen=True)
class LayerShape:
    """One rank's expert layer: `num_experts` are those on this rank, and each token chooses `top_k` of them."""

    model: str
    tokens: int
    top_k: int
    num_experts: int
    hidden: int
    intermediate: int


def find_shape(name: str) -> dict[str, Any]:
    """The mapping called `name`. Raises ValueError, with the nearest names, where there is none."""
    if name in SHAPES:
        return SHAPES[name]
    raise ValueError(f"unknown model {name!r}{nearest(name, SHAPES)} There are {', '.join(SHAPES)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence on an unknown name: those that are like it, if any."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else "."


def count_experts(name: str) -> int:
    """Experts of each layer of the model called `name`."""
    shape = find_shape(name)
    return int(next(shape[key] for key in _EXPERTS if key in shape))


def model_config(name: str, layers: int | None = None, num_experts: int | None = None) -> PreTrainedConfig:
    """Transformers' configuration of the model called `name`.

    Args:
        layers: keep only so many, the first.
        num_experts: of each layer, instead of the model's own.

    Raises:
        ValueError: an unknown model, or more layers than it has.
    """
    from transformers import AutoConfig

    shape = dict(find_shape(name))
    pattern = shape.get("hybrid_override_pattern")
    has = len(pattern) if pattern else shape["num_hidden_layers"]
    if layers is not None and not 0 < layers <= has:
        raise ValueError(f"--layers {layers}: {name} has {has} layers; choose 1 to {has}")
    if pattern:
        shape["hybrid_override_pattern"] = pattern[:layers]
        shape.pop("num_hidden_layers", None)
    else:
        shape["num_hidden_layers"] = layers or has
    if num_experts is not None:
        shape |= {key: num_experts for key in _EXPERTS if key in shape}
    config: PreTrainedConfig = AutoConfig.for_model(**shape)
    return config


def layer_shape(name: str, tokens: int = 4096) -> LayerShape:
    """The expert layer of a model, whole or one of N ranks' (`qwen3-30b-a3b-ep8`: 8 ranks share the experts).

    Raises:
        ValueError: an unknown model, or ranks that cannot share its experts evenly.
    """
    model, _, number = name.rpartition("-ep")
    model, ranks = (model, int(number)) if model and number.isdecimal() else (name, 1)
    shape, experts = find_shape(model), count_experts(model)
    if experts % ranks:
        raise ValueError(f"{name}: {ranks} ranks cannot share {experts} experts evenly")
    return LayerShape(
        model=model,
        tokens=tokens,
        top_k=shape["num_experts_per_tok"],
        num_experts=experts // ranks,
        hidden=shape["hidden_size"],
        intermediate=shape["intermediate_size" if shape["model_type"] == "gpt_oss" else "moe_intermediate_size"],
    )


def experts_module(shape: LayerShape, device: str = "cuda") -> Any:
    """Transformers' own experts module of the shape, bf16, random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from moetrain.families import experts_modules

    config = model_config(shape.model, num_experts=shape.num_experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation="grouped_mm", attn_implementation="eager"
        )
    module = experts_modules(model)[0][1].to_empty(device=device)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module
