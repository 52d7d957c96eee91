"""Floating-point operations of a training step, as NVIDIA's published throughputs count them.

Forward and backward are three times the forward: 6 for each weight that multiplies a token (2 a multiply-add; Kaplan
et al., arXiv 2001.08361, section 2.1). Causal attention counts the half of the score matrix that is used, a window
only its keys; recomputation counts nothing. A Mamba-2 scan is 21 for each of the inner channels' states, as in NVIDIA
NeMo AutoModel's `components/utils/flops_utils.py`. Qwen3-30B-A3B at 4,096 tokens has 23.1 GFLOP a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moetrain.families import experts_modules, top_k_of

BF16_TFLOP_PER_S = 790.0
"""A large bf16 product on one H100 or H200 (8192^3, measured); the data sheet's 989 is out of reach at its power."""


def flop_per_token(config: PreTrainedConfig, seq_len: int) -> float:
    """Forward, loss and backward of one token in a sequence of `seq_len`.

    Counted on the modules that Transformers builds from the configuration, on the meta device.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    modules: list[Any] = list(model.modules())
    top_k = top_k_of(config.get_text_config()) if experts_modules(model) else 0
    attention = [module for module in modules if hasattr(module, "is_causal") and hasattr(module, "layer_idx")]
    scans = [module for module in modules if hasattr(module, "ssm_state_size")]
    flop = 6.0 * active_weights(model, top_k)
    flop += sum(_scores_and_values(module, seq_len) for module in attention)
    flop += sum(21.0 * module.intermediate_size * module.ssm_state_size for module in scans)
    return float(flop)


def active_weights(model: Any, top_k: int) -> float:
    """Weights that multiply a token: all matrices but the embeddings, and of the experts those that it chooses."""
    modules: list[tuple[str, Any]] = experts_modules(model)
    experts = {module: module.num_experts for _, module in modules}
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and not name.endswith("bias"):
                total += parameter.numel() * (top_k / experts[module] if module in experts else 1.0)
    return total


def _scores_and_values(attention: Any, seq_len: int) -> float:
    """Queries by keys, and probabilities by values, over the keys that a token sees on average."""
    window = min(getattr(attention, "sliding_window", None) or seq_len, seq_len)
    keys = window - window**2 / (2 * seq_len)
    # multi-head latent attention (DeepSeek) has wider keys than values
    key_width = getattr(attention, "qk_head_dim", None) or attention.head_dim
    value_width = getattr(attention, "v_head_dim", None) or attention.head_dim
    heads: int = attention.config.num_attention_heads
    return float(6 * heads * (key_width + value_width) * keys)


def peak_tflops(device: torch.device) -> float | None:
    """The rate that shares are of: `BF16_TFLOP_PER_S` on an H100 or H200, an 8192^3 product timed now on other GPUs,
    None on a CPU."""
    if device.type != "cuda":
        return None
    if any(name in torch.cuda.get_device_name(device) for name in ("H100", "H200")):
        return BF16_TFLOP_PER_S
    from moetrain.bench.kernels import measure_gemm

    return measure_gemm()[1]
