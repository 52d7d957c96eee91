"""What can go wrong in a simulated run, and when."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ALERT_OF = {
    "stall": "TrainingStalled",
    "slow-save": "PhaseStalled",
    "rank-down": "RankDown",
    "node-loss": "RankDown",
    "crash": "AllTargetsGone",
    "vanish": "RunDisappeared",
    "restart-loop": "RestartLoop",
    "slow": "ThroughputRegression",
    "below-plan": "BelowPlan",
    "straggler": "StragglerRank",
    "nan": "NonFiniteLoss",
    "loss-spike": "LossSpike",
    "dead-expert": "DeadExperts",
    "busy-expert": "OverloadedExperts",
    "memory": "MemoryHeadroomLow",
    "overflow": "RepeatedOverflow",
    "no-checkpoint": "CheckpointTooOld",
    "failed-checkpoint": "CheckpointFailed",
    "xid": "GpuXid",
    "ecc": "GpuEccUncorrectable",
    "nvlink": "NvlinkErrors",
    "infiniband": "InfinibandErrors",
    "throttle": "GpuThrottled",
    "exporter-down": "HardwareExporterDown",
}
"""The alert that each fault raises. The others it brings about are silenced by it, as alertmanager.yml says."""


@dataclass(frozen=True)
class Fault:
    """A fault of a run, while `begin <= seconds < end`."""

    name: str
    begin: float = 0.0
    end: float = math.inf


def parse_fault(text: str) -> Fault:
    """`NAME`, `NAME@BEGIN` or `NAME@BEGIN-END`, in seconds after the start of the demo.

    Raises:
        ValueError: no such fault, or not a time; the message has the choices.
    """
    name, _, when = text.partition("@")
    if name not in ALERT_OF:
        raise ValueError(f"there is no fault {name!r}; there are {', '.join(ALERT_OF)}")
    begin, _, end = when.partition("-")
    try:
        fault = Fault(name, float(begin or 0), float(end or math.inf))
    except ValueError:
        raise ValueError(f"{text}: {when!r} is not BEGIN or BEGIN-END in seconds, such as {name}@60-300") from None
    if not 0 <= fault.begin < fault.end:
        raise ValueError(f"{text} ends before it begins; write {name}@BEGIN-END in seconds, such as {name}@60-300")
    return fault


def timetable(names: Iterable[str], first: float, lasts: float, pause: float) -> list[Fault]:
    """One fault after the other, `pause` seconds apart."""
    return [
        Fault(name, first + place * (lasts + pause), first + place * (lasts + pause) + lasts)
        for place, name in enumerate(names)
    ]


def begun(faults: Iterable[Fault], name: str, seconds: float) -> int:
    """How often a fault has come until now."""
    return sum(fault.name == name and fault.begin <= seconds for fault in faults)


def active(faults: Iterable[Fault], seconds: float) -> frozenset[str]:
    """Names of those that are there."""
    return frozenset(fault.name for fault in faults if fault.begin <= seconds < fault.end)
