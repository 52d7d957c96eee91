"""`make lock`: resolve all Python packages anew and write them, with hashes, into versions.lock and constraints.txt.

The torch of each target is pinned by hand, in the lock: change it there first, then run this. pip resolves for Linux
x86_64 and the images' Pythons, whatever runs it. It must find torch's build for CPUs on one of the indexes of its
configuration. Reasons in the lock that name a use are kept; those of new packages say what needs them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.version import Version

from containers import lock as pins

ROOT = Path(__file__).parents[1]
MARK = "# ---- Python packages: written by `make lock` from here on; a reason may be edited and is kept ----\n"
PYTHONS = {"gpu": ("3.12",), "cpu": ("3.12", "3.11")}
"""Of the images (Ubuntu 24.04, Debian 12), and for development on both. The first, for which an index may have torch's
build for GPUs alone, decides on the Triton that goes with it."""
PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)), "linux_x86_64"]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
NEEDED = "needed by"
TEST_ONLY = re.compile(r"pytest|mypy|ruff|types-|jsonschema|grafana-foundation-sdk")

Found = dict[str, dict[str, Any]]  # packages by name, each {"version", "hash", "requires"}


def canonical(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """`Torch>=2; sys_platform == "linux"`: torch."""
    return canonical(re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0])


def declared() -> list[str]:
    """All requirements of pyproject.toml that the lock pins, and those of its build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [*pins.declared(project), *project["build-system"]["requires"]]


def resolve(requirements: list[str], constraints: list[str], python: str) -> Found:
    """What pip would install on Linux x86_64 for this version of Python, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        files = {"r": requirements, "c": constraints}
        for name, lines in files.items():
            Path(folder, name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--only-binary=:all:", "--python-version", python, "--target", f"{folder}/target"]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        subprocess.run([*command, "--report", f"{folder}/report", "-r", f"{folder}/r", "-c", f"{folder}/c"], check=True)
        return read_report(json.loads(Path(folder, "report").read_text(encoding="utf-8")))


def read_report(report: dict[str, Any]) -> Found:
    """pip's installation report, reduced to what the lock holds.

    Raises:
        ValueError: a file that the index gives without its SHA-256.
    """
    found: Found = {}
    for item in report["install"]:
        metadata = item["metadata"]
        kind, _, digest = item["download_info"]["archive_info"].get("hash", "").partition("=")
        if kind != "sha256":
            raise ValueError(f"the index has no SHA-256 of {item['download_info']['url']}")
        found[canonical(metadata["name"])] = {
            "version": str(Version(metadata["version"])),  # some write v1.2
            "hash": digest,
            # What an extra asks for counts too: which extras were asked for, the report does not say.
            "requires": {name_of(line) for line in metadata.get("requires_dist", [])},
        }
    return found


def merge(lock: dict[str, Any], reports: dict[str, list[Found]]) -> dict[str, dict[str, Any]]:
    """Tables `python`, `gpu` and `cpu` of the new lock: what both targets have in the same version stands in `python`.

    Raises:
        ValueError: the Pythons of one target need different versions, or the CPU image would get torch's CUDA build.
    """
    joined = {target: _join(found) for target, found in reports.items()}
    if "+cpu" not in joined["cpu"]["torch"]["version"]:
        raise ValueError("no index of pip's configuration has torch's build for CPUs; add one that does")
    tables: dict[str, dict[str, Any]] = {"python": {}, "gpu": {}, "cpu": {}}
    roots = {name_of(line) for line in declared()}
    built = {name: pin for target in pins.TARGETS for name, pin in lock[target].items() if pin.get("source")}
    requires = {name: {name_of(line) for line in pin.get("requires", ())} for name, pin in built.items()}
    requires |= {name: pin["requires"] for found in joined.values() for name, pin in found.items()}
    run = _closure({name for name in roots if not TEST_ONLY.match(name)}, joined.values())
    run |= joined["gpu"].keys() - joined["cpu"].keys()
    for target, found in joined.items():
        for name, pin in found.items():
            same = all(other.get(name, {}).get("version") == pin["version"] for other in joined.values())
            table = "python" if same else target
            hashes = set(pin["hashes"]).union(*(other[name]["hashes"] for other in joined.values() if same))
            why = lock[table].get(name, {}).get("why", "")
            if name in roots:
                why = why if why and not why.startswith(NEEDED) else "declared in pyproject.toml"
            elif not why or why.startswith(NEEDED):
                users = sorted(user for user, needs in requires.items() if name in needs)
                why = f"{NEEDED} {', '.join(users[:3])}" + (f" and {len(users) - 3} more" if users[3:] else "")
            entry = {"version": pin["version"], "why": why, "sha256": sorted(hashes)}
            tables[table][name] = entry | ({} if name in run else {"test": True})
    for target in pins.TARGETS:  # what comes as source is pinned by hand
        tables[target] |= {name: pin for name, pin in lock[target].items() if pin.get("source")}
    return tables


def _join(found: list[Found]) -> Found:
    """Reports of one target for several Pythons as one."""
    joined: Found = {}
    for report in found:
        for name, pin in report.items():
            entry = joined.setdefault(name, {"version": pin["version"], "hashes": set(), "requires": pin["requires"]})
            versions = {entry["version"], pin["version"]}
            if len({version.partition("+")[0] for version in versions}) > 1:
                raise ValueError(f"{name}: the Pythons of a target need different versions: {', '.join(versions)}")
            if pin["version"] > entry["version"]:  # torch's build for CPUs, where only one Python has it
                entry |= {"version": pin["version"], "hashes": set()}
            if pin["version"] == entry["version"]:
                entry["hashes"].add(pin["hash"])
    return joined


def _closure(roots: set[str], reports: Iterable[Found]) -> set[str]:
    """The packages and all that they need."""
    found, reports = set(roots), list(reports)
    while new := {
        need for name in found for report in reports if name in report for need in report[name]["requires"]
        if need in report and need not in found and not TEST_ONLY.match(need)
    }:  # fmt: skip
        found |= new
    return found


def write(tables: dict[str, dict[str, Any]], path: Path = pins.LOCK) -> None:
    """Replace the tables of Python packages; what stands before them stays to the letter."""
    lines = []
    for table, entries in tables.items():
        for name, entry in sorted(entries.items()):
            lines += ["", f"[{table}.{name}]"]
            for key, value in entry.items():
                lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}" if key != "sha256" else "sha256 = [")
                lines += [*(f'    "{text}",' for text in value), "]"] if key == "sha256" else []
    head = path.read_text(encoding="utf-8").partition(MARK)[0]
    path.write_text(head + MARK + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Resolve both targets, the second with the first's versions, and write the two files."""
    lock = pins.read()
    torch = {target: f"torch=={lock[target]['torch']['version'].partition('+')[0]}" for target in pins.TARGETS}
    cpu: list[Found] = []
    for python in PYTHONS["cpu"]:
        chosen = [f"{name}=={pin['version'].partition('+')[0]}" for found in cpu for name, pin in found.items()]
        cpu.append(resolve(declared(), [*chosen, torch["cpu"]], python))
    own = re.compile(r"torch$|triton$|nvidia-|cuda-")
    chosen = [f"{name}=={pin['version']}" for name, pin in cpu[0].items() if not own.match(name)]
    engine = [line for pin in lock["gpu"].values() for line in pin.get("requires", [])]
    gpu = [resolve([*declared(), *engine], [*chosen, torch["gpu"]], python) for python in PYTHONS["gpu"]]
    write(merge(lock, {"gpu": gpu, "cpu": cpu}))
    (ROOT / "constraints.txt").write_text(pins.constraints(pins.read()), encoding="utf-8")


if __name__ == "__main__":
    main()
