"""What dcgm-exporter and node_exporter would say of a simulated node.

The GPUs' metrics are those of dcgm-counters.csv, no more and no fewer, so a rule or a panel that asks for another one
finds nothing here either.
"""

from __future__ import annotations

import csv
import functools
import math
from pathlib import Path
from typing import NamedTuple

from monitoring.demo.faults import active
from monitoring.demo.run import MEMORY, Run

COUNTERS_FILE = Path(__file__).parents[1] / "dcgm-counters.csv"
MEBIBYTE = 2**20
DRIVER = "580.95.05"


class Counter(NamedTuple):
    """A line of dcgm-counters.csv."""

    name: str
    kind: str
    """counter, gauge, or label for what becomes a label of the others."""
    text: str


@functools.cache
def read_counters(path: Path = COUNTERS_FILE) -> list[Counter]:
    """The counters in the file.

    Raises:
        ValueError: a line is not a name, a kind and a text; dcgm-exporter would not start.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
    counters = []
    for row in csv.reader(lines, skipinitialspace=True):
        if len(row) != 3 or row[1] not in ("counter", "gauge", "label"):
            raise ValueError(f"{path.name}: {row} is not NAME, counter|gauge|label, HELP")
        counters.append(Counter(*row))
    return counters


def dcgm_page(run: Run, node: str, seconds: float) -> bytes:
    """The text of dcgm-exporter's `/metrics` on a node."""
    first = run.shape.node_names.index(node) * run.shape.gpus
    lines = []
    samples = {gpu: gpu_samples(run, first + gpu, seconds) for gpu in range(run.shape.gpus)}
    for counter in read_counters():
        if counter.kind == "label":
            continue
        lines += [f"# HELP {counter.name} {counter.text}", f"# TYPE {counter.name} {counter.kind}"]
        for gpu, values in samples.items():
            labels = (
                f'gpu="{gpu}",UUID="GPU-{first + gpu:08x}",device="nvidia{gpu}",modelName="NVIDIA H200",'
                f'Hostname="{node}",DCGM_FI_DRIVER_VERSION="{DRIVER}"'
            )
            if counter.name == "DCGM_EXP_XID_ERRORS_TOTAL":  # has a series for each code that came
                if not values[counter.name]:
                    continue
                labels += ',xid="79"'
            lines.append(f"{counter.name}{{{labels}}} {values[counter.name]:.12g}")
    return ("\n".join(lines) + "\n").encode()


def gpu_samples(run: Run, rank: int, seconds: float) -> dict[str, float]:
    """Values of a GPU by metric name."""
    hit = rank == run.victim
    trouble = active(run.faults, seconds) if hit else frozenset()
    busy, work = float(run.busy(seconds)), run.work(rank, seconds)
    wobble = 1 + 0.03 * math.sin(seconds / 7 + rank)
    hot = "throttle" in trouble
    used = 0.86 * MEMORY / MEBIBYTE
    trouble_seconds = sum(
        min(seconds, fault.end) - fault.begin
        for fault in run.faults
        if hit and fault.name == "throttle" and fault.begin <= seconds
    )

    def came(name: str) -> int:
        return run.begun(name, seconds) if hit else 0

    xids = came("xid")
    return {
        "DCGM_FI_DEV_SM_CLOCK": 1980 - 500 * hot,
        "DCGM_FI_DEV_MEM_CLOCK": 3201,
        "DCGM_FI_DEV_GPU_TEMP": (34 + 30 * work) * wobble + 22 * hot,
        "DCGM_FI_DEV_MEMORY_TEMP": (40 + 34 * work) * wobble + 18 * hot,
        "DCGM_FI_DEV_POWER_USAGE": (110 + 540 * work) * wobble * (1 - 0.3 * hot),
        "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": 4e11 + 640e3 * seconds,
        "DCGM_FI_DEV_POWER_VIOLATION": 2e8 * seconds,
        "DCGM_FI_DEV_THERMAL_VIOLATION": 4e8 * trouble_seconds,
        "DCGM_FI_DEV_BOARD_LIMIT_VIOLATION": 0,
        "DCGM_FI_DEV_RELIABILITY_VIOLATION": 0,
        "DCGM_FI_DEV_GPU_UTIL": 99 * busy,
        "DCGM_FI_PROF_GR_ENGINE_ACTIVE": 0.97 * busy,
        "DCGM_FI_PROF_SM_ACTIVE": 0.82 * work * wobble,
        "DCGM_FI_PROF_SM_OCCUPANCY": 0.31 * work * wobble,
        "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0.38 * work * wobble,
        "DCGM_FI_PROF_DRAM_ACTIVE": 0.44 * work * wobble,
        "DCGM_FI_PROF_NVLINK_TX_BYTES": 7.5e10 * work * wobble,
        "DCGM_FI_PROF_NVLINK_RX_BYTES": 7.4e10 * work * wobble,
        "DCGM_FI_PROF_PCIE_TX_BYTES": 1.1e9 * work * wobble,
        "DCGM_FI_PROF_PCIE_RX_BYTES": 0.9e9 * work * wobble,
        "DCGM_FI_DEV_FB_USED": used,
        "DCGM_FI_DEV_FB_FREE": MEMORY / MEBIBYTE - used - 600,
        "DCGM_FI_DEV_FB_RESERVED": 600,
        "DCGM_FI_DEV_XID_ERRORS": 79 if xids else 0,
        "DCGM_EXP_XID_ERRORS_TOTAL": xids,
        "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": 0,
        "DCGM_FI_DEV_ECC_SBE_VOL_TOTAL": rank % 3,
        "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL": came("ecc"),
        "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS": came("ecc"),
        "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS": 0,
        "DCGM_FI_DEV_ROW_REMAP_FAILURE": 0,
        "DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL": 0,
        "DCGM_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL": 0,
        "DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL": 40 * came("nvlink"),
        "DCGM_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL": came("nvlink"),
    }


NODE_METRICS = {
    "node_infiniband_state_id": "gauge",
    "node_infiniband_physical_state_id": "gauge",
    "node_infiniband_rate_bytes_per_second": "gauge",
    "node_infiniband_port_data_received_bytes_total": "counter",
    "node_infiniband_port_data_transmitted_bytes_total": "counter",
    "node_infiniband_port_transmit_wait_total": "counter",
    "node_infiniband_port_errors_received_total": "counter",
    "node_infiniband_symbol_error_total": "counter",
    "node_infiniband_link_downed_total": "counter",
    "node_infiniband_link_error_recovery_total": "counter",
    "node_load1": "gauge",
    "node_memory_MemTotal_bytes": "gauge",
    "node_memory_MemAvailable_bytes": "gauge",
}


def node_page(run: Run, node: str, seconds: float) -> bytes:
    """The text of node_exporter's `/metrics` on a node: an InfiniBand adapter a GPU, and a few of the machine's."""
    hit = node == run.shape.node(run.victim)
    lines = []
    for name, kind in NODE_METRICS.items():
        lines += [f"# HELP {name} Simulated.", f"# TYPE {name} {kind}"]
        if name.startswith("node_infiniband"):
            for port in range(run.shape.gpus):
                down = run.begun("infiniband", seconds) if hit and port == run.victim % run.shape.gpus else 0
                value = port_value(name.removeprefix("node_infiniband_"), run.exchanging, down)
                lines.append(f'{name}{{device="mlx5_{port}",port="1"}} {value:.12g}')
        else:
            lines.append(f"{name} {machine_value(name, run.busy(seconds)):.12g}")
    return ("\n".join(lines) + "\n").encode()


def port_value(name: str, exchanging: float, went_down: int) -> float:
    """A port of 400 Gbit/s at a third of its rate while it is used, which was so many seconds."""
    values = {
        "state_id": 4,
        "physical_state_id": 5,
        "rate_bytes_per_second": 5e10,
        "port_data_received_bytes_total": 1.6e10 * exchanging,
        "port_data_transmitted_bytes_total": 1.6e10 * exchanging,
        "port_transmit_wait_total": 2e5 * exchanging,
        "link_downed_total": 2 + went_down,
        "link_error_recovery_total": went_down,
    }
    return values.get(name, 0)


def machine_value(name: str, busy: bool) -> float:
    return {"node_load1": 12.0 * busy + 1, "node_memory_MemTotal_bytes": 2.1e12}.get(name, 1.7e12)
