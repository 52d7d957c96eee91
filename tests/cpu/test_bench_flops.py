"""Operations that the benchmark counts: by hand, beside NVIDIA's, beside torch's count of a forward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from moetrain.bench.attention import CASES, document_lengths, visible_pairs
from moetrain.bench.flops import flop_per_token
from moetrain.bench.shapes import model_config
from moetrain.kernels.attention import visible_keys


def test_flop_of_qwen3_by_hand() -> None:
    """NVIDIA's formula (NeMo AutoModel's flops_utils.py), and the router that it leaves out."""
    h, layers, s, heads, kv, hd, inter, top_k, vocab, experts = 2048, 48, 4096, 32, 4, 128, 768, 8, 151936, 128
    attention = 6 * layers * h**2 * (hd * heads / h) * ((kv / heads * 2 + 1) + (s / h * 2 * 0.5) + 1)
    theirs = attention + 6 * layers * h * 3 * inter * top_k + 6 * h * vocab
    assert theirs == pytest.approx(23.006e9, rel=1e-4)
    ours = flop_per_token(model_config("qwen3-30b-a3b"), s)
    assert ours == pytest.approx(theirs + 6 * layers * h * experts, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "gflop", "tolerance"),
    [
        ("gpt-oss-20b", 22.91, 0.005),
        ("gpt-oss-120b", 32.63, 0.005),
        ("deepseek-v3", 249.6, 0.005),
        # theirs counts attention at the hidden size, 2,688, for heads of 4,096 in all
        ("nemotron-3-nano-30b-a3b", 19.72 + 6 * 6 * 1408 * (2 * 2688 + 4096) / 1e9, 0.005),
    ],
)
def test_flop_beside_nvidias(name: str, gflop: float, tolerance: float) -> None:
    assert flop_per_token(model_config(name), 4096) / 1e9 == pytest.approx(gflop, rel=tolerance)


@pytest.mark.parametrize("name", ["tiny", "tiny-gpt-oss", "tiny-deepseek-v3"])
def test_flop_beside_a_counted_forward(name: str) -> None:
    """torch counts the products of a forward, whole score matrices and all; ours count the half, or the window."""
    config, length = model_config(name), 48
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(config.vocab_size, (1, length)), use_cache=False)
    widths = getattr(config, "qk_head_dim", config.head_dim) + getattr(config, "v_head_dim", config.head_dim)
    counted = counter.get_total_flops() / length
    for layer in range(config.num_hidden_layers):
        window = 16 if name == "tiny-gpt-oss" and layer == 0 else length
        keys = window - window**2 / (2 * length)
        counted -= 2 * config.num_attention_heads * widths * (length - keys)
    rotary = 2 * config.head_dim // 2  # positions by frequencies is a product too
    assert flop_per_token(config, length) / 3 == pytest.approx(counted, abs=rotary)


@pytest.mark.parametrize("name", CASES)
def test_operations_that_the_benchmark_counts(name: str) -> None:
    shape = dataclasses.replace(CASES[name], window=CASES[name].window and 20, document=CASES[name].document and 16)
    lengths = document_lengths(shape, 64)
    assert all(sum(row) == 64 and min(row) > 0 for row in lengths)
    documents = torch.tensor([0, *(length for row in lengths for length in row)], dtype=torch.int32).cumsum(0)
    seen = visible_keys(shape.rows, 64, shape.window, documents.int(), torch.device("cpu"))
    assert visible_pairs(lengths, shape.window) == seen.sum()
