"""Time of a step: products, launches, recomputation, and the wait for the fullest rank."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from moetrain.bench.shapes import SHAPES
from moetrain.config import ModelConfig
from moetrain.plan import constants
from moetrain.plan.exchange import Balance
from moetrain.plan.layout import Layout
from moetrain.plan.operators import Work
from moetrain.plan.shapes import meta_builder
from moetrain.plan.step_time import experts_share, time_of
from moetrain.plan.trace import ExpertLayer, Step, StepTrace, trace_step
from tests.plan_helpers import H200, QWEN_LAYER, tiny_units, two_units


def test_grouped_products_are_faster_with_more_rows() -> None:
    layer = QWEN_LAYER
    assert experts_share([layer], Layout(1, 8, 1)) == pytest.approx(478 / 989)  # 256 rows
    assert experts_share([layer], Layout(1, 8, 8)) == pytest.approx(630 / 989)  # 2,048 rows
    assert 478 / 989 < experts_share([layer], Layout(1, 8, 4)) < 630 / 989
    assert experts_share([layer._replace(tokens=64)], Layout(1, 8, 1)) == constants.EXPERTS[0][1]


def test_a_step_takes_longer_across_nodes_and_eagerly() -> None:
    step = Step(seq_len=128, dispatch="alltoall")
    trace = trace_step(meta_builder(AutoConfig.for_model(**SHAPES["tiny"]), ModelConfig(path="tiny")), step)
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
