"""What a preflight check gets: the node, its limits, and ways to ask it. Needs Python 3.11 and nothing else."""

from __future__ import annotations

import functools
import subprocess
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

COMMAND_SECONDS = 20.0
"""A driver that is stuck lets nvidia-smi hang."""
FAILED = (OSError, subprocess.SubprocessError)
"""How a command fails: it is missing, ends with an error, or does not end."""
_NOT_ASKED_RIGHT = (2, 3, 4, 13)
"""Exit codes of nvidia-smi that blame the question: unknown or unsupported field, or no permission."""


class Broken(Exception):
    """The node, not the question, is why a check could not be made."""


class Status(IntEnum):
    """Numbers of Nagios."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True)
class Limits:
    """What a healthy node does: the [preflight] table of the site file. The defaults are for 8 x H100 SXM."""

    gpus: int = 8
    nvlinks: int = 18
    gemm_tflops: float = 550.0
    memory_gb_per_second: float = 2500.0
    all_reduce_gb_per_second: float = 300.0
    gpu_pair_gb_per_second: float = 200.0
    pair_gb_per_second: float = 150.0
    disk_paths: tuple[str, ...] = ("/tmp",)
    free_gb: float = 50.0
    free_inodes: int = 100_000
    clock_skew_seconds: float = 1.0


@dataclass(frozen=True)
class Node:
    """What is checked: this machine, its limits, what the site file says elsewhere, and who its peers are."""

    limits: Limits = Limits()
    infiniband: tuple[str, ...] = ()
    infiniband_gbps: float = 400.0
    image: str | None = None
    image_sha256: str | None = None
    peers: tuple[tuple[str, str], ...] = ()
    """Name and address of every node of the job, the same on all."""
    name: str = ""
    root: Path = Path("/")
    """Where /sys and /dev are."""
    deadline: float = float("inf")
    """On the clock of `time.monotonic`."""

    def remaining(self) -> float:
        return max(self.deadline - time.monotonic(), 0.1)

    def has_gpus(self) -> bool:
        """Whether the PCI bus has an NVIDIA GPU, whatever the driver says."""
        for device in (self.root / "sys/bus/pci/devices").glob("*"):
            if not (device / "vendor").is_file():
                continue
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == "0x10de" and kind.startswith("0x03"):  # display controllers; NVSwitches are bridges
                return True
        return False


Measured = Mapping[str, Any]
Result = tuple[Status, str] | tuple[Status, str, Measured]
"""A verdict, a line for people, and the figures behind it where there are some."""
OK, WARNING, CRITICAL, UNKNOWN = Status


@functools.cache
def query(node: Node, table: str, fields: str) -> list[list[str]]:
    """One row a GPU of what nvidia-smi says.

    Raises:
        Broken: nvidia-smi does not answer on a machine that has GPUs.
        OSError, subprocess.SubprocessError: there is none, or it does not know the fields.
    """
    output = nvidia_smi(node, f"--query-{table}={fields}", "--format=csv,noheader,nounits")
    return [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.strip()]


def nvidia_smi(node: Node, *arguments: str) -> str:
    """Its output; raises as `query` does."""
    try:
        return command("nvidia-smi", *arguments)
    except subprocess.CalledProcessError as error:
        if error.returncode in _NOT_ASKED_RIGHT or not node.has_gpus():
            raise
        raise Broken(f"nvidia-smi: {why(error)}") from error
    except subprocess.TimeoutExpired as error:
        raise Broken(f"nvidia-smi: {why(error)}") from error


def command(*words: str, timeout: float = COMMAND_SECONDS) -> str:
    """Standard output of a command that must succeed."""
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=True).stdout


def why(error: Exception) -> str:
    """A failed command in a few words."""
    if isinstance(error, FileNotFoundError):
        return f"{Path(str(error.filename)).name} is not installed here"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or error.stdout or "").strip().splitlines()
        return lines[-1] if lines else f"ended with {error.returncode}"
    return str(error)


def read_site(path: str | Path) -> Node:
    """What the site file says of nodes.

    Raises:
        ValueError: it is missing, no TOML, or [preflight] has an unknown key.
    """
    try:
        site = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    table = site.get("preflight", {})
    if unknown := sorted(table.keys() - asdict(Limits()).keys()):
        raise ValueError(f"{path}: preflight.{unknown[0]}: unknown key; valid: {', '.join(asdict(Limits()))}")
    limits = replace(Limits(), **table | {"disk_paths": tuple(table.get("disk_paths", Limits.disk_paths))})
    network, container = site.get("infiniband", {}), site.get("container", {})
    return Node(
        limits,
        infiniband=tuple(network.get("devices", ())),
        infiniband_gbps=network.get("gbps", Node.infiniband_gbps),
        image=container.get("image"),
        image_sha256=container.get("sha256"),
    )
