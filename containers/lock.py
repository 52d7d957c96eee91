"""The pins of versions.lock: read here, and turned into what pip reads.

    python containers/lock.py constraints            # constraints.txt
    python containers/lock.py requirements gpu       # what the GPU image installs, with hashes
    python containers/lock.py digest                 # SHA-256 of the lock, a label of each image

Needs nothing but Python, because the first stage of an image runs it before any package is there.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCK = Path(__file__).with_name("versions.lock")
TARGETS = ("gpu", "cpu")
NVIDIA = re.compile(r"nvidia-|cuda-")
HEADER = (
    "# Written by `make lock` from containers/versions.lock: every package of the environment, as pip's constraints.\n"
)
UNPINNED = {"wandb"}
"""Extras that neither images nor tests have: a client of a service, which that service's account holder installs."""


@dataclass(frozen=True)
class Package:
    """A Python package of the lock. `hashes` are the SHA-256 of its files for the images' Pythons on Linux x86_64."""

    name: str
    version: str
    why: str
    hashes: tuple[str, ...]
    test: bool = False
    """Only tests and checks need it."""
    source: bool = False
    """Comes as source and is compiled in the image."""


def read(path: Path = LOCK) -> dict[str, Any]:
    """The lock: tables `images`, `system`, `sources`, and `python`, `gpu`, `cpu` of Python packages.

    Raises:
        ValueError: a pin without a reason, or without a value and a reason why it is unknown.
    """
    lock = tomllib.loads(path.read_text(encoding="utf-8"))
    for table in ("images", "system", "sources", "python", *TARGETS):
        for name, pin in lock[table].items():
            if not pin.get("why"):
                raise ValueError(f"{path.name}: [{table}.{name}] needs `why`, a line of reason")
            if "unknown" in (pin.get("digest"), pin.get("archive_sha256")) and not pin.get("unknown_because"):
                raise ValueError(f"{path.name}: [{table}.{name}] has an unknown hash and needs `unknown_because`")
    return lock


def digest(path: Path = LOCK) -> str:
    """SHA-256 of the file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def packages(lock: dict[str, Any], target: str) -> dict[str, Package]:
    """All Python packages of a target, by name: those of both, then its own.

    Raises:
        ValueError: an unknown target, a package in both tables, or one without a well-formed hash.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r}; choose from: {', '.join(TARGETS)}")
    if twice := lock["python"].keys() & lock[target].keys():
        raise ValueError(f"pinned in [python] and in [{target}]: {', '.join(sorted(twice))}; every pin stands once")
    found = {}
    for name, pin in sorted((lock["python"] | lock[target]).items()):
        if not pin["sha256"] or not all(re.fullmatch("[0-9a-f]{64}", text) for text in pin["sha256"]):
            raise ValueError(f"{name}: `sha256` must list hashes of 64 hexadecimal digits")
        found[name] = Package(
            name, pin["version"], pin["why"], tuple(pin["sha256"]), pin.get("test", False), pin.get("source", False)
        )
    return found


def declared(project: dict[str, Any]) -> list[str]:
    """Requirements of a pyproject.toml that the lock pins: those of the package and of all extras but `UNPINNED`."""
    extras = project["project"]["optional-dependencies"].items()
    optional = [line for extra, lines in extras if extra not in UNPINNED for line in lines]
    return [*project["project"]["dependencies"], *optional]


def image(lock: dict[str, Any], name: str) -> str:
    """A base image as an engine pulls it: by digest where that is known."""
    pin = lock["images"][name]
    return f"{pin['name']}:{pin['tag']}" + (f"@{pin['digest']}" if pin["digest"] != "unknown" else "")


def arguments(lock: dict[str, Any]) -> dict[str, str]:
    """Every ARG of the Dockerfiles that the lock decides, with its value."""
    deep_ep, gdrcopy = lock["sources"]["deep_ep"], lock["sources"]["gdrcopy"]
    return {
        "CUDA_BUILD_IMAGE": image(lock, "cuda_build"),
        "CUDA_IMAGE": image(lock, "cuda"),
        "DEBIAN_IMAGE": image(lock, "debian"),
        "CUDA_ARCHITECTURES": lock["system"]["cuda_architectures"]["version"],
        "DEEP_EP_COMMIT": deep_ep["commit"],
        "DEEP_EP_ARCHIVE_SHA256": deep_ep["archive_sha256"],
        "GDRCOPY_COMMIT": gdrcopy["commit"],
        "GDRCOPY_ARCHIVE_SHA256": gdrcopy["archive_sha256"],
    }


def constraints(lock: dict[str, Any]) -> str:
    """constraints.txt: versions for development on any platform, so without hashes and local versions."""
    pins = packages(lock, "cpu").values()
    return HEADER + "".join(f"{pin.name}=={pin.version.partition('+')[0]}\n" for pin in pins)


def requirements(lock: dict[str, Any], target: str) -> str:
    """All that an image installs from an index, for `pip install --no-deps --require-hashes`.

    The CPU image has the tests' packages and torch's build for CPUs, so none of the CUDA libraries; the GPU image has
    those and not the tests' packages. What comes as source is left to `built`.
    """
    lines = []
    for pin in packages(lock, target).values():
        if pin.source or (pin.test if target == "gpu" else NVIDIA.match(pin.name)):
            continue
        lines.append(" ".join([f"{pin.name}=={pin.version}", *(f"--hash=sha256:{text}" for text in pin.hashes)]))
    return "\n".join(lines) + "\n"


def built(lock: dict[str, Any], target: str) -> str:
    """The packages that come as source, for `pip wheel --no-deps --no-build-isolation --require-hashes`."""
    pins = [pin for pin in packages(lock, target).values() if pin.source]
    return "".join(f"{pin.name}=={pin.version} --hash=sha256:{' --hash=sha256:'.join(pin.hashes)}\n" for pin in pins)


def main(words: list[str]) -> None:
    """Print what the words ask for."""
    match words:
        case ["constraints"]:
            text = constraints(read())
        case ["requirements", target]:
            text = requirements(read(), target)
        case ["built", target]:
            text = built(read(), target)
        case ["digest"]:
            text = digest() + "\n"
        case _:
            raise SystemExit(
                "usage: python containers/lock.py constraints | requirements TARGET | built TARGET | digest"
            )
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
