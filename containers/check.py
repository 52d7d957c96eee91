"""`make versions-check`: everything that names a version agrees with versions.lock, or is listed with its remedy."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from containers import lock as pins

ROOT = Path(__file__).parents[1]
DOCKERFILES = {"gpu": Path("containers/Dockerfile"), "cpu": Path("containers/Dockerfile.cpu")}
BUILD_ARGUMENTS = {"GITHUB", "LOCK_SHA256", "MAX_JOBS", "PIP_NO_INDEX", "REVISION", "SOURCE_DATE_EPOCH"}
"""ARGs that `make image` or the user decides; the lock decides all others."""
NOT_IN_IMAGES = {"moetrain", "mamba-ssm", "causal-conv1d"}
TABLE = re.compile(r"(?<=<!-- versions -->\n).*?(?=<!-- end of versions -->)", re.DOTALL)


def find_problems(root: Path = ROOT) -> list[str]:
    """One line for each disagreement, with what to do."""
    lock = pins.read(root / "containers/versions.lock")
    return [
        *check_constraints(lock, read(root, "constraints.txt")),
        *check_pyproject(lock, read(root, "pyproject.toml")),
        *check_dockerfiles(lock, {target: read(root, path) for target, path in DOCKERFILES.items()}),
        *check_documents(lock, read(root, "docs/containers.md"), read(root, "README.md")),
        *check_doctor(lock, read(root, "moetrain/doctor.py")),
    ]


def read(root: Path, path: str | Path) -> str:
    """Text of a file of the project."""
    return (root / path).read_text(encoding="utf-8")


def check_constraints(lock: dict[str, Any], text: str) -> list[str]:
    """constraints.txt is what the lock says, line by line."""
    expected, found = (set(lines.splitlines()[1:]) for lines in (pins.constraints(lock), text))
    differing = sorted(expected ^ found)
    remedy = "change pyproject.toml or the lock, then `make lock`"
    return [
        f"constraints.txt: {line} is {'missing' if line in expected else 'not in the lock'}; {remedy}"
        for line in differing
    ]


def check_pyproject(lock: dict[str, Any], text: str) -> list[str]:
    """Every requirement, nearly all optional ones too, is pinned for both targets to a version that it allows."""
    project = tomllib.loads(text)
    lines = [*pins.declared(project), *project["build-system"]["requires"]]
    problems = []
    for target in pins.TARGETS:
        found = pins.packages(lock, target)
        for requirement in map(Requirement, lines):
            pin = found.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
            if pin is None:
                problems.append(f"pyproject.toml: {requirement.name} is not in the lock ({target}); run `make lock`")
            elif not requirement.specifier.contains(pin.version):
                problems.append(f"pyproject.toml: {requirement} does not allow {pin.version} of the lock ({target})")
    return problems


def dockerfile_arguments(text: str) -> list[tuple[str, str | None]]:
    """Name and default of every ARG, in order; None where there is no default."""
    found = re.findall(r"^\s*ARG\s+(\w+)(?:=(.*?))?\s*$", text, re.MULTILINE | re.IGNORECASE)
    return [(name, default if f"ARG {name}=" in text else None) for name, default in found]


def check_dockerfiles(lock: dict[str, Any], texts: dict[str, str]) -> list[str]:
    """Every ARG has the lock's value, every FROM is an ARG or an earlier stage, and every URL is a source's."""
    expected, used, problems = pins.arguments(lock), set(), []
    for target, text in texts.items():
        name = DOCKERFILES[target].name
        for argument, default in dockerfile_arguments(text):
            used.add(argument)
            if argument in expected and default != expected[argument]:
                problems.append(f"{name}: ARG {argument}={default}, the lock says {expected[argument]}")
            elif argument not in expected and argument not in BUILD_ARGUMENTS:
                problems.append(f"{name}: ARG {argument} is not in the lock; pin it there (lock.arguments)")
        stages: set[str] = set()
        for base, stage in re.findall(r"^FROM\s+(\S+)(?:\s+AS\s+(\S+))?", text, re.MULTILINE | re.IGNORECASE):
            if base not in stages and base.strip("${}") not in expected:
                problems.append(f"{name}: FROM {base} is neither an ARG of the lock nor an earlier stage")
            stages.add(stage)
        urls = {pin["url"] for pin in lock["sources"].values()} | {"https://github.com/"}
        for url in sorted(set(re.findall(r"https?://[^\s\"@]+", text)) - urls):
            problems.append(f"{name}: {url} is not a source of the lock")
    problems += [f"no Dockerfile has ARG {argument} of the lock" for argument in sorted(expected.keys() - used)]
    return problems


def versions_table(lock: dict[str, Any]) -> str:
    """The table of docs/containers.md: what the two images are made of, and why."""
    gpu, cpu = (pins.packages(lock, target) for target in pins.TARGETS)
    rows = ["| | GPU image | CPU image, development | why |", "|---|---|---|---|"]
    images, system = lock["images"], lock["system"]
    base = [f"`{images[name]['name']}:{images[name]['tag']}`" for name in ("cuda", "debian")]
    rows.append(f"| base | {' | '.join(base)} | {images['cuda']['why']} |")
    python = (system["python_gpu"], system["python_cpu"])
    rows.append(f"| Python | {' | '.join(pin['version'] for pin in python)} | {python[0]['why']} |")
    rows.append(f"| CUDA | {system['cuda']['version']} | - | {system['cuda']['why']} |")
    for name, title in TITLES.items():
        versions = [gpu[name].version, cpu[name].version if name in cpu and not pins.NVIDIA.match(name) else "-"]
        rows.append(f"| {title} | {' | '.join(versions)} | {gpu[name].why} |")
    for pin in lock["sources"].values():
        rows.append(f"| {pin['name']} | {pin['version']}, commit `{pin['commit'][:12]}` | - | {pin['why']} |")
    return "\n".join(rows) + "\n"


TITLES = {
    "nvidia-cudnn-cu13": "cuDNN",
    "nvidia-nccl-cu13": "NCCL",
    "nvidia-nvshmem-cu13": "NVSHMEM",
    "torch": "torch",
    "triton": "Triton",
    "transformers": "Transformers",
    "transformer-engine-torch": "Transformer Engine",
}


def check_documents(lock: dict[str, Any], page: str, readme: str) -> list[str]:
    """The table of docs/containers.md is the lock's, and the README names its Transformers."""
    table, problems = TABLE.search(page), []
    if table is None or table[0] != versions_table(lock):
        problems.append(
            "docs/containers.md: the table of versions is not the lock's; `python -m containers.check --write`"
        )
    minor = ".".join(lock["python"]["transformers"]["version"].split(".")[:2])
    for named in sorted(set(re.findall(r"Transformers (\d+\.\d+)", readme)) - {minor}):
        problems.append(f"README.md: names Transformers {named}, the lock has {minor}")
    return problems


def check_doctor(lock: dict[str, Any], source: str) -> list[str]:
    """Every package that `moetrain doctor` looks for is pinned, so that an image has what it reports."""
    names = next(
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES"
    )
    pinned = pins.packages(lock, "gpu").keys() | lock["sources"].keys() | NOT_IN_IMAGES
    missing = [name for name in names if name not in pinned and name.replace("_", "-") not in pinned]
    return [f"moetrain/doctor.py: PACKAGES names {name}, which the lock does not pin" for name in missing]


def main() -> int:
    """Print the problems; with --write, first bring the table of docs/containers.md up to date."""
    if sys.argv[1:] == ["--write"]:
        page = ROOT / "docs/containers.md"
        table = versions_table(pins.read())
        page.write_text(TABLE.sub(lambda _: table, page.read_text(encoding="utf-8")), encoding="utf-8")
    problems = find_problems()
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print("versions agree with containers/versions.lock")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
