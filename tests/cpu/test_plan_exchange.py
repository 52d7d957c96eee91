"""Dispatch in a plan: ranks that a token goes to, bytes sent, buffers, and which dispatcher a layout gets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from moetrain.bench.shapes import SHAPES
from moetrain.config import ModelConfig
from moetrain.graph import MARGIN, STACK_MARGIN
from moetrain.moe.dispatch import DISPATCHERS as NAMES
from moetrain.moe.router import sequential_gate
from moetrain.plan import plan_run
from moetrain.plan.exchange import Balance, buffer_bytes, distinct_ranks, sent_bytes
from moetrain.plan.layout import Layout
from moetrain.plan.search import dispatch_of, rows_over_mean
from moetrain.plan.shapes import meta_builder
from moetrain.plan.spread import DISPATCHERS
from moetrain.plan.trace import Step, trace_step
from tests.plan_helpers import QWEN_LAYER, run_of


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(8, 2, 4), (6, 3, 2), (8, 3, 8), (9, 9, 3)])
def test_distinct_ranks_by_counting(experts: int, top_k: int, ranks: int) -> None:
    chosen = list(itertools.combinations(range(experts), top_k))
    mean = sum(len({expert // (experts // ranks) for expert in choice}) for choice in chosen) / len(chosen)
    layer = QWEN_LAYER._replace(num_experts=experts, top_k=top_k)
    assert distinct_ranks(layer, ranks) == pytest.approx(mean)


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(128, 8, 8), (16, 8, 4), (32, 4, 2)])
def test_neighbouring_experts_are_on_few_ranks(experts: int, top_k: int, ranks: int) -> None:
    ids = sequential_gate(torch.zeros(experts, top_k, dtype=torch.int64), experts)
    mean = sum(len(set((choice // (experts // ranks)).tolist())) for choice in ids) / len(ids)
    layer = QWEN_LAYER._replace(num_experts=experts, top_k=top_k)
    assert distinct_ranks(layer, ranks, "sequential") == pytest.approx(mean)


def test_bytes_of_an_exchange() -> None:
    """Counted in docs/perf-notes.md, section 3: 78 MB a rank and direction, 117 with every row."""
    token = 4096 * 2048 * 2
    rows = 8 * token
    node, eight = Layout(1, 8, 8), Layout(8, 8, 64)
    of_eight = distinct_ranks(QWEN_LAYER, 8)
    for layout, dispatch, gate, expected in [
        (node, "nvlink", "learned", (78.4e6, 0.0)),
        (node, "nvlink", "sequential", (token * 7 / 8, 0.0)),
        (node, "alltoall", "learned", (117.4e6, 0.0)),
        (node, "allgather", "learned", (7 * token, 0.0)),
        (node, "deep_ep", "learned", (78.4e6, 0.0)),
        (eight, "alltoall", "learned", (rows * 7 / 64, rows * 56 / 64)),
        (eight, "allgather", "learned", (63 * token, 7 * token)),
        (eight, "deep_ep", "learned", (token * distinct_ranks(QWEN_LAYER, 64) * 7 / 8, token * of_eight * 7 / 8)),
    ]:
        assert sent_bytes(QWEN_LAYER, layout, dispatch, gate) == pytest.approx(expected, rel=0.002), dispatch


def test_buffers_of_the_exchange_are_those_of_the_class() -> None:
    layers = [QWEN_LAYER, QWEN_LAYER._replace(name="other")]
    everyone = 8 * 4096  # NvlinkExchange.__init__: sent, returned; choices, weights, their gradients
    assert buffer_bytes(layers, Layout(1, 8, 8), "nvlink") == 2 * everyone * 2048 * 2 + 3 * everyone * 8 * 4
    for dispatch in ("alltoall", "allgather"):
        assert buffer_bytes(layers, Layout(1, 8, 8), dispatch) == 0


def test_buffers_of_deep_ep_are_those_of_its_source() -> None:
    """csrc/elastic/buffer.hpp of DeepEP 2.0, by hand: 4,096 bytes of a token, and of 32 choices 4 * 97 bytes for ids,
    weights and where it came from, in steps of 32; the whole in steps of 2 MB."""
    row, step = 4096 + 416, 2 * 2**20
    direct, hybrid = (buffer_bytes([QWEN_LAYER], layout, "deep_ep") for layout in (Layout(1, 8, 8), Layout(8, 8, 64)))
    assert direct == -(-8 * 4096 * row // step) * step
    sent_on = 8 * (4096 + 8 * 160)
    assert hybrid == -(-(64 * 4096 + 8 * 4096 + sent_on) * row // step) * step
    odd = QWEN_LAYER._replace(tokens=3000)  # room for a power of two
    assert buffer_bytes([odd], Layout(1, 8, 8), "deep_ep") == direct


@pytest.mark.parametrize(
    ("dispatch", "captured", "recomputed", "expected"),
    [
        ("local", True, False, (1.0, None)),
        ("alltoall", False, False, (1.1, None)),  # what comes, over all layers
        ("nvlink", True, False, (MARGIN * 1.25, STACK_MARGIN * 1.1)),
        ("nvlink", True, True, (MARGIN * 1.25, None)),  # what is recomputed has its own memory
        ("nvlink", False, False, (1.1, None)),
        ("deep_ep", True, False, (MARGIN * 1.25, None)),
    ],
)
def test_room_for_rows_is_that_of_the_captured_step(
    dispatch: str, captured: bool, recomputed: bool, expected: tuple[float, float | None]
) -> None:
    assert rows_over_mean(dispatch, Balance("learned", 1.25), captured, recomputed) == pytest.approx(expected)


def test_dispatch_goes_by_the_node() -> None:
    config = run_of()
    assert dispatch_of(config, Layout(2, 8, 1)) == "local"
    assert dispatch_of(config, Layout(2, 8, 4)) == "nvlink"
    assert dispatch_of(config, Layout(2, 8, 16)) == "alltoall"
    assert dispatch_of(config, Layout(3, 6, 4)) == "alltoall", "a group would span nodes"
    for name in ("alltoall", "allgather", "deep_ep"):
        assert dispatch_of(run_of(model={"dispatch": name}), Layout(2, 8, 16)) == name
    with pytest.raises(ValueError, match="spans nodes of 8 GPUs"):
        dispatch_of(run_of(model={"dispatch": "nvlink"}), Layout(2, 8, 16))


def test_every_dispatcher_of_the_package_can_be_planned() -> None:
    assert set(NAMES) - {"local"} == set(DISPATCHERS)
    for name in DISPATCHERS:
        trace = trace_step(wide_builder(), Step(seq_len=64, dispatch=name))
        assert trace.work["backward", "experts"].flops > 0 and trace.experts, name


def wide_builder() -> Any:
    """A model whose hidden size DeepEP's kernels take."""
    config = SHAPES["tiny"] | {"hidden_size": 256}
    return meta_builder(AutoConfig.for_model(**config), ModelConfig(path="tiny"))


def test_deep_ep_says_which_models_it_takes() -> None:
    plan = run_of(model={"dispatch": "deep_ep"}, parallel={"ep_size": 4})
    with pytest.raises(ValueError, match="deep_ep does not take this model: hidden size 64 is no multiple of 256"):
        plan_run(plan, nodes=1, gpus_per_node=8, gpu="h200")
