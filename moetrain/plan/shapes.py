"""The model of a plan: from a run's configuration, a directory, a hub id or a published shape; never its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moetrain.auto import AutoModelForCausalLM
from moetrain.bench.shapes import SHAPES
from moetrain.config import ModelConfig
from moetrain.create import load_model_config, new_config
from moetrain.prepare import DTYPES

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
        "hybrid_override_pattern":
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    },
}  # fmt: skip
"""Beside `moetrain.bench.shapes`, models that need many nodes: nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16 and
-Ultra-550B-A55B-BF16. Their layers for multi-token prediction are left out, as Transformers leaves them out."""


def find_config(model: ModelConfig) -> PreTrainedConfig:
    """The Transformers configuration that `model.path` or `model.create` names; of a hub id, `config.json` is fetched.

    Raises:
        ValueError: there is none; the message lists the shapes that are known by name.
    """
    path = Path(model.path).expanduser()
    if model.create is not None and not (path / "config.json").is_file():
        return new_config(model.create, vocab_size=model.create.vocab_size)
    if shape := (SHAPES | LARGE).get(model.path):
        config: PreTrainedConfig = AutoConfig.for_model(**shape)
        return config
    try:
        return load_model_config(path, model)
    except ValueError as error:
        names = ", ".join(sorted(SHAPES | LARGE))
        raise ValueError(f"{error}\nA plan needs a config.json alone. Known without one: {names}") from error


def meta_builder(config: PreTrainedConfig, model: ModelConfig) -> Callable[[], PreTrainedModel]:
    """Makes the model on the meta device, each time anew, through the class that training uses.

    Flash attention needs its package to be made; `sdpa` keeps the same for the backward.
    """
    attention = model.attn_implementation
    kwargs: dict[str, Any] = {"dtype": DTYPES[model.dtype], "trust_remote_code": model.trust_remote_code}
    if attention is not None:
        kwargs["attn_implementation"] = "sdpa" if "flash" in attention else attention
    if model.experts != "auto":
        kwargs["experts_implementation"] = model.experts

    def build() -> PreTrainedModel:
        with torch.device("meta"):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(config, **kwargs)
        return made

    return build
