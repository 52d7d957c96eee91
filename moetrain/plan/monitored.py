"""What monitoring holds a run against."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

from moetrain.bench.flops import flop_per_token
from moetrain.config import RunConfig
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
        flops_per_token=_flops(model_config, config.data.seq_len),
        peak_flops=GPUS[kind].bf16_tflops * 1e12 if kind else math.nan,
    )


def _flops(model_config: PreTrainedConfig, seq_len: int) -> float:
    try:
        return flop_per_token(model_config, seq_len)
    except AttributeError:  # a dense model has no number of experts a token
        return math.nan
