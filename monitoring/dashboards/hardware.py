"""Hardware and fabric: do GPUs, links and nodes do what they should?

GPU metrics come from dcgm-exporter with the project's own list of counters, InfiniBand's from node_exporter.
"""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.models.common import LegendPlacement

from monitoring.dashboards.page import events, nodes, one_run, page
from monitoring.dashboards.panels import Column, heat, lines, listing, number
from monitoring.dashboards.queries import NODES, now, query, rows, worst
from monitoring.dashboards.style import ANY_IS_BAD

UID = "moetrain-hardware"
NO_DCGM = "No dcgm-exporter on these nodes"
NO_IB = "No InfiniBand seen by node_exporter"
GPU = "{{node}} GPU {{gpu}}"
PORT = "{{node}} {{device}}:{{port}}"


def dashboard() -> dict[str, Any]:
    """The nodes of one run; alerts of the hardware are marked in every panel."""
    about = (
        "GPUs, links and nodes of the run. A slow rank of 'Ranks and stragglers' has its reason here or in its code."
    )
    sections = [
        ("Now", _now()),
        ("GPUs at work", _work()),
        ("Power and heat", _heat()),
        ("Links", _links()),
        ("Errors", _errors()),
    ]
    return page(UID, "Hardware and fabric", about, sections, [one_run(), nodes()], annotations=events())


def _now() -> list[Any]:
    return [
        number(
            "GPUs seen",
            "none",
            now(f"count(DCGM_FI_DEV_GPU_TEMP{{{NODES}}})"),
            about="Should be the ranks of the run. Fewer: a GPU fell off its bus, or a dcgm-exporter is down.",
            empty=NO_DCGM,
            decimals=0,
        ),
        number(
            "Tensor cores active",
            "percentunit",
            query(f"avg(DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{{{NODES}}})"),
            about="Share of cycles in which tensor cores work. Far above MFU: time lost in other precisions or "
            "recomputing.",
            empty=NO_DCGM,
            decimals=1,
        ),
        number(
            "Hottest GPU",
            "celsius",
            query(f"max(DCGM_FI_DEV_GPU_TEMP{{{NODES}}})"),
            about="From about 85 C GPUs lower their clocks.",
            empty=NO_DCGM,
            steps=((None, "green"), (80, "orange"), (87, "red")),
            decimals=0,
        ),
        number(
            "Power, all GPUs",
            "watt",
            query(f"sum(DCGM_FI_DEV_POWER_USAGE{{{NODES}}})"),
            about="Level in training. A dip is an evaluation, a checkpoint or a stall.",
            empty=NO_DCGM,
            decimals=1,
        ),
        number(
            "GPUs with an Xid",
            "none",
            now(f"count(DCGM_FI_DEV_XID_ERRORS{{{NODES}}} > 0) or 0 * count(DCGM_FI_DEV_XID_ERRORS{{{NODES}}})"),
            about="GPUs whose driver reported an error since it was loaded; the list below has the codes.",
            empty=NO_DCGM,
            steps=ANY_IS_BAD,
            decimals=0,
        ),
        number(
            "InfiniBand links that went down",
            "none",
            now(f"sum(increase(node_infiniband_link_downed_total{{{NODES}}}[$__range]))"),
            about="In this time range. Any: cable or switch port; every exchange over it stalls meanwhile.",
            empty=NO_IB,
            steps=ANY_IS_BAD,
            decimals=0,
        ),
    ]


def _work() -> list[Any]:
    return [
        heat(
            "Tensor cores active, each GPU",
            "percentunit",
            query(
                "avg by (place) (label_join("
                f'DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{{{NODES}}}, "place", " GPU ", "node", "gpu"))',
                "{{place}}",
            ),
            about="Even is good. A line brighter than the others: a slow GPU, always busy while they wait for it. "
            "A dark line: a GPU without work. All dark for a while: data, checkpoint, stall.",
            empty=NO_DCGM,
            rows_are="GPU",
            low=0,
            width=24,
            height=10,
            decimals=0,
        ),
        lines(
            "Busy: tensor cores, SMs, memory",
            "percentunit",
            query(f"avg(DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{{{NODES}}})", "tensor cores"),
            query(f"avg(DCGM_FI_PROF_SM_ACTIVE{{{NODES}}})", "SMs"),
            query(f"avg(DCGM_FI_PROF_DRAM_ACTIVE{{{NODES}}})", "memory"),
            about="Mean of the GPUs. SMs busy but tensor cores not: small or memory-bound kernels.",
            empty=NO_DCGM,
        ),
        lines(
            "SM clock, slowest five GPUs",
            "hertz",
            query(f"1e6 * ({worst(*_lowest('DCGM_FI_DEV_SM_CLOCK'))})", GPU),
            about="All alike is good. One lower for long: power or heat; see below.",
            empty=NO_DCGM,
            from_zero=False,
            legend=LegendPlacement.RIGHT,
        ),
    ]


def _heat() -> list[Any]:
    return [
        lines(
            "Temperature, hottest five GPUs",
            "celsius",
            query(worst(*_highest("DCGM_FI_DEV_GPU_TEMP")), GPU),
            about="Below 80 C is good. One node: its cooling.",
            empty=NO_DCGM,
            from_zero=False,
            legend=LegendPlacement.RIGHT,
        ),
        lines(
            "Power of a GPU",
            "watt",
            query(f"max(DCGM_FI_DEV_POWER_USAGE{{{NODES}}})", "highest"),
            query(f"avg(DCGM_FI_DEV_POWER_USAGE{{{NODES}}})", "mean"),
            query(f"min(DCGM_FI_DEV_POWER_USAGE{{{NODES}}})", "lowest"),
            about="Near the limit in training is good: work is not waiting. The lowest far off: that GPU waits.",
            empty=NO_DCGM,
        ),
        lines(
            "Time slowed down by heat or a fault, worst five GPUs",
            "percentunit",
            query(f"({worst(*_growth('DCGM_FI_DEV_THERMAL_VIOLATION'))}) / 1e9 < 10", f"{GPU} heat"),
            query(f"({worst(*_growth('DCGM_FI_DEV_RELIABILITY_VIOLATION'))}) / 1e9 < 10", f"{GPU} reliability"),
            about="Zero is good. Any for long: that GPU or its node's cooling; a straggler follows.",
            empty=NO_DCGM,
            width=24,
            legend=LegendPlacement.RIGHT,
        ),
    ]


def _links() -> list[Any]:
    return [
        lines(
            "NVLink of a GPU",
            "Bps",
            query(f"avg(DCGM_FI_PROF_NVLINK_TX_BYTES{{{NODES}}})", "sent, mean"),
            query(f"avg(DCGM_FI_PROF_NVLINK_RX_BYTES{{{NODES}}})", "received, mean"),
            query(f"max(DCGM_FI_PROF_NVLINK_TX_BYTES{{{NODES}}})", "sent, most"),
            about="Dispatch and combine inside a node. Sent and received alike is good; the most far above the mean: "
            "an overloaded expert's GPU.",
            empty=NO_DCGM,
        ),
        lines(
            "InfiniBand of a node",
            "Bps",
            query(_by_node("port_data_transmitted_bytes_total", "avg"), "sent, mean"),
            query(_by_node("port_data_received_bytes_total", "avg"), "received, mean"),
            query(_by_node("port_data_transmitted_bytes_total", "min"), "sent, least"),
            about="Exchanges between nodes, all ports. The least far below the mean: a node with a link down.",
            empty=NO_IB,
        ),
        lines(
            "InfiniBand: waits to send, worst five ports",
            "short",
            query(
                f"topk(5, rate(node_infiniband_port_transmit_wait_total{{{NODES}}}[5m]))",
                "{{node}} {{device}}:{{port}}",
            ),
            about="Ticks a second a port had data and no credit. One switch's nodes: congestion there.",
            empty=NO_IB,
            legend=LegendPlacement.RIGHT,
        ),
        lines(
            "InfiniBand: errors, worst five ports",
            "short",
            query(
                f"topk(5, rate(node_infiniband_port_errors_received_total{{{NODES}}}[5m]))",
                "{{node}} {{device}}:{{port}}",
            ),
            about="Zero is good. Any for long: a bad cable or transceiver.",
            empty=NO_IB,
            legend=LegendPlacement.RIGHT,
        ),
    ]


def _errors() -> list[Any]:
    columns = {
        "node": Column("Node"),
        "gpu": Column("GPU", width=60),
        "Value": Column("Last Xid", "none", ((None, "red"),), width=90, decimals=0),
    }
    return [
        listing(
            "Xid errors",
            columns,
            rows(f"DCGM_FI_DEV_XID_ERRORS{{{NODES}}} > 0"),
            about="48, 63, 64, 94, 95: memory. 74: NVLink. 79: fell off the bus. 31, 43, 45: often the program. "
            "For the first three groups drain the node and look in its kernel log.",
            empty="No Xid reported",
        ),
        lines(
            "Errors of memory and NVLink",
            "none",
            query(f"sum(increase(DCGM_FI_DEV_ECC_DBE_VOL_TOTAL{{{NODES}}}[5m]))", "uncorrectable ECC"),
            query(f"sum(increase(DCGM_FI_DEV_ECC_SBE_VOL_TOTAL{{{NODES}}}[5m]))", "corrected ECC"),
            query(f"sum(increase(DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL{{{NODES}}}[5m]))", "NVLink CRC"),
            query(f"sum(increase(DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL{{{NODES}}}[5m]))", "NVLink replays"),
            about="In five minutes, all GPUs. Corrected ones are common; any uncorrectable one: drain the node.",
            empty=NO_DCGM,
        ),
    ]


def _by_node(counter: str, over_nodes: str) -> str:
    return f"{over_nodes}(sum by (node) (rate(node_infiniband_{counter}{{{NODES}}}[2m])))"


def _highest(gauge: str) -> tuple[str, str]:
    """A gauge, and what says which series matter."""
    return f"{gauge}{{{NODES}}}", f"avg_over_time({gauge}{{{NODES}}}[$__range] @ end())"


def _lowest(gauge: str) -> tuple[str, str]:
    return f"{gauge}{{{NODES}}}", f"-avg_over_time({gauge}{{{NODES}}}[$__range] @ end())"


def _growth(counter: str) -> tuple[str, str]:
    return f"rate({counter}{{{NODES}}}[5m])", f"increase({counter}{{{NODES}}}[$__range] @ end())"
