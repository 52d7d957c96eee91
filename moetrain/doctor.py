"""What is installed, which GPUs there are, which optional backends are usable, and for the rest why not.

Prints no host or user names, paths or environment variables: its output is made to be pasted into an issue.
"""

from __future__ import annotations

import importlib
import json
import logging
import platform
import re
import shutil
import tomllib
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moetrain.backends import deep_ep, transformer_engine

PACKAGES = (
    "moetrain",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "torchao",
    "liger_kernel",
    "mamba_ssm",
    "causal_conv1d",
    "transformer_engine",
    "deep_ep",
)
NEEDS_GPU = "needs a GPU"
_DIRECTORIES = re.compile(r"(?:/[\w.@+~-]+)+/|[A-Za-z]:\\\S*\\")


@dataclass(frozen=True)
class Backend:
    """An optional part. `why` is empty where it is usable, else the reason and how to get it."""

    name: str
    gives: str
    usable: bool
    why: str = ""


def examine(as_json: bool = False, console: Console | None = None, chosen: list[tuple[str, str]] | None = None) -> int:
    """Print the examination; returns 0 if training can run here, 1 if something that it needs is missing.

    Args:
        chosen: what a run would use, by name, to be printed with it.
    """
    console = console or Console()
    problems = find_problems()
    found = {
        "versions": versions(),
        "pinned": pinned(),
        "gpus": gpus(),
        "no_gpu_because": why_no_gpu(),
        "backends": [asdict(backend) for backend in backends()],
        "problems": problems,
    }
    if chosen is not None:
        found["run"] = chosen
    if as_json:
        console.print_json(json.dumps(found))
    else:
        _print_tables(console, found)
    return 1 if problems else 0


def versions() -> dict[str, str | None]:
    """Version of each package and of the libraries inside torch; None where it is missing."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES}
    found["cuda"] = torch.version.cuda
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
    found["nccl"] = ".".join(map(str, nccl)) if nccl else None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
    found["cudnn"] = str(cudnn) if cudnn else None
    return found


def pinned() -> dict[str, str]:
    """Versions of containers/versions.lock by package, for torch's build here; empty where there is no such file."""
    import torch

    for root in (Path.cwd(), Path(__file__).parents[1]):
        file = root / "containers/versions.lock"
        if file.is_file():
            lock = tomllib.loads(file.read_text(encoding="utf-8"))
            pins = lock["python"] | lock["gpu" if torch.version.cuda else "cpu"]
            found = {name: pins.get(name.replace("_", "-"), lock["sources"].get(name)) for name in PACKAGES}
            return {name: pin["version"] for name, pin in found.items() if pin}
    return {}


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes and compute capability of each GPU, and the number of others that it reaches directly."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = []
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "peers": sum(torch.cuda.can_device_access_peer(i, j) for j in range(count) if j != i),
            }
        )
    return found


def why_no_gpu() -> str:
    """Empty where torch can use a GPU, else the reason."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available() and torch.cuda.device_count():
            return ""
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver on this machine; training runs on the CPU"
    if torch.version.cuda is None:
        return "this torch is built for CPUs only; install the build for your CUDA version"
    if caught:
        return _without_directories(str(caught[0].message)).split("(Triggered")[0].strip()
    return "torch sees no GPU; is CUDA_VISIBLE_DEVICES set to nothing, or the container started without GPUs?"


def backends() -> list[Backend]:
    """Every optional part: communication, then experts, loss, state-space layers and optimizer."""
    import torch
    import torch.distributed as dist

    gpu = not why_no_gpu()
    no_build = "torch is built without it"
    gloo, nccl = dist.is_gloo_available(), dist.is_nccl_available()
    grouped = hasattr(torch.nn.functional, "grouped_mm")
    compiled = "pip install --no-build-isolation"
    return [
        Backend("gloo", "communication between CPU ranks", gloo, "" if gloo else no_build),
        Backend("nccl", "communication between GPUs", gpu and nccl, NEEDS_GPU if not gpu else "" if nccl else no_build),
        Backend("grouped_mm", "experts in one call", grouped, "" if grouped else "needs torch 2.10 or newer"),
        _package("triton", "fused kernels of the expert layer", "pip install triton", gpu),
        _package("liger_kernel", "fused linear cross entropy", "pip install liger-kernel", gpu),
        _package("mamba_ssm", "Mamba-2 layers in place of our kernels", f"{compiled} mamba-ssm", gpu),
        _package("causal_conv1d", "convolutions of Mamba and linear attention", f"{compiled} causal-conv1d", gpu),
        _package("torchao", "8-bit optimizer states", "pip install torchao"),
        _own("transformer_engine", "attention, projections and norms (--kernels te)", transformer_engine.missing()),
        _own("deep_ep", "tokens to their experts over NVLink and RDMA (--dispatch deepep)", deep_ep.missing()),
    ]


def find_problems() -> list[str]:
    """What training needs and does not find: packages outside the range that moetrain declares."""
    problems = []
    try:
        requirements = [Requirement(text) for text in metadata.requires("moetrain") or []]
    except metadata.PackageNotFoundError:
        return []  # run from its source; what is missing shows in the table of versions
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is missing; pip install '{requirement}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}; pip install '{requirement}'")
    return problems


def _own(name: str, gives: str, why: str | None) -> Backend:
    """A backend that says itself why it cannot be used."""
    return Backend(name, gives, why is None, _without_directories(why or ""))


def _package(name: str, gives: str, remedy: str, runs_here: bool = True) -> Backend:
    """A backend that is a package: it must be installed and import, and `runs_here` says whether its GPU is there."""
    if not runs_here:
        return Backend(name, gives, False, NEEDS_GPU)
    if _version(name) is None:
        return Backend(name, gives, False, f"not installed; {remedy}")
    logging.disable(logging.CRITICAL)  # some packages log the directories of what they could not load
    try:
        importlib.import_module(name)
    except Exception as error:  # a compiled package fails in its own ways; the doctor reports them all
        text = _without_directories(f"{type(error).__name__}: {error}").splitlines()[0]
        return Backend(name, gives, False, f"installed, but does not import: {text}")
    finally:
        logging.disable(logging.NOTSET)
    return Backend(name, gives, True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _without_directories(text: str) -> str:
    """`/home/ann/lib/x.so: not found` becomes `x.so: not found`."""
    return _DIRECTORIES.sub("", text)


def _print_tables(console: Console, found: dict[str, Any]) -> None:
    table = Table("package", "version", "pinned", box=None, pad_edge=False)
    for name, version in found["versions"].items():
        pin = found["pinned"].get(name, "")
        # A build of a pinned version has more after it: 2.0.0+dd758ca.
        same = not version or version == pin or version.startswith(f"{pin}+")
        table.add_row(name, version or "[dim]-[/]", f"[dim]{pin}[/]" if same else pin)
    console.print(table)

    console.print()
    for i, gpu in enumerate(found["gpus"]):
        size = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        console.print(f"GPU {i}: {gpu['name']}, {size}, capability {gpu['capability']}, {gpu['peers']} direct peers")
    if not found["gpus"]:
        console.print(f"no GPU: {found['no_gpu_because']}", soft_wrap=True)

    table = Table("backend", "for", "usable", box=None, pad_edge=False)
    for backend in found["backends"]:
        table.add_row(
            backend["name"], backend["gives"], "[green]yes[/]" if backend["usable"] else f"no: {backend['why']}"
        )
    console.print()
    console.print(table)

    if found.get("run"):
        console.print("\n[bold]this run[/]")
        for name, text in found["run"]:
            console.print(f"{name:<10}{escape(text)}", soft_wrap=True)

    console.print()
    for problem in found["problems"]:
        console.print(f"[red]problem:[/] {problem}", soft_wrap=True)
    if not found["problems"]:
        console.print("[green]ready to train[/]")
