"""`make image` and `make sqsh`: an image with the engine that is there, then one file of it for enroot and pyxis.

python -m containers.build image cpu [--engine buildah] [--tag moetrain:cpu] [--stage package] [-- ENGINE ARGUMENTS]
python -m containers.build sqsh moetrain:cpu build/moetrain-cpu.sqsh [--engine buildah] [--with mksquashfs]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from containers import lock as pins
from containers.check import DOCKERFILES
from containers.resolve import PLATFORMS
from containers.spec import file_sha256

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "build/wheels"
ENGINES = ("docker", "podman", "buildah")
IMPORTS_FROM = {"docker": "dockerd", "podman": "podman", "buildah": "podman"}
"""What enroot calls the place where an engine keeps its images."""


def output(command: Sequence[str | Path]) -> str:
    """What a command prints; its errors go to ours."""
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def find_engine(name: str | None = None) -> str:
    """The engine named, else the first one that is installed and can build.

    Raises:
        ValueError: none is there, or the one named is none or not there.
    """
    if name and name not in ENGINES:
        raise ValueError(f"ENGINE={name}; choose from: {', '.join(ENGINES)}")
    for engine in [name] if name else ENGINES:
        if shutil.which(engine) and (engine != "docker" or _docker_builds()):
            return engine
    wanted = f"{name} is not installed or cannot build" if name else "no engine for containers is installed"
    raise ValueError(f"{wanted}; install buildah (`apt install buildah`), podman, or docker with its buildx plugin")


def _docker_builds() -> bool:
    """docker needs BuildKit for `RUN --mount`, and a daemon that answers."""
    return all(
        subprocess.run(["docker", word], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
        for word in ("buildx", "info")
    )


def revision(root: Path = ROOT) -> tuple[str, str]:
    """The commit, with `-dirty` where files differ from it, and its time in seconds since 1970."""
    git: list[str | Path] = ["git", "-C", root]
    if not (root / ".git").exists():
        return "unknown", "0"
    dirty = "-dirty" if output([*git, "status", "--porcelain"]) else ""
    return output([*git, "rev-parse", "HEAD"]) + dirty, output([*git, "log", "-1", "--format=%ct"])


def fetch_wheels(target: str) -> None:
    """Files of the target's packages into build/wheels, each held against its hash. pip's configuration says whence.

    So no index, proxy or certificate of this machine gets into an image.
    """
    WHEELS.mkdir(parents=True, exist_ok=True)
    lock = pins.read()
    requirements = WHEELS / "requirements.txt"
    requirements.write_text(pins.requirements(lock, target), encoding="utf-8")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += ["--require-hashes", "--only-binary=:all:", "--dest", WHEELS, "--requirement", requirements]
    command += ["--python-version", lock["system"][f"python_{target}"]["version"], "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    outside = {key: value for key, value in os.environ.items() if key not in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    if subprocess.run([str(word) for word in command], env=outside).returncode:
        raise ValueError(
            f"pip could not fetch all packages of {requirements}; torch's build for CPUs needs its own index"
        )


def build_command(engine: str, target: str, tag: str, stage: str | None, more: Sequence[str]) -> list[str]:
    """The engine's command line. It passes none of the lock's values: the Dockerfiles have them as defaults."""
    commit, seconds = revision()
    values = {"REVISION": commit, "LOCK_SHA256": pins.digest(), "SOURCE_DATE_EPOCH": seconds}
    if target == "cpu":
        values["PIP_NO_INDEX"] = "1"
    command = [engine, "build", "--file", str(DOCKERFILES[target]), "--tag", tag]
    command += [word for name, value in values.items() for word in ("--build-arg", f"{name}={value}")]
    if engine != "docker":  # BuildKit knows SOURCE_DATE_EPOCH by itself
        command += ["--timestamp", seconds, "--layers"]
    return [*command, *(["--target", stage] if stage else []), *more, "."]


def build(engine: str, target: str, tag: str, stage: str | None = None, more: Sequence[str] = ()) -> None:
    """Build an image, or one stage of it, from the working tree."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    if target == "cpu":
        fetch_wheels(target)
    subprocess.run(build_command(engine, target, tag, stage, more), cwd=ROOT, check=True)


def configuration(engine: str, image: str) -> dict[str, Any]:
    """`Env`, `WorkingDir`, `Entrypoint`, `Cmd`, `Labels`, `User` of an image, those that it has."""
    found = json.loads(output([engine, "inspect", "--type", "image", image]))
    return dict(found["OCIv1"]["config"] if engine == "buildah" else found[0]["Config"])


@contextmanager
def root_of(engine: str, image: str) -> Iterator[Path]:
    """The root directory of an image, to read."""
    if engine == "buildah":
        container = output(["buildah", "from", "--pull-never", image])
        try:
            yield Path(output(["buildah", "mount", container]))
        finally:
            output(["buildah", "rm", container])
        return
    container = output([engine, "create", image])
    with tempfile.TemporaryDirectory() as folder:
        try:
            archive, root = Path(folder, "root.tar"), Path(folder, "root")
            root.mkdir()
            output([engine, "export", "--output", archive, container])
            output(["tar", "--extract", "--file", archive, "--directory", root])
            yield root
        finally:
            output([engine, "rm", container])


def start_script(image: str, config: dict[str, Any]) -> str:
    """/etc/rc of enroot's format: what `enroot start` runs."""
    entry, command = (shlex.join(config.get(key) or []) for key in ("Entrypoint", "Cmd"))
    directory = shlex.quote(config.get("WorkingDir") or "/")
    labels = "".join(f"# {name} = {value}\n" for name, value in sorted((config.get("Labels") or {}).items()))
    return (
        f"# enroot-provenance: {image}\n{labels}"
        f"mkdir -p {directory} 2> /dev/null\ncd {directory} && unset OLDPWD || exit 1\n"
        "if [ -s /etc/rc.local ]; then\n    . /etc/rc.local\nfi\n"
        f'if [ $# -gt 0 ]; then\n    exec {entry} "$@"\nelse\n    exec {entry} {command or "sh"}\nfi\n'
    )


def squash(engine: str, image: str, file: Path) -> None:
    """What `enroot import` makes, with mksquashfs alone: the tree with /etc/rc, /etc/environment and /etc/fstab."""
    config = configuration(engine, image)
    # Each value is a line of KEY=value, in which enroot replaces ${NAME} by the host's.
    texts = {"rc": start_script(image, config), "environment": "\n".join(config.get("Env") or []) + "\n", "fstab": ""}
    with tempfile.TemporaryDirectory() as folder, root_of(engine, image) as root:
        words: list[str | Path] = ["mksquashfs", root, file, "-noappend", "-all-root", "-quiet", "-no-progress"]
        words += ["-comp", "zstd", "-Xcompression-level", "3"]
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8")
            words += ["-p", f"etc/{name} f {'755' if name == 'rc' else '644'} 0 0 cat {folder}/{name}"]
        subprocess.run([*words, "-e", *(f"etc/{name}" for name in texts)], check=True, stdout=subprocess.DEVNULL)


def sqsh(engine: str, image: str, file: Path, maker: str | None = None) -> None:
    """Write `file`, with enroot where that is installed, else in its format; and `<file>.sha256`, which launches check.

    Raises:
        ValueError: neither enroot nor mksquashfs is installed.
    """
    maker = maker or next((name for name in ("enroot", "mksquashfs") if shutil.which(name)), None)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    if maker == "enroot":
        output(["enroot", "import", "--output", unfinished, f"{IMPORTS_FROM[engine]}://{image}"])
    elif maker == "mksquashfs":
        squash(engine, image, unfinished)
    else:
        raise ValueError("neither enroot nor mksquashfs is installed; `apt install squashfs-tools` gives the second")
    unfinished.rename(file)
    file.with_name(file.name + ".sha256").write_text(f"{file_sha256(file)}  {file.name}\n", encoding="ascii")


def main(words: Sequence[str]) -> None:
    """Read the words of the command line and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m containers.build", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("image", "sqsh"):
        command = commands.add_parser(name)
        command.add_argument("--engine", default=None)
        if name == "image":
            command.add_argument("target", choices=pins.TARGETS)
            command.add_argument("--tag")
            command.add_argument("--stage")
        else:
            command.add_argument("image")
            command.add_argument("file", type=Path)
            command.add_argument("--with", dest="maker", choices=("enroot", "mksquashfs"))
    end = words.index("--") if "--" in words else len(words)
    wanted, more = parser.parse_args(words[:end]), words[end + 1 :]
    try:
        engine = find_engine(wanted.engine or None)
        if wanted.command == "image":
            build(engine, wanted.target, wanted.tag or f"moetrain:{wanted.target}", wanted.stage, more)
        else:
            sqsh(engine, wanted.image, wanted.file, wanted.maker)
    except ValueError as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed with exit code {error.returncode}; its own words are above")


if __name__ == "__main__":
    main(sys.argv[1:])
