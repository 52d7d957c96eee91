"""Memory, time, stops and the choice among layouts."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from math import isclose
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from moetrain import mesh
from moetrain.auto import AutoModelForCausalLM
from moetrain.bench.shapes import LARGE
from moetrain.config import ModelConfig, OptimConfig, RunConfig, parse_config
from moetrain.graph import MARGIN, STACK_MARGIN
from moetrain.moe.dispatch import DISPATCHERS as NAMES
from moetrain.moe.router import sequential_gate
from moetrain.optim import build_optimizer
from moetrain.plan import constants, plan_run, reality
from moetrain.plan.constants import GIB, GPUS
from moetrain.plan.exchange import Balance, buffer_bytes, distinct_ranks, sent_bytes
from moetrain.plan.goodput import best_interval, goodput_of, share_kept
from moetrain.plan.layout import Layout
from moetrain.plan.memory import Parameter, Unit, keeps_gathered, memory_of, units_of
from moetrain.plan.operators import Work
from moetrain.plan.search import Choices, Machine, Planner, dispatch_of, make_plan, rows_over_mean
from moetrain.plan.shapes import meta_builder
from moetrain.plan.simulate import fake_world
from moetrain.plan.spread import DISPATCHERS
from moetrain.plan.step_time import experts_share, time_of
from moetrain.plan.trace import KINDS, Event, ExpertLayer, Step, StepTrace, trace_step
from tests.families import FAMILIES

ROOT = Path(__file__).parents[2]
H200 = GPUS["h200"]
STATES = ("bf16_stochastic", "master", "8bit")
QWEN_LAYER = ExpertLayer("experts", 128, tokens=4096, hidden=2048, top_k=8, token_bytes=2)


def run_of(path: str = "tiny", **sections: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {
        "output_dir": "plan",
        "model": {"path": path},
        "data": {"train": [{"path": "python:stdlib"}], "seq_len": 128},
        "train": {"steps": 1, "compile": "off"},
    }
    for section, values in sections.items():
        raw[section] = raw.get(section, {}) | values
    return parse_config(raw)


def tiny_units(family: str = "qwen3_moe", states: str = "bf16_stochastic") -> list[Unit]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16)
    return units_of(model, OptimConfig(states=states))


# ---------------------------------------------------------------------------------------------------------- memory


def shards_of_rank_0(world: int, ep: int, replicas: int) -> dict[str, tuple[int, int]]:
    """Bytes of the shards and of their optimizer states, by `optim.states`."""
    with fake_world(0, world):
        model = AutoModelForCausalLM.from_config(
            FAMILIES["qwen3_moe"](),
            dtype=torch.bfloat16,
            distributed_config=mesh.layout(world, ep, replicas, "moetrain_alltoall" if ep > 1 else None),
        )
        weights = sum(nbytes(parameter.to_local()) for parameter in model.parameters())
        found = {}
        for states in STATES:
            optimizer = build_optimizer(model, OptimConfig(states=states))
            tensors = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
            found[states] = (weights, sum(nbytes(getattr(tensor, "_local_tensor", tensor)) for tensor in tensors))
    return found


@pytest.mark.parametrize(("world", "ep", "replicas"), [(8, 4, 1), (16, 2, 4), (6, 2, 1)])
def test_shards_and_states_are_those_of_rank_0(world: int, ep: int, replicas: int) -> None:
    # torch keeps meshes of a process's first world in caches, so each has a process of its own
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        real = pool.submit(shards_of_rank_0, world, ep, replicas).result()
    trace = StepTrace(Step(), [event("end")])
    for states, (weights, state_bytes) in real.items():
        memory = memory_of(trace, tiny_units(states=states), Layout(1, world, ep, replicas), gpu_bytes=1)
        assert memory.kinds["weights"] == weights
        assert memory.kinds["optimizer"] == pytest.approx(state_bytes, rel=0.01), states


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def event(what: str, name: str = "", backward: bool = False, live: int = 0) -> Event:
    kinds = dict.fromkeys(KINDS, 0) | {"activations": live}
    return Event(what, name, backward, kinds, kinds)


def two_units() -> list[Unit]:
    """A layer of 800 bytes and a head of 80, each over the ranks of a world."""
    layer = Unit(("layer",), [Parameter("layer.weight", (400,), 2, 4.0, False)], is_layer=True)
    head = Unit(("head",), [Parameter("head.weight", (40,), 2, 4.0, False)], freed=False)
    return [layer, head]


STEP = [
    event("enter", "layer"), event("leave", "layer"), event("enter", "head"), event("leave", "head"), event("leave"),
    event("return", "head", True), event("gradient", "head.weight", True), event("return", "layer", True),
    event("gradient", "layer.weight", True), event("end", "", True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("moment", "keep", "gathered", "gradients"),
    [
        (1, "never", 800 + 800, 0),  # in the layer: its weights, and the buffer they came in
        (3, "never", 80 + 80, 0),  # in the head: the layer's are freed, its buffer went when the head's came
        (3, "always", 800 + 80 + 80, 0),
        (5, "never", 80, 0),  # between forward and backward: the head stays
        (6, "never", 80 + 800, 0),  # backward of the head: the layer's buffer is on its way
        (7, "never", 800, 20 + 80),  # the head's gradient: its shard, and what it is reduced from
        (8, "never", 800, 20 + 80),  # backward of the layer, nothing ahead
        (9, "never", 0, 20 + 200 + 800),  # all gradients are shards, the last is still being reduced
    ],
)
def test_what_fsdp_holds_at_each_moment(moment: int, keep: str, gathered: int, gradients: int) -> None:
    trace = StepTrace(Step(), [replace_live(event, 10_000 if i == moment else 0) for i, event in enumerate(STEP)])
    memory = memory_of(trace, two_units(), Layout(1, 4), gpu_bytes=1, keep=keep)
    assert memory.kinds["activations"] == 10_000
    assert (memory.kinds["gathered"], memory.kinds["gradients"]) == (gathered, gradients)
    assert (memory.kinds["weights"], memory.kinds["optimizer"]) == (220, 440)


def replace_live(event: Event, live: int) -> Event:
    """Something alive before an event, which is over when it comes."""
    return event._replace(peak=event.peak | {"activations": live})


def test_what_is_in_no_smaller_unit_is_whole_to_the_end() -> None:
    root = Unit(("",), [Parameter("head.weight", (40,), 2, 4.0, False)], freed=False)
    steps = [
        event("enter"), event("enter", "layer"), event("leave", "layer"), event("leave"),
        event("gradient", "head.weight", True), event("return", "layer", True),
        replace_live(event("gradient", "layer.weight", True), 5_000), event("end", "", True),
    ]  # fmt: skip
    units = [two_units()[0], root]
    memory = memory_of(StepTrace(Step(), steps), units, Layout(1, 4), gpu_bytes=1, keep="never")
    assert (memory.kinds["gathered"], memory.kinds["gradients"]) == (80 + 800, 80)
    steps[-1] = event("end", "", True)._replace(now=event("end", live=50_000).now)
    memory = memory_of(StepTrace(Step(), steps), units, Layout(1, 4), gpu_bytes=1, keep="never")
    assert (memory.kinds["gathered"], memory.kinds["gradients"]) == (0, 200 + 80 + 80), "the last is being reduced"


def head_after_a_backward(family: str) -> tuple[int, bool]:
    """When the first layer's backward ends: bytes of the head's gathered weight, and whether its gradient is whole."""
    with fake_world(0, 4):
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), distributed_config=mesh.layout(4, 1, 1, None))
        head: Any = model.get_output_embeddings()
        weights: list[torch.Tensor] = []
        found: list[tuple[int, bool]] = []
        head.register_forward_pre_hook(lambda module, _: weights.append(module.weight))

        def look(*_: object) -> None:
            found.append((weights[0].untyped_storage().nbytes(), weights[0].grad is not None))

        model.get_decoder().layers[0].register_full_backward_hook(look)
        ids = torch.arange(8)[None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return found[0]


@pytest.mark.parametrize(("family", "in_a_unit"), [("qwen3_moe", True), ("nemotron_h", False)])
def test_the_head_is_whole_for_as_long_as_fsdp_keeps_it(family: str, in_a_unit: bool) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        gathered, whole_gradient = pool.submit(head_after_a_backward, family).result()
    assert (gathered == 0, not whole_gradient) == (in_a_unit, in_a_unit)
    [unit] = [unit for unit in tiny_units(family) if "lm_head.weight" in {p.name for p in unit.parameters}]
    assert (unit.name != "") == in_a_unit


def test_gradients_stay_from_pass_to_pass() -> None:
    trace = StepTrace(Step(), [replace_live(STEP[1], 10_000), *STEP[2:]])
    once, twice = (memory_of(trace, two_units(), Layout(1, 4), gpu_bytes=1, passes=passes) for passes in (1, 2))
    assert (once.kinds["gradients"], twice.kinds["gradients"]) == (0, 220)


def test_a_rank_alone_gathers_nothing() -> None:
    memory = memory_of(StepTrace(Step(), STEP), two_units(), Layout(1, 1), gpu_bytes=1)
    assert memory.kinds == {"weights": 880, "gradients": 880, "optimizer": 1760, "gathered": 0} | dict.fromkeys(
        KINDS, 0
    )


def test_dense_weights_stay_where_they_take_little() -> None:
    units, layout = two_units(), Layout(1, 4)
    assert keeps_gathered(units, layout, 880 / 0.08 + 1, "auto") and not keeps_gathered(units, layout, 880, "auto")
    assert keeps_gathered(units, layout, 1, "always") and not keeps_gathered(units, layout, 1e9, "never")


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


def test_what_gradients_of_experts_are_made_of_stays_until_the_next_layer() -> None:
    experts = Unit(("experts",), [Parameter("experts.up", (8, 4), 2, 0.0, True)], in_experts=True)
    events = [
        event("gradient", "head.weight", True), event("gradient", "experts.up", True),
        event("gradient", "layer.weight", True, live=500),
    ]  # fmt: skip
    trace = StepTrace(Step(dispatch="nvlink"), events, aside=5_000)
    units = [*two_units(), experts]
    for layout, captured, expected in [
        (Layout(1, 4, 4), True, 5_000),
        (Layout(1, 4, 4), False, 0),  # eager steps use one stream
        (Layout(1, 8, 4), True, 0),  # shards of experts are reduced at once
    ]:
        memory = memory_of(trace, units, layout, gpu_bytes=1, captured=captured)
        assert memory.kinds["workspace"] == expected, (layout, captured)


@pytest.mark.parametrize("row", [r for r in reality.ROWS if r.source != "a run of ours"], ids=lambda row: row.run)
def test_the_plan_is_near_reality(row: reality.Row) -> None:
    """And docs/plan.md says what it is now."""
    gib, ms = row.predict()
    shown = [float(cell) for line in table_lines(row.run) for cell in line.replace(",", "").split("|") if number(cell)]
    if row.measured_gib is not None:
        assert gib == pytest.approx(row.measured_gib, rel=reality.WITHIN)
        assert any(cell == pytest.approx(gib, abs=0.06) for cell in shown), "run moetrain.plan.reality"
    if row.taken_gib is not None:
        taken = row.memory().needed / GIB
        assert taken == pytest.approx(row.taken_gib, rel=reality.WITHIN)
        assert any(cell == pytest.approx(taken, abs=0.06) for cell in shown), "run moetrain.plan.reality"
    if row.measured_ms is not None:
        assert any(cell == pytest.approx(ms, rel=1e-3) for cell in shown), "run moetrain.plan.reality"
        if row.captured:
            assert ms == pytest.approx(row.measured_ms, rel=reality.TIME_WITHIN)


def number(cell: str) -> bool:
    return re.fullmatch(r"\s*[\d.]+\s*", cell) is not None


def test_the_parts_of_a_step_are_near_the_profile() -> None:
    row = next(row for row in reality.ROWS if row.step == reality.LEARNED)
    predicted = reality.predict_profile(row)
    for part, measured in reality.PROFILE.items():
        assert predicted[part] == pytest.approx(measured, rel=0.2), part
        assert any(f"| {predicted[part]:,.1f} |" in line for line in table_lines(part)), "run moetrain.plan.reality"


def test_every_row_and_every_measured_peak_is_in_the_table() -> None:
    assert all(table_lines(row.run) for row in reality.ROWS)
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    measured = re.findall(r'"peak_gib": ([\d.]+)', text) + re.findall(r"([\d.]+) GiB", text)
    for line in re.findall(r"(?:peak memory|taken from the GPU), GiB (.*)$", text, re.MULTILINE):
        measured += line.split()
    held = [gib for row in reality.ROWS for gib in (row.measured_gib, row.taken_gib) if gib is not None]
    held += [*reality.TAKEN_BY_OTHERS, *reality.TAKEN_LESS, *reality.NOT_PLANNED]
    missing = [peak for peak in measured if not any(isclose(float(peak), known, rel_tol=2e-3) for known in held)]
    assert measured and not missing, f"moetrain.plan.reality.ROWS lacks peaks of docs/measured.md: {missing}"


def table_lines(first: str) -> list[str]:
    """Lines of the tables whose first cell is this."""
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    lines = text.partition(reality.BEGIN)[2].partition(reality.END)[0].splitlines()
    return [line for line in lines if line.startswith(f"| {first} |")]


@pytest.mark.parametrize("name", sorted(reality.KEPT_MB))
def test_experts_keep_what_was_measured(name: str) -> None:
    assert reality.kept_by_experts(name) / 1e6 == pytest.approx(reality.KEPT_MB[name], abs=0.6)


# ------------------------------------------------------------------------------------------------------------ time


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


def test_grouped_products_are_faster_with_more_rows() -> None:
    layer = QWEN_LAYER
    assert experts_share([layer], Layout(1, 8, 1)) == pytest.approx(478 / 989)  # 256 rows
    assert experts_share([layer], Layout(1, 8, 8)) == pytest.approx(630 / 989)  # 2,048 rows
    assert 478 / 989 < experts_share([layer], Layout(1, 8, 4)) < 630 / 989
    assert experts_share([layer._replace(tokens=64)], Layout(1, 8, 1)) == constants.EXPERTS[0][1]


def test_a_step_takes_longer_across_nodes_and_eagerly() -> None:
    step = Step(seq_len=128, dispatch="alltoall")
    trace = trace_step(meta_builder(AutoConfig.for_model(**shape_of("tiny")), ModelConfig(path="tiny")), step)
    units = tiny_units()
    near, far = (time_of(trace, units, layout, H200) for layout in (Layout(2, 8, 8), Layout(2, 8, 16)))
    assert near.parts["dispatch across nodes"] == 0 < far.parts["dispatch across nodes"]
    eager = time_of(trace, units, Layout(2, 8, 8), H200, captured=False)
    launches = sum(work.launches for work in trace.work.values())
    busy = near.seconds - near.parts["optimizer"] - near.parts["sharding, exposed"]
    busy -= near.parts["idle"]
    assert eager.parts["idle"] == pytest.approx(launches * constants.LAUNCH_SECONDS - busy, rel=0.05)
    assert near.parts["idle"] == pytest.approx(
        launches * constants.GAP_SECONDS
    ) and near.tokens_per_second == pytest.approx(128 / near.seconds)
    twice = time_of(trace, units, Layout(2, 8, 8), H200, passes=2)
    assert twice.seconds == pytest.approx(2 * near.seconds - near.parts["optimizer"])
    assert twice.tokens == 256


@pytest.mark.parametrize(("dispatch", "selective"), [("alltoall", 1.0), ("deep_ep", 1.0), ("nvlink", 1.25)])
def test_recomputation_sends_again_unless_it_keeps(dispatch: str, selective: float) -> None:
    layer = ExpertLayer("experts", 8, tokens=128, hidden=64, top_k=2, token_bytes=2)
    times = {}
    for mode in ("none", "selective", "full"):
        trace = StepTrace(Step(dispatch=dispatch, checkpointing=mode), experts=[layer])
        times[mode] = time_of(trace, two_units(), Layout(1, 8, 8), H200).parts["dispatch in node"]
    assert times["selective"] == pytest.approx(selective * times["none"])
    assert times["full"] == pytest.approx(1.5 * times["none"])


def test_all_ranks_wait_for_the_fullest() -> None:
    work = {("forward", "experts"): Work(flops=3e12, bytes=2e9)}
    trace = StepTrace(Step(dispatch="nvlink", rows_over_mean=2.0), work=work, experts=[QWEN_LAYER])
    even, uneven = (
        time_of(trace, two_units(), Layout(1, 8, 8), H200, balance=Balance("random", load)) for load in (1.0, 1.5)
    )
    assert uneven.parts["experts"] == pytest.approx(1.5 * even.parts["experts"])
    assert even.parts["experts"] == pytest.approx(3e12 / 2 / (989e12 * experts_share([QWEN_LAYER], Layout(1, 8, 8))))
    assert even.flops == uneven.flops == 1.5e12, "what is laid out and empty is not computed"
    assert uneven.parts["memory passes"] > even.parts["memory passes"]


# --------------------------------------------------------------------------------------------------------- goodput


@pytest.mark.parametrize(("write", "hours"), [(60, 400), (600, 50), (900, 3)])
def test_the_interval_is_the_best(write: float, hours: float) -> None:
    mean_time, restart = hours * 3600, 300.0
    best = best_interval(write, mean_time)
    most = max(share_kept(best * factor / 100, write, restart, mean_time) for factor in range(20, 400))
    assert share_kept(best, write, restart, mean_time) == pytest.approx(most, abs=1e-4)
    assert 0 < most < 1


def test_llama_3_would_have_stopped_as_often() -> None:
    goodput = goodput_of(two_units(), Layout(2048, 8), storage_gb_s=1.0, restart_seconds=300)
    assert goodput.stops_per_week * 54 / 7 == pytest.approx(419)
    assert (goodput.checkpoint_bytes, goodput.export_bytes) == (880 + 1760, 880)
    assert goodput.write_seconds == pytest.approx(2640 / 2048e9)


# ---------------------------------------------------------------------------------------------------------- search


def shape_of(name: str) -> dict[str, Any]:
    from moetrain.bench.shapes import SHAPES

    return (SHAPES | LARGE)[name]


def test_layouts_divide_ranks_and_experts() -> None:
    planner = Planner(run_of(), Machine(nodes=4, gpu="h200"))  # 8 experts: no more ranks can share them
    layouts = planner.layouts(Choices())
    assert {layout.ep for layout in layouts} == {1, 2, 4, 8} and {layout.replicas for layout in layouts} == {1, 2, 4}
    assert all(layout.fsdp % layout.ep == 0 and layout.efsdp * layout.ep * layout.replicas == 32 for layout in layouts)
    assert all(layout.ep == 1 or layout.fsdp <= 8 for layout in layouts)
    assert planner.layouts(Choices(ep=4, replicas=4)) == [Layout(4, 8, 4, 4)]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices(ep=6), r"ep_size=6 does not divide the 16 ranks.*valid: \[1, 2, 4, 8, 16\]"),
        (Choices(ep=16), r"ep_size=16 does not divide the model's 8 experts; valid on 16 ranks: \[1, 2, 4, 8\]"),
        (Choices(replicas=3), "dp_replicate_size=3 does not divide the world of 16 ranks"),
        (Choices(ep=8, replicas=4), "ep_size=8 does not divide the 4 ranks of a replica"),
    ],
)
def test_a_size_that_does_not_divide_is_an_error(choices: Choices, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(run_of(), Machine(nodes=2, gpu="h200"), choices)


def test_the_configuration_own_layout_must_divide() -> None:
    with pytest.raises(ValueError, match="ep_size=3 does not divide"):
        make_plan(run_of(parallel={"ep_size": 3}), Machine(nodes=2, gpu="h200"))


def test_an_unknown_gpu_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown GPU 'h100'; valid: h100-80gb, h200, b200"):
        make_plan(run_of(), Machine(nodes=1, gpu="h100"))


def test_an_unknown_model_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)config\.json.*qwen3-30b-a3b"):
        make_plan(run_of(str(tmp_path)), Machine(nodes=1))


def test_a_config_json_is_enough(tmp_path: Path) -> None:
    FAMILIES["mixtral"]().save_pretrained(tmp_path)
    plan = make_plan(run_of(str(tmp_path)), Machine(nodes=1, gpu="h200"), Choices(ep=2, batch=1, checkpointing="none"))
    [best] = plan.fitting
    assert best.layout == Layout(1, 8, 2, 1) and plan.own is None


def test_the_fastest_that_fits_comes_first() -> None:
    own = {"ep_size": 4, "dp_replicate_size": 2}
    plan = make_plan(run_of(parallel=own), Machine(nodes=2, gpu="h200"), top=4)
    speeds = [candidate.time.tokens_per_second for candidate in plan.fitting]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) == 4 and not plan.changes
    assert all(candidate.fits and candidate.memory.needed < H200.memory_bytes for candidate in plan.fitting)
    assert plan.own is not None and plan.own.layout == Layout(2, 8, 4, 2) and plan.own.step.batch == 1
    assert plan.own.step.dispatch == "nvlink" and plan.own.captured


@pytest.mark.parametrize(("needed", "found"), [(1, 6), (6, 6), (7, 12), (18, 18), (30, 30), (42, 42), (43, None)])
def test_as_few_layers_are_checkpointed_as_memory_allows(
    needed: int, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 48, in eighths."""
    planner, tried = Planner.__new__(Planner), []

    def evaluate(layout: str, batch: int, checkpointing: str, layers: int) -> SimpleNamespace:
        tried.append(layers)
        assert (layout, batch, checkpointing) == ("here", 4, "selective")
        return SimpleNamespace(fits=layers >= needed, layers=layers)

    monkeypatch.setattr(planner, "layers", 48, raising=False)
    monkeypatch.setattr(planner, "evaluate", evaluate)
    whole = [
        SimpleNamespace(layout=layout, step=Step(batch=4, checkpointing=mode))
        for layout, mode in (("there", "none"), ("here", "selective"), ("nowhere", "full"))
    ]
    best = [candidate.layers for candidate in planner.with_fewer_layers(whole)]  # type: ignore[arg-type,attr-defined]
    assert best == ([] if found is None else [found]) and len(tried) == 3
    assert not list(planner.with_fewer_layers(whole[:1]))  # type: ignore[arg-type]


def test_the_layers_that_a_run_checkpoints_are_planned() -> None:
    config = run_of(model={"activation_checkpointing": "full", "checkpointed_layers": 1})
    plan = plan_run(config, nodes=2, gpus_per_node=8, gpu="h200")
    assert plan.own is not None and plan.best == plan.own
    assert plan.own.step.recomputed == "full 1" and "full 1" in plan.render()


def test_the_plan_of_a_run_is_that_of_its_own_layout() -> None:
    config = run_of(parallel={"ep_size": 4, "dp_replicate_size": 2}, data={"batch_size": 3})
    plan = plan_run(config, nodes=2, gpus_per_node=8, gpu="h200")
    [candidate] = plan.fitting
    assert candidate == plan.own and candidate.layout == Layout(2, 8, 4, 2) and candidate.step.batch == 3
    text = plan.render()
    assert "tokens/s" in text and "a checkpoint:" in text and "\x1b" not in text


def test_where_nothing_fits_changes_are_named() -> None:
    wide = {"model_type": "qwen3_moe", "num_hidden_layers": 10, "hidden_size": 8192, "moe_intermediate_size": 8192}
    create = {"config": wide | {"num_experts": 64, "head_dim": 128}}  # 130 B parameters, 14 bytes each
    config = run_of("none", model={"create": create}, optim={"states": "master"})
    plan = make_plan(config, Machine(nodes=2, gpu="h100-80gb"), Choices(ep=16, batch=1, checkpointing="full"))
    assert not plan.fitting and plan.smallest.memory.needed > GPUS["h100-80gb"].memory_bytes
    assert len(plan.changes) == 3
    for change in plan.changes:
        less = change.candidate.memory.needed < plan.smallest.memory.needed
        assert less or change.what.startswith("GPU"), change.what
    fitting = [change.what for change in plan.changes if change.candidate.fits]
    assert fitting == [change.what for change in plan.changes][: len(fitting)], "those that fit come first"
    assert fitting[0] == "optim.states: bf16_stochastic", "those that cost nothing come first"


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
    config = shape_of("tiny") | {"hidden_size": 256}
    return meta_builder(AutoConfig.for_model(**config), ModelConfig(path="tiny"))


def test_deep_ep_says_which_models_it_takes() -> None:
    plan = run_of(model={"dispatch": "deep_ep"}, parallel={"ep_size": 4})
    with pytest.raises(ValueError, match="deep_ep does not take this model: hidden size 64 is no multiple of 256"):
        plan_run(plan, nodes=1, gpus_per_node=8, gpu="h200")


def test_the_published_shapes_have_the_published_size() -> None:
    for name, billions in (("nemotron-3-super-120b-a12b", 120.67), ("nemotron-3-ultra-550b-a55b", 549.3)):
        model = meta_builder(AutoConfig.for_model(**LARGE[name]), ModelConfig(path=name))()
        assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_dense_model_has_one_way() -> None:
    config = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    run = run_of("none", model={"create": {"config": config}})
    plan = make_plan(run, Machine(nodes=2, gpu="h200"))
    assert {candidate.layout.ep for candidate in plan.fitting} == {1}
    assert json.loads(json.dumps(plan.goodput._asdict()))["stops_per_week"] > 0
    assert plan.best.memory.needed > constants.OUTSIDE_ALLOCATOR > 2 * GIB
