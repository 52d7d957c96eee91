"""What monitoring holds a run against."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

from moetrain.bench.flops import active_weights, flop_per_token
from moetrain.config import RunConfig
from moetrain.create import meta_model
from moetrain.families import experts_modules
from moetrain.metrics import Expectation
from moetrain.plan.constants import GPUS
from moetrain.plan.expected import expected_tokens_per_second, known_gpu


def expect(config: RunConfig, model_config: PreTrainedConfig, gpu: str, world_size: int) -> Expectation:
    """Throughput by the plan, operations of a token, and the GPU's peak; NaN where one is not known.

    Args:
        gpu: the name that CUDA gives; any other for none.
        world_size: ranks.
    """
    kind = known_gpu(gpu)
    return Expectation(
        tokens_per_second_per_gpu=expected_tokens_per_second(config, model_config, gpu, world_size) or math.nan,
        flops_per_token=_flops(config, model_config),
        peak_flops=GPUS[kind].bf16_tflops * 1e12 if kind else math.nan,
    )


def _flops(config: RunConfig, model_config: PreTrainedConfig) -> float:
    """As benchmarks count them; where attention is of a kind that they cannot read, six for each weight of a matrix."""
    try:
        return flop_per_token(model_config, config.data.seq_len)
    except (AttributeError, LookupError, ValueError):
        model = meta_model(model_config, config.model)
    if experts_modules(model):
        return math.nan  # nobody knows how many of them a token takes
    return 6.0 * active_weights(model, top_k=0)
