"""Memory of a rank: shards and states as they really are, and what FSDP2 holds at each moment of a step."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from moetrain import mesh
from moetrain.auto import AutoModelForCausalLM
from moetrain.config import OptimConfig
from moetrain.optim import build_optimizer
from moetrain.plan.layout import Layout
from moetrain.plan.memory import Parameter, Unit, keeps_gathered, memory_of
from moetrain.plan.simulate import fake_world
from moetrain.plan.trace import KINDS, Event, Step, StepTrace
from tests.families import FAMILIES
from tests.plan_helpers import tiny_units, two_units

STATES = ("bf16_stochastic", "master", "8bit")


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
