"""What a preflight check gets: the node, its limits, and ways to ask it. Needs Python 3.11 and nothing else."""

from __future__ import annotations

import functools
import subprocess
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

COMMAND_SECONDS = 20.0
"""A driver that is stuck lets nvidia-smi hang."""
MEASURING_SECONDS = 75.0
"""What torch measures on a node: once on its GPUs, once between them. Healthy: all checks of 4 H200 take 21 s; the rest
is for importing torch from a shared file system that is busy."""
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
    """What a healthy node does: the [preflight] table of the site file. The defaults are for 8 x H100 SXM.

    Rates are about 85 % of the slowest that a healthy node of 4 H200 showed (docs/measured.md, "A node before a run").
    """

    gpus: int = 8
    nvlinks: int = 18
    """Of an H100 or H200, 25 GB/s each in one direction (datasheet: 450 together)."""
    gemm_tflops: float = 550.0
    """646 to 654 measured; an H100 SXM has the H200's tensor cores."""
    memory_gb_per_second: float = 2500.0
    """An H200 copies at 4,269, 89 % of its datasheet's 4,800; that share of an H100's 3,350 is 2,980. An H200 that
    copies no faster than this is sick: set 3,600 there."""
    all_reduce_gb_per_second: float = 300.0
    """353 measured on four; eight are faster (Azure's node checks ask 460 of 8 H100, with NVLink SHARP)."""
    gpu_pair_gb_per_second: float = 240.0
    """288 to 306 measured."""
    pair_gb_per_second: float = 150.0
    """Not measured. Eight ports of 400 Gb/s carry 400; less than 150 is TCP, or NCCL left most adapters unused. That
    one adapter is slow, `infiniband` sees."""
    disk_paths: tuple[str, ...] = ("/tmp",)
    free_gb: float = 50.0
    """An allowance for compiled kernels, logs and tokenised data; a checkpoint needs more, as `moetrain plan` says."""
    free_inodes: int = 100_000
    """An allowance: caches of compiled kernels are thousands of small files for each rank."""
    clock_skew_seconds: float = 1.0
    """An allowance: a time server keeps nodes within milliseconds, and logs of ranks are put in order by seconds."""


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

    def remaining(self, most: float = float("inf")) -> float:
        """Seconds until the deadline, or `most`."""
        return min(max(self.deadline - time.monotonic(), 0.1), most)

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
P = ParamSpec("P")
T = TypeVar("T")


def once(ask: Callable[P, T]) -> Callable[P, T]:
    """`functools.cache` for failures too: what has hung once is not waited for again."""

    def attempt(*args: P.args, **kwargs: P.kwargs) -> tuple[T, None] | tuple[None, Exception]:
        try:
            return ask(*args, **kwargs), None
        except Exception as error:
            return None, error

    outcome: Any = functools.cache(attempt)

    @functools.wraps(ask)
    def known(*args: P.args, **kwargs: P.kwargs) -> T:
        found, error = outcome(*args, **kwargs)
        if error is not None:
            raise error
        result: T = found
        return result

    known.cache_clear = outcome.cache_clear  # type: ignore[attr-defined]
    return known


@once
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
