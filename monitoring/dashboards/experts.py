"""Experts and balance: do tokens spread over experts, and which expert does not get its share?"""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.models.common import LegendPlacement

from monitoring.dashboards.page import events, layers, one_run, page
from monitoring.dashboards.panels import Column, bars, grid, heat, lines, listing, number
from monitoring.dashboards.queries import FIRING, RUN, now, query, rows, worst
from monitoring.dashboards.style import ANY_IS_BAD, Steps

UID = "moetrain-experts"
PER_EXPERT = f"sum by (layer, expert) (rate(moetrain_expert_tokens_total{{{RUN}}}[5m]))"
OVER_MEAN = f"{PER_EXPERT} / on (layer) group_left () avg by (layer) ({PER_EXPERT})"
OF_LAYER = f'sum by (expert) (rate(moetrain_expert_tokens_total{{{RUN}, layer="$layer"}}[5m]))'
NOT_MOE = "Not a MoE model, or no step yet"
NOT_ASKED = "Counts of each expert are off: metrics.expert_matrix: true"
LOAD: Steps = ((None, "purple"), (0.05, "blue"), (0.5, "green"), (2, "yellow"), (4, "orange"), (8, "red"))
"""Tokens of an expert over its layer's mean: dead, starved, fair, busy, overloaded."""


def dashboard() -> dict[str, Any]:
    """Balance by layer is always there; by expert only with `metrics.expert_matrix`."""
    about = (
        "Do tokens spread over the experts? The busiest expert's rank sets the pace of a layer, "
        "and an expert without tokens learns nothing."
    )
    sections = [
        ("Now", _now()),
        ("By layer", _by_layer()),
        ("By expert (with metrics.expert_matrix: true)", _by_expert()),
    ]
    return page(UID, "Experts and balance", about, sections, [one_run(), layers()], annotations=events(FIRING))


def _now() -> list[Any]:
    return [
        number(
            "Worst layer, max / mean",
            "none",
            query(f"run:moetrain_expert_imbalance:max{{{RUN}}}"),
            about="Tokens of the busiest expert over the mean. 1 is perfect, below 4 is usual in fine-tuning.",
            empty=NOT_MOE,
            steps=((None, "green"), (4, "orange"), (8, "red")),
            decimals=2,
        ),
        number(
            "Mean over layers, max / mean",
            "none",
            query(f"avg(moetrain_expert_load_max_over_mean{{{RUN}}})"),
            about="Far below the worst layer: one layer's trouble. As high: the router as a whole.",
            empty=NOT_MOE,
            decimals=2,
        ),
        number(
            "Idle experts",
            "none",
            query(f"sum(moetrain_idle_experts{{{RUN}}})"),
            about="Experts without a token in the last step, all layers. Some now and then is chance with small "
            "batches; "
            "the same ones for long are dead: see the lists below.",
            empty=NOT_MOE,
            steps=((None, "green"), (1, "orange")),
            decimals=0,
        ),
        number(
            "Lowest entropy of a layer",
            "percentunit",
            query(f"min(moetrain_expert_load_entropy_ratio{{{RUN}}})"),
            about="Entropy of the load as a share of its maximum: 100 % is perfectly even. "
            "Falling steadily: the router collapses; raise the balancing loss or bias.",
            empty=NOT_MOE,
            steps=((None, "red"), (0.7, "orange"), (0.85, "green")),
            decimals=1,
        ),
        number(
            "Steps redone",
            "none",
            now(f"max(increase(moetrain_overflow_redos_total{{{RUN}}}[$__range]))"),
            about="Steps of this time range that were done again, because a rank's experts got more tokens than it had "
            "room for. More than a few an hour: raise the capacity.",
            empty="No rank answers",
            steps=((None, "green"), (1, "orange"), (10, "red")),
            decimals=0,
        ),
        number(
            "Steps with NaN or Inf",
            "none",
            now(f"max(increase(moetrain_nonfinite_steps_total{{{RUN}}}[$__range]))"),
            about="Of this time range. Any: lower the learning rate or look at the data of that step.",
            empty="No rank answers",
            steps=ANY_IS_BAD,
            decimals=0,
        ),
    ]


def _by_layer() -> list[Any]:
    return [
        heat(
            "Busiest expert over the mean, by layer",
            "none",
            query(f"max by (layer) (moetrain_expert_load_max_over_mean{{{RUN}}})", "{{layer}}"),
            about="Dark is good. A bright line is one layer; bright everywhere after a restart is a router not loaded.",
            empty=NOT_MOE,
            rows_are="layer",
            low=1,
            width=24,
            height=10,
            decimals=2,
        ),
        lines(
            "Busiest expert over the mean, worst five layers",
            "none",
            query(_layers("expert_load_max_over_mean", ""), "layer {{layer}}"),
            about="1 is perfect. Rising over hours: the balancing loss is too weak for this data.",
            empty=NOT_MOE,
            decimals=2,
            legend=LegendPlacement.RIGHT,
        ),
        lines(
            "Quietest expert over the mean, worst five layers",
            "none",
            query(_layers("expert_load_min_over_mean", "-"), "layer {{layer}}"),
            about="0 is an expert without tokens in the step. At 0 for long: dead.",
            empty=NOT_MOE,
            decimals=2,
            legend=LegendPlacement.RIGHT,
        ),
        lines(
            "Idle experts, all layers",
            "none",
            query(f"sum(moetrain_idle_experts{{{RUN}}})", "idle"),
            about="Zero is good with full batches.",
            empty=NOT_MOE,
            decimals=0,
        ),
        bars(
            "Idle experts by layer, most first",
            "none",
            now(f"topk(10, max by (layer) (moetrain_idle_experts{{{RUN}}}) > 0)", "layer {{layer}}"),
            about="The layers to look at below: choose one above.",
            empty="No expert is idle",
            steps=((None, "green"), (1, "orange"), (4, "red")),
            decimals=0,
        ),
        lines(
            "Entropy of the load over its maximum",
            "percentunit",
            query(f"avg(moetrain_expert_load_entropy_ratio{{{RUN}}})", "mean of layers"),
            query(f"min(moetrain_expert_load_entropy_ratio{{{RUN}}})", "worst layer"),
            about="100 % is perfectly even. Level is good, falling is a router that collapses.",
            empty=NOT_MOE,
            from_zero=False,
            width=24,
        ).max(1),
    ]


def _by_expert() -> list[Any]:
    columns = {
        "layer": Column("Layer", width=80),
        "expert": Column("Expert", width=80),
        "Value": Column("Over mean", "none", LOAD, decimals=2),
    }
    return [
        grid(
            "Tokens of each expert over its layer's mean",
            rows(OVER_MEAN),
            across="expert",
            down="layer",
            steps=LOAD,
            about="Every expert of every layer, the last five minutes. Green is a fair share; purple is dead, blue "
            "starved, "
            "orange and red overloaded. A column: the same expert in all layers, so one rank.",
            empty=NOT_ASKED,
            width=24,
            height=14,
            decimals=2,
        ),
        heat(
            "Experts of layer $layer over time",
            "none",
            query(f"{OF_LAYER} / scalar(avg({OF_LAYER}))", "{{expert}}"),
            about="Tokens over the layer's mean. A black line is a dead expert, a bright one an overloaded one.",
            empty=NOT_ASKED,
            rows_are="expert",
            low=0,
            high=3,
            height=12,
            decimals=2,
        ),
        listing(
            "Most overloaded experts",
            columns,
            rows(f"topk(10, {OVER_MEAN})"),
            about="Tokens of the last five minutes over the layer's mean. Beyond 4 the expert's rank waits for it.",
            empty=NOT_ASKED,
            width=6,
            height=12,
            sort_by="Over mean",
        ),
        listing(
            "Most starved experts",
            columns,
            rows(f"bottomk(10, {OVER_MEAN})"),
            about="0 for five minutes is a dead expert: it gets no tokens and no gradient.",
            empty=NOT_ASKED,
            width=6,
            height=12,
        ),
    ]


def _layers(gauge: str, sign: str) -> str:
    """PromQL: the five layers with the highest value of a gauge in the time range, with the sign `-` the lowest.

    By extremes, as they skip the NaN of a gauge before the first step; a mean is NaN from there on.
    """
    one, extreme = f"moetrain_{gauge}{{{RUN}}}", "min" if sign else "max"
    return worst(f"max by (layer) ({one})", f"{sign}max by (layer) ({extreme}_over_time({one}[$__range] @ end()))")
