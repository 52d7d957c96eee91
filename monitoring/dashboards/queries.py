"""PromQL of the panels: selectors, kinds of queries, and what several panels ask."""

from __future__ import annotations

from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.models.common import DataSourceRef
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN = 'run="$run"'
RANKS = 'run="$run", node=~"$node", rank=~"$rank"'
NODES = 'node=~"$node"'
"""Hardware exporters know their node but not the run; All stands for the nodes of the run."""
FIRING = 'ALERTS{alertstate="firing", run="$run"}'
FIRING_HERE = f'{FIRING} or ALERTS{{alertstate="firing", run="", {NODES}}}'
"""With those of the hardware, which know their node but not the run."""
PHASES = {"setup": "blue", "train": "green", "evaluate": "purple", "checkpoint": "yellow", "done": "text"}
"""What a rank does now, in the order of the codes 1 ... 5 of `phase_code`, with its colour; 0 is one that is down."""

Target = prometheus.Dataquery


def query(expr: str, legend: str = "") -> Target:
    """Values over the time range."""
    return prometheus.Dataquery().expr(expr).range().legend_format(legend).datasource(PROMETHEUS)


def now(expr: str, legend: str = "") -> Target:
    """One value a series at the end of the time range: a series that ended is absent, not frozen."""
    return prometheus.Dataquery().expr(expr).instant().legend_format(legend).datasource(PROMETHEUS)


def rows(expr: str) -> Target:
    """One row a series at the end of the time range, its labels as columns."""
    return now(expr).format(PromQueryFormat.TABLE)


def buckets(expr: str) -> Target:
    """Histogram buckets by `le`."""
    return query(expr, "{{le}}").format(PromQueryFormat.HEATMAP)


def worst(series: str, by_time: str, count: int = 5) -> str:
    """PromQL: the `count` series of `series` that are highest in `by_time`, an expression over `$__range`.

    Chosen once, at the end of the time range: `topk` alone chooses anew at every point and draws fragments of all.
    """
    return f"{series} and topk({count}, {by_time})"


def phase_code(selector: str) -> str:
    """PromQL: what each rank does, as its place in `PHASES` from 1; 0 where no phase is set."""
    codes = (f'{code} * moetrain_phase{{{selector}, phase="{phase}"}}' for code, phase in enumerate(PHASES, 1))
    return " or ".join(codes)
