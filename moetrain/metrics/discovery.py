"""Service discovery: one file a run, in the format of Prometheus' `file_sd_configs`, names the endpoints of all ranks.

It is there from the start of a run to its clean end. A crash leaves it, so that Prometheus still asks for the ranks
and their silence raises an alert; the next start of the same run replaces it.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import logging
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Target(NamedTuple):
    """The endpoint of one rank."""

    rank: int
    node: str
    host: str
    """As Prometheus reaches it."""
    port: int
    scheme: str


def node_name() -> str:
    """Slurm's name of this node, or the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def reachable_host(bound: str) -> str:
    """Name or address under which others reach a server that listens on `bound`."""
    return node_name() if ipaddress.ip_address(bound.partition("%")[0]).is_unspecified else bound


def discovery_file(output_dir: str | Path, run: str, directory: str | None = None) -> Path:
    """The file of a run: runs of one name in two places do not share it.

    Args:
        directory: what Prometheus watches; None is `output_dir/discovery`.
    """
    place = str(Path(output_dir).absolute())
    name = re.sub(r"[^\w.-]", "_", run)
    digest = hashlib.sha256(place.encode()).hexdigest()[:8]
    return Path(directory or Path(output_dir) / "discovery") / f"moetrain-{name}-{digest}.json"


def write_targets(path: Path, run: str, targets: Sequence[Target]) -> bool:
    """Write the file, whole or not at all; a disk that does not take it is one warning. Whether it is there."""
    groups = []
    for target in sorted(targets):
        host = f"[{target.host}]" if ":" in target.host else target.host
        labels = {
            "run": run,
            "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
            "node": target.node,
            "rank": str(target.rank),
        }
        if target.scheme == "https":
            labels["__scheme__"] = "https"
        groups.append({"targets": [f"{host}:{target.port}"], "labels": labels})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # Prometheus watches *.json
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(groups, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s cannot be written, so Prometheus does not find this run: %s", path, error.strerror)
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True


def remove_targets(path: Path) -> None:
    """At a clean end: Prometheus forgets the ranks."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed, Prometheus will miss the ranks of this run: %s", path, error.strerror)
