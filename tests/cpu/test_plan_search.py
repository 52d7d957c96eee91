"""The choice among layouts: which are tried, which comes first, and what is said where none fits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from moetrain.plan import constants, plan_run
from moetrain.plan.constants import GIB, GPUS
from moetrain.plan.layout import Choices, Layout, possible_layouts
from moetrain.plan.search import Machine, Planner, make_plan
from moetrain.plan.trace import Step
from tests.families import FAMILIES
from tests.plan_helpers import H200, run_of


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
        (Choices(ep=6), r"16 ranks has --ep 6 \(experts of a layer: 8\); --ep can be 1, 2, 4, 8$"),
        (Choices(ep=16), "has --ep 16 .* --ep can be 1, 2, 4, 8$"),
        (Choices(replicas=3), "has --replicas 3 .* --replicas can be 1, 2, 4, 8, 16$"),
        (Choices(ep=8, replicas=4), "--ep 8 --replicas 4 .* --ep can be 1, 2, 4, or --replicas can be 2$"),
        (Choices(ep=3, replicas=5), "--ep 3 --replicas 5 .* set --ep and --replicas to auto$"),
    ],
)
def test_a_size_that_does_not_divide_is_an_error(choices: Choices, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(run_of(), Machine(nodes=2, gpu="h200"), choices)


@pytest.mark.parametrize(
    ("ep", "why"),
    [(4, "8 experts cannot be spread over the 16 ranks .* dp_replicate_size to 2"), (3, "ep_size=3 does not divide")],
)
def test_an_own_layout_that_cannot_be_is_left_out(ep: int, why: str) -> None:
    """A configuration made for one node, planned for two: the layouts for two are what was asked for."""
    config, one_way = run_of(parallel={"ep_size": ep}), {"batch": 1, "checkpointing": "none"}
    plan = make_plan(config, Machine(nodes=2, gpu="h200"), Choices(**one_way))
    assert plan.own is None and re.search(why, plan.why_not_own or "")
    assert {(8, 2), (4, 2), (1, 1)} <= {(found.layout.ep, found.layout.replicas) for found in plan.fitting}
    assert "Without the configuration's own layout: " in plan.render() and "yours" not in plan.render()
    with pytest.raises(ValueError, match=why):
        plan_run(config, nodes=2, gpus_per_node=8, gpu="h200")
    assert make_plan(config, Machine(nodes=2, gpu="h200"), Choices(ep=2, **one_way)).why_not_own is None


def test_replicas_are_parts_of_a_node_where_nothing_else_can_be() -> None:
    assert possible_layouts(1, 8, {4}, Choices(ep=4)) == [Layout(1, 8, 4, 2)]
    assert possible_layouts(2, 4, {4}, Choices(ep=4)) == [Layout(2, 4, 4, 2)]
    assert possible_layouts(1, 8, {4}, Choices(ep=4, replicas=1)) == []
    assert {layout.replicas for layout in possible_layouts(1, 8, {4}, Choices())} == {1}


def test_a_dispatcher_within_nodes_leaves_out_layouts_across_them() -> None:
    create = {"config": {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": 16}}
    planner = Planner(run_of("none", model={"create": create, "dispatch": "nvlink"}), Machine(nodes=2, gpu="h200"))
    assert {layout.ep for layout in planner.layouts(Choices())} == {1, 2, 4, 8}


def test_changes_that_leave_no_layout_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """More nodes are no change for a run whose experts and replicas do not go further."""
    config = run_of(parallel={"ep_size": 8}, optim={"states": "8bit"}, model={"activation_checkpointing": "full"})
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(memory_bytes=1))
    plan = plan_run(config, nodes=1, gpus_per_node=8, gpu="h200")
    assert not plan.fitting and plan.changes and not any("nodes" in change.what for change in plan.changes)


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


def test_a_dense_model_has_one_way() -> None:
    config = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    run = run_of("none", model={"create": {"config": config}})
    plan = make_plan(run, Machine(nodes=2, gpu="h200"))
    assert {candidate.layout.ep for candidate in plan.fitting} == {1}
    assert json.loads(json.dumps(plan.goodput._asdict()))["stops_per_week"] > 0
    assert plan.best.memory.needed > constants.OUTSIDE_ALLOCATOR > 2 * GIB
