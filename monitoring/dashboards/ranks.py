"""Ranks and stragglers: which rank or node holds the others up?"""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.models.common import LegendPlacement

from monitoring.dashboards.page import events, nodes, one_run, page, ranks
from monitoring.dashboards.panels import Column, bars, heat, lines, listing, number, states
from monitoring.dashboards.queries import RANKS, RUN, now, phase_code, query, rows, worst
from monitoring.dashboards.style import ANY_IS_BAD, dashed, phase_names

UID = "moetrain-ranks"
OWN = "rank:moetrain_own_compute_seconds_per_step:mean"
MEDIAN = f"quantile by (run) (0.5, {OWN}{{{RUN}}})"
OVER_MEDIAN = f"{OWN}{{{RANKS}}} / on (run) group_left () {MEDIAN}"
FULL = f'moetrain_gpu_memory_bytes{{{RANKS}, kind="peak"}} / ignoring (kind) moetrain_gpu_memory_total_bytes{{{RANKS}}}'
SLOW = 1.1
"""Own compute over the median rank's from which a rank counts as a straggler; as in the alert StragglerRank."""
COLD = "No step yet"


def dashboard() -> dict[str, Any]:
    """Synchronous ranks all share the slowest one's step time, so they are compared by their own compute."""
    about = (
        "Which rank, GPU or node holds the others up? Every rank waits for the slowest, so step times are alike; "
        "what differs is the time a rank computes by itself."
    )
    sections = [
        ("Now", _now()),
        ("Own compute", _own_compute()),
        ("Waiting", _waiting()),
        ("State and memory", _state()),
    ]
    return page(UID, "Ranks and stragglers", about, sections, [one_run(), nodes(), ranks()], annotations=events())


def _now() -> list[Any]:
    return [
        number(
            "Slowest rank over the median",
            "percentunit",
            query(f"max({OVER_MEDIAN})"),
            about="100 % is perfect, up to 105 % is noise. The whole run is slower by what is beyond.",
            empty=COLD,
            steps=((None, "green"), (1.05, "orange"), (SLOW, "red")),
            decimals=1,
        ),
        number(
            "Stragglers",
            "none",
            now(f"count({OVER_MEDIAN} > {SLOW}) or 0 * count({OVER_MEDIAN})"),
            about=f"Ranks with more than {SLOW - 1:.0%} above the median. One: a GPU or its host. All of a node: "
            "cooling, power or a neighbour. Many, changing: the balance of experts.",
            empty=COLD,
            steps=ANY_IS_BAD,
            decimals=0,
        ),
        number(
            "Ranks down",
            "none",
            now(f'count(up{{job="moetrain", {RANKS}}} == 0) or 0 * count(up{{job="moetrain", {RANKS}}})'),
            about="Ranks that no longer answer. Read their log, then their node's hardware.",
            empty="No targets",
            steps=ANY_IS_BAD,
            decimals=0,
        ),
        number(
            "Waiting for others",
            "percentunit",
            query(f'run:moetrain_phase:share{{{RUN}, phase="collective_wait"}}'),
            about="Share of all ranks' time inside exchanges, waiting. It falls when a straggler goes.",
            empty=COLD,
            decimals=1,
        ),
        number(
            "Waiting for data",
            "percentunit",
            query(f'run:moetrain_phase:share{{{RUN}, phase="data_wait"}}'),
            about="More than a few percent: more loader workers, or a faster file system.",
            empty=COLD,
            steps=((None, "green"), (0.03, "orange"), (0.1, "red")),
            decimals=1,
        ),
        number(
            "Fullest GPU",
            "percentunit",
            query(f"max({FULL})"),
            about="Peak allocated over capacity. From 95 % on a longer row or a fragment can be one too many.",
            empty="No rank answers",
            steps=((None, "green"), (0.9, "orange"), (0.95, "red")),
            decimals=1,
        ),
    ]


def _own_compute() -> list[Any]:
    to_hardware = "/d/moetrain-hardware?var-node=${__value.text}&var-run=${run}&${__url_time_range}"
    columns = {
        "rank": Column("Rank", width=70),
        "node": Column("Node", link=to_hardware),
        "gpu": Column("GPU", width=60),
        "ep": Column("EP", width=50),
        "fsdp": Column("FSDP", width=60),
        "dp_replicate": Column("Replica", width=75),
        "Value #A": Column("Own compute", "s", width=120, decimals=3),
        "Value #B": Column(
            "Over median", "percentunit", ((None, "text"), (1.05, "orange"), (SLOW, "red")), width=110, decimals=1
        ),
    }
    place = f"on (run, node, rank) group_left (gpu, ep, fsdp, dp_replicate) moetrain_rank_info{{{RANKS}}}"
    return [
        heat(
            "Own compute of each rank over the median",
            "percentunit",
            query(OVER_MEDIAN, "{{rank}}"),
            about="A uniform dark field is good. One bright line: one rank; a bright band of neighbours: a node. "
            "Speckles everywhere: experts are unevenly loaded.",
            empty=COLD,
            rows_are="rank",
            low=1,
            high=1.2,
            width=24,
            height=12,
            decimals=1,
        ),
        listing(
            "Ten slowest ranks",
            columns,
            rows(f"topk(10, {OWN}{{{RANKS}}}) * {place}"),
            rows(f"topk(10, {OVER_MEDIAN})"),
            about="Seconds of own compute a step. The node leads to its hardware: clocks, temperature, throttling, "
            "Xid.",
            empty=COLD,
            height=10,
            sort_by="Own compute",
        ),
        bars(
            "Slowest rank of each node over the median",
            "percentunit",
            now(f"sort_desc(max by (node) ({OVER_MEDIAN}))", "{{node}}"),
            about="One long bar: take the node out of the job and test it.",
            empty=COLD,
            steps=((None, "green"), (1.05, "orange"), (SLOW, "red")),
            low=0.9,
            high=1.3,
            height=10,
            decimals=1,
        ),
        lines(
            "Own compute a step",
            "s",
            query(f"max({OWN}{{{RUN}}})", "slowest"),
            query(f"quantile(0.5, {OWN}{{{RUN}}})", "median"),
            query(f"min({OWN}{{{RUN}}})", "fastest"),
            about="Three lines close together are good. Slowest apart: a straggler. All rising: longer rows or lower "
            "clocks.",
            empty=COLD,
            decimals=2,
        ),
        lines(
            "Own compute, slowest five of the chosen ranks",
            "s",
            query(
                worst(f"{OWN}{{{RANKS}}}", f"avg_over_time({OWN}{{{RANKS}}}[$__range] @ end())"),
                "rank {{rank}}, {{node}}",
            ),
            about="The same names for long: those GPUs. Ever changing names: no straggler.",
            empty=COLD,
            decimals=2,
            legend=LegendPlacement.RIGHT,
        ),
    ]


def _share(phase: str) -> str:
    """PromQL: a phase's part of each rank's time. A part of all that is counted in two minutes, as ranks count once
    a step: of the seconds of the window, a step that ends in it would be too large a part."""
    spent = f"increase(moetrain_phase_seconds_total{{{RANKS}%s}}[2m])"
    of_phase, of_all = spent % f', phase="{phase}"', spent % ""
    return f"sum without (phase) ({of_phase}) / (sum without (phase) ({of_all}) > 0)"


def _waiting() -> list[Any]:
    return [
        heat(
            "Share of time each rank waits in exchanges",
            "percentunit",
            query(_share("collective_wait"), "{{rank}}"),
            about="A straggler is the dark line here: it arrives last and waits for nobody. All bright: the network.",
            empty=COLD,
            rows_are="rank",
            scheme="Blues",
            low=0,
            high=0.5,
            height=10,
            decimals=1,
        ),
        lines(
            "Waiting for data, worst five ranks",
            "percentunit",
            query(
                worst(
                    _share("data_wait"),
                    f'sum without (phase) (increase(moetrain_phase_seconds_total{{{RANKS}, phase="data_wait"}}'
                    "[$__range] @ end()))",
                ),
                "rank {{rank}}, {{node}}",
            ),
            about="Near zero is good. One node: its disk or file system client. All: too few loader workers.",
            empty=COLD,
            height=10,
            decimals=1,
            legend=LegendPlacement.RIGHT,
        ),
    ]


def _state() -> list[Any]:
    selected = 'run="$run", node=~"$node"'
    down = f'min by (node) (up{{job="moetrain", {selected}}}) == 0'
    memory = f"moetrain_gpu_memory_bytes{{{RANKS}, "
    return [
        states(
            "What each node does",
            query(f"({down}) or on (node) max by (node) ({phase_code(selected)})", "{{node}}"),
            phase_names(),
            about="All green is good. Red: at least one rank of the node does not answer.",
            empty="No targets",
            height=10,
        ),
        heat(
            "Peak memory of each rank over capacity",
            "percentunit",
            query(FULL, "{{rank}}"),
            about="Even is good. Bright lines: ranks with more experts' tokens, or a leak where a line grows brighter.",
            empty="No rank answers",
            rows_are="rank",
            low=0.5,
            high=1,
            height=10,
            decimals=0,
        ),
        lines(
            "Memory of the fullest rank",
            "bytes",
            query(f'max({memory}kind="allocated"}})', "allocated"),
            query(f'max({memory}kind="reserved"}})', "reserved"),
            query(f'max({memory}kind="peak"}})', "peak"),
            query(f"min(moetrain_gpu_memory_total_bytes{{{RANKS}}})", "capacity"),
            about="Much more reserved than allocated: fragmentation. Peak near capacity: smaller batches.",
            empty="No rank answers",
            height=10,
        ).override_by_name("capacity", dashed("red")),
    ]
