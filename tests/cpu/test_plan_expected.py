"""The quick figure for dashboards, held against the plan."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from transformers import AutoConfig

from moetrain.bench.shapes import SHAPES
from moetrain.config import RunConfig, parse_config
from moetrain.plan import expected_tokens_per_second, monitored
from moetrain.plan.expected import known_gpu
from moetrain.plan.layout import Layout
from moetrain.plan.monitored import expect
from moetrain.plan.search import Machine, Planner
from tests.families import FAMILIES


def run_of(path: str, **sections: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {
        **{"output_dir": "plan", "model": {"path": path}, "train": {"steps": 1}},
        "data": {"train": [{"path": "python:stdlib"}]},
    }
    return parse_config(raw | {name: raw.get(name, {}) | values for name, values in sections.items()})


EAGER = {"train": {"compile": "off", "cuda_graph": "off"}, "model": {"dispatch": "alltoall"}}


@pytest.mark.parametrize(
    ("name", "world", "ep", "sections"),
    [
        ("qwen3-30b-a3b", 4, 4, {"data": {"packing": False}}),
        ("qwen3-30b-a3b", 8, 8, {"model": {"activation_checkpointing": "full"}, "data": {"batch_size": 2}}),
        ("qwen3-30b-a3b", 8, 8, EAGER),
        ("nemotron-3-nano-30b-a3b", 8, 8, {}),
        ("gpt-oss-20b", 16, 4, {"parallel": {"dp_replicate_size": 2}, "train": {"grad_accum": 4}}),
        ("deepseek-v3", 256, 64, {}),
    ],
)
def test_it_is_near_the_plan(name: str, world: int, ep: int, sections: dict[str, dict[str, Any]]) -> None:
    parallel = {"ep_size": ep} | sections.get("parallel", {})
    config = run_of(name, **sections | {"parallel": parallel})
    nodes = -(-world // 8)
    planner = Planner(config, Machine(nodes, world // nodes, "h200"))
    layout = Layout(nodes, world // nodes, ep, config.parallel.dp_replicate_size)
    planned = planner.evaluate(layout, config.data.batch_size, config.model.activation_checkpointing)
    found = expected_tokens_per_second(config, AutoConfig.for_model(**SHAPES[name]), "NVIDIA H200", world)
    assert found == pytest.approx(planned.time.tokens_per_second, rel=0.08)


def test_operations_of_dense_models_are_counted() -> None:
    """By hand: projections, MLP and head six times, scores and values of half the positions."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = run_of("dense", data={"seq_len": 32})
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96) + 64 * 100
    for tied in (False, True):
        dense = AutoConfig.for_model("qwen3", **sizes, **heads, tie_word_embeddings=tied)
        found = expect(config, dense, "cpu", 1).flops_per_token
        assert found == 6 * weights + 2 * 6 * 4 * 32 * 16


def test_where_attention_cannot_be_read_the_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: Any) -> float:
        raise AttributeError("head_dim")

    monkeypatch.setattr(monitored, "flop_per_token", unreadable)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    dense = AutoConfig.for_model("qwen3", **sizes, **heads)
    weights = 4 * 64 * 64 + 3 * 64 * 96 + 64 * 100
    assert expect(run_of("dense"), dense, "cpu", 1).flops_per_token == 6 * weights
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    moe = AutoConfig.for_model("qwen3_moe", **sizes, **heads, **experts)
    assert math.isnan(expect(run_of("moe"), moe, "cpu", 1).flops_per_token)


def test_it_takes_little_time() -> None:
    config = run_of("qwen3-30b-a3b", parallel={"ep_size": 8})
    model_config = AutoConfig.for_model(**SHAPES["qwen3-30b-a3b"])
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        assert expected_tokens_per_second(config, model_config, "h200", 8)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.15


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_has_a_figure_or_none_for_every_family(family: str) -> None:
    found = expected_tokens_per_second(run_of("tiny", parallel={"ep_size": 2}), FAMILIES[family](), "h200", 8)
    assert found is None or found > 0
    if family in ("qwen3_moe", "mixtral", "nemotron_h", "deepseek_v3", "gpt_oss", "granitemoe"):
        assert found is not None


@pytest.mark.parametrize(
    ("gpu", "world", "ep"),
    [("NVIDIA RTX 4090", 8, 2), ("cpu", 8, 2), ("h200", 0, 1), ("h200", 12, 2), ("h200", 8, 3), ("h200", 16, 16)],
)
def test_where_no_plan_can_be_made_there_is_none(gpu: str, world: int, ep: int) -> None:
    config = run_of("tiny", parallel={"ep_size": ep}, model={"dispatch": "nvlink"} if ep == 16 else {})
    assert expected_tokens_per_second(config, FAMILIES["qwen3_moe"](), gpu, world) is None


def test_a_configuration_of_something_else_is_none() -> None:
    wrong: Any = object()
    assert expected_tokens_per_second(run_of("tiny"), wrong, "h200", 8) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb"), ("NVIDIA B200", "b200"),
        ("h100-80gb", "h100-80gb"), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA A100-SXM4", None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_names_that_cuda_gives(name: str, key: str | None) -> None:
    assert known_gpu(name) == key
