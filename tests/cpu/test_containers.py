"""The lock and what is held against it, the commands that build images, and the bill of materials."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from containers import build, check, resolve, sbom
from containers import lock as pins

ROOT = check.ROOT
LOCK = pins.read()
DOCKERFILES = {target: (ROOT / path).read_text(encoding="utf-8") for target, path in check.DOCKERFILES.items()}
READ: tuple[str, ...] = ("constraints.txt", "pyproject.toml", "README.md", "docs/containers.md", "moetrain/doctor.py")
READ += ("containers/versions.lock", *map(str, check.DOCKERFILES.values()))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of all that names versions."""
    for name in READ:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_nothing_disagrees(project: Path) -> None:
    assert check.find_problems(ROOT) == []
    assert check.find_problems(project) == []


BASE = pins.image(LOCK, "cuda")
BREAKS = {
    "a constraint that moved": ("constraints.txt", "peft==0.21.2", "peft==0.21.3", ["peft==0.21.2", "peft==0.21.3"]),
    "a constraint by hand": ("constraints.txt", "numpy==", "nothing==1\nnumpy==", ["nothing==1 is not in the lock"]),
    "a range that moved": ("pyproject.toml", ">=5.23,<5.24", ">=5.24,<5.25", ["does not allow 5.23.0"] * 2),
    "a new dependency": (
        "pyproject.toml",
        '"rich>=13",',
        '"rich>=13",\n    "einops",',
        ["einops is not in the lock (cpu)"],
    ),
    "a digest of a base": ("containers/Dockerfile", BASE[-8:], "0" * 8, ["ARG CUDA_IMAGE="]),
    "a commit": ("containers/Dockerfile", "COMMIT=dd758", "COMMIT=29d31", ["ARG DEEP_EP_COMMIT=29d31"]),
    "an ARG of its own": (
        "containers/Dockerfile",
        "ARG MAX_JOBS=8",
        "ARG TORCH=2.15.0",
        ["ARG TORCH is not in the lock"],
    ),
    "a base of its own": ("containers/Dockerfile.cpu", "FROM ${DEBIAN_IMAGE}", "FROM debian:12", ["FROM debian:12"]),
    "a source of its own": (
        "containers/Dockerfile",
        "github.com/NVIDIA/gdr",
        "github.com/me/gdr",
        ["github.com/me/gdr"],
    ),
    "the documents' table": ("docs/containers.md", "| 2.30.7 |", "| 2.31.2 |", ["table of versions"]),
    "the README": ("README.md", "Transformers 5.23", "Transformers 5.24", ["names Transformers 5.24"]),
    "the doctor": ("moetrain/doctor.py", '"trl",', '"trl",\n    "vllm",', ["names vllm"]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_disagreement_is_found(project: Path, name: str) -> None:
    file, old, new, expected = BREAKS[name]
    edit(project / file, old, new)
    problems = check.find_problems(project)
    assert len(problems) == len(expected), problems
    assert all(word in problem for word, problem in zip(expected, problems, strict=True)), problems


def test_every_argument_has_the_value_of_the_lock() -> None:
    expected = pins.arguments(LOCK)
    found = [pair for text in DOCKERFILES.values() for pair in check.dockerfile_arguments(text)]
    assert {name for name, _ in found} == expected.keys() | check.BUILD_ARGUMENTS
    assert all(default == expected[name] for name, default in found if name in expected)


def test_a_pin_has_a_reason_and_an_unknown_hash_too(tmp_path: Path) -> None:
    text = pins.LOCK.read_text(encoding="utf-8")
    for line, message in ((r"^why = .*\n", "needs `why`"), (r"^unknown_because = .*\n", "unknown hash")):
        file = tmp_path / "versions.lock"
        file.write_text(re.sub(line, "", text, count=1, flags=re.MULTILINE), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            pins.read(file)


def test_a_pin_stands_once_with_whole_hashes() -> None:
    twice = LOCK | {"cpu": LOCK["cpu"] | {"numpy": LOCK["python"]["numpy"]}}
    with pytest.raises(ValueError, match=r"numpy; every pin stands once"):
        pins.packages(twice, "cpu")
    short = LOCK | {"cpu": LOCK["cpu"] | {"torch": LOCK["cpu"]["torch"] | {"sha256": ["abc"]}}}
    with pytest.raises(ValueError, match="torch: `sha256` must"):
        pins.packages(short, "cpu")
    with pytest.raises(ValueError, match="choose from: gpu, cpu"):
        pins.packages(LOCK, "tpu")


def test_requirements_of_the_images() -> None:
    gpu, cpu = (pins.requirements(LOCK, target).splitlines() for target in pins.TARGETS)
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+( --hash=sha256:[0-9a-f]{64})+", line) for line in [*gpu, *cpu])
    names = {line.partition("==")[0] for line in gpu}
    assert {"torch", "triton", "nvidia-nccl-cu13", "nvidia-nvshmem-cu13", "setuptools", "submitit"} <= names
    assert not {"pytest", "mypy", "transformer-engine-torch"} & names  # the last is compiled
    names = {line.partition("==")[0] for line in cpu}
    assert {"torch", "triton", "pytest", "submitit"} <= names
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]
    assert pins.built(LOCK, "gpu").startswith("transformer-engine-torch==")
    assert pins.built(LOCK, "cpu") == ""


def test_the_lock_is_read_without_any_package() -> None:
    command = [sys.executable, "-I", "-S", "containers/lock.py", "constraints"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed == (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_no_secrets_and_no_privileges() -> None:
    for text in DOCKERFILES.values():
        final = text[text.rindex("\nFROM ") :]
        assert final.index("USER 10001:10001") < final.index("RUN moetrain doctor")
        assert final.rstrip().endswith("RUN moetrain doctor")
        assert not re.search(r"(TOKEN|PASSWORD|SECRET|API_KEY|INDEX_URL)", text)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint: github.com/hadolint/hadolint, releases")
def test_hadolint_has_nothing_to_say() -> None:
    result = subprocess.run(["hadolint", *check.DOCKERFILES.values()], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def report(**versions: str) -> dict[str, Any]:
    """An installation report of pip: every package needs the one after it."""
    names = [*versions, "end"]
    return {
        "install": [
            {
                "metadata": {
                    "name": name,
                    "version": version,
                    "requires_dist": [f'{names[i + 1]}>=1; sys_platform == "x"'],
                },
                "download_info": {"url": name, "archive_info": {"hash": f"sha256={name}-{version}"}},
            }
            for i, (name, version) in enumerate(versions.items())
        ]
    }


def test_what_both_targets_share_stands_once() -> None:
    old = {
        "python": {"numpy": {"why": "a reason by hand"}},
        "gpu": {"te": {"source": True, "requires": ["b>1"]}},
        "cpu": {},
    }
    cpu = [report(numpy="2", torch="1+cpu", B="3"), report(numpy="2", torch="1", B="3")]
    gpu = [report(numpy="2", torch="2", B="3", c="4")]
    reports = {"cpu": [resolve.read_report(one) for one in cpu], "gpu": [resolve.read_report(one) for one in gpu]}
    tables = resolve.merge(old, reports)
    assert tables["python"]["numpy"] == {"version": "2", "why": "a reason by hand", "sha256": ["numpy-2"]}
    assert tables["python"]["b"]["why"] == "needed by te, torch"
    assert tables["cpu"]["torch"] | {"why": ""} == {"version": "1+cpu", "why": "", "sha256": ["torch-1+cpu"]}
    assert tables["gpu"]["torch"]["sha256"] == ["torch-2"]
    assert tables["gpu"]["c"]["why"] == "needed by b"
    assert tables["gpu"]["te"] == old["gpu"]["te"]
    assert tables.keys() == {"python", "gpu", "cpu"}
    with pytest.raises(ValueError, match="build for CPUs"):
        resolve.merge(old, reports | {"cpu": reports["cpu"][1:]})
    with pytest.raises(ValueError, match="different versions"):
        resolve.merge(old, reports | {"cpu": [*reports["cpu"], resolve.read_report(report(numpy="1"))]})


def test_writing_the_lock_changes_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "versions.lock"
    shutil.copy(pins.LOCK, file)
    resolve.write({table: LOCK[table] for table in ("python", "gpu", "cpu")}, file)
    assert pins.read(file) == LOCK
    assert (
        file.read_text(encoding="utf-8").partition(resolve.MARK)[0] == pins.LOCK.read_text().partition(resolve.MARK)[0]
    )


def test_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt install buildah"):
        build.find_engine()
    with pytest.raises(ValueError, match="choose from: docker, podman, buildah"):
        build.find_engine("kaniko")
    for name in ("buildah", "docker"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    assert build.find_engine() == "buildah"  # a docker without buildx or daemon does not count
    with pytest.raises(ValueError, match="docker is not installed or cannot build"):
        build.find_engine("docker")
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 0\n")
    assert build.find_engine() == "docker"
    assert build.find_engine("buildah") == "buildah"


def test_command_line_of_a_build() -> None:
    commit, seconds = build.revision()
    words = build.build_command("buildah", "cpu", "moetrain:cpu", "package", ["--network=host"])
    assert words[:4] == ["buildah", "build", "--file", "containers/Dockerfile.cpu"]
    assert words[-4:] == ["--target", "package", "--network=host", "."]
    assert f"REVISION={commit}" in words
    assert f"LOCK_SHA256={pins.digest()}" in words
    assert words[words.index("--timestamp") + 1] == seconds
    words = build.build_command("docker", "gpu", "moetrain:gpu", None, [])
    assert f"SOURCE_DATE_EPOCH={seconds}" in words
    assert not {"--timestamp", "PIP_NO_INDEX=1"} & set(words)


def run_script(script: str, *words: str) -> str:
    return subprocess.run(["sh", "-c", script, "rc", *words], check=True, capture_output=True, text=True).stdout


def test_start_script(tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    config = {"WorkingDir": str(folder), "Cmd": ["echo", "a b", "$HOME"], "Labels": {"revision": "abc"}}
    script = build.start_script("moetrain:cpu", config)
    assert script.startswith("# enroot-provenance: moetrain:cpu\n# revision = abc\n")
    assert run_script(script) == "a b $HOME\n"
    assert run_script(script, "pwd") == f"{folder}\n"
    script = build.start_script("x", {"Entrypoint": ["env", "A=1"], "Cmd": ["sh", "-c", "echo $A"]})
    assert run_script(script) == "1\n"
    assert run_script(script, "sh", "-c", "echo $A $0", "c") == "1 c\n"


ENROOT = ROOT / "containers/enroot"


def test_hook_keeps_compiled_kernels_on_the_node(tmp_path: Path) -> None:
    mounts, cache = tmp_path / "mounts", tmp_path / "cache"
    mounts.write_text("before\n")
    environment = {"ENROOT_MOUNTS": str(mounts), "ENROOT_CACHE_PATH": str(cache), "PATH": "/usr/bin:/bin"}
    hook = ENROOT / "hooks.d/50-moetrain-kernels.sh"
    subprocess.run([hook], check=True, env=environment)
    before, *lines = mounts.read_text().splitlines()
    targets = [target for _, target, _, options in map(str.split, lines) if "rw" in options and "noexec" not in options]
    variables = dict(
        line.split("=") for line in (ENROOT / "environ.d/50-moetrain.env").read_text().splitlines() if "=" in line
    )
    assert before == "before"
    assert targets == [variables[name] for name in ("EP_JIT_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")]
    assert all(Path(line.split()[0]).is_dir() for line in lines)

    mounts.write_text("")
    cache.rename(tmp_path / "moved")
    cache.write_text("no directory")
    subprocess.run([hook], check=True, env=environment, stderr=subprocess.DEVNULL)  # a hook that fails stops the job
    assert mounts.read_text() == ""


OPTIONS = {
    "ro",
    "rw",
    "bind",
    "rbind",
    "nosuid",
    "nodev",
    "noexec",
    "nofail",
    "silent",
    "x-create=dir",
    "x-create=file",
}


def test_files_for_enroot_are_as_it_reads_them() -> None:
    for file in (ENROOT / "environ.d").iterdir():  # enroot drops all other lines
        assert file.suffix == ".env"
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        assert lines and all(re.fullmatch(r"(?!ENROOT_)[A-Z_]+=[^\s\"']+", line) for line in lines), lines
    for file in (ENROOT / "mounts.d").iterdir():
        assert file.suffix == ".fstab"
        for line in file.read_text().splitlines():
            if line and not line.startswith("#"):
                source, target, kind, options = line.split()
                assert source.startswith("/") and target.startswith("/") and kind == "none"
                assert set(options.split(",")) <= OPTIONS
    for file in (ENROOT / "hooks.d").iterdir():  # enroot runs those that end so and are executable
        assert file.suffix == ".sh" and file.stat().st_mode & 0o111 == 0o111
        subprocess.run(["sh", "-n", file], check=True)


def test_bill_of_the_lock() -> None:
    bill = sbom.document("gpu", pins.digest(), sbom.of_lock(LOCK, "gpu"))
    assert bill == sbom.document("gpu", pins.digest(), reversed(sbom.of_lock(LOCK, "gpu")))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    found = {component["purl"]: component for component in bill["components"]}
    deep_ep = LOCK["sources"]["deep_ep"]["commit"]
    assert {f"pkg:github/deepseek-ai/deepep@{deep_ep}", "pkg:pypi/torch@2.14.1"} <= found.keys()
    assert found["pkg:pypi/torch@2.14.1"]["hashes"][0]["content"] == LOCK["gpu"]["torch"]["sha256"][0]
    assert not [url for url in found if "pytest" in url or "pypi/deep" in url]
    other = sbom.document("gpu", pins.digest(), sbom.of_lock(LOCK, "gpu")[1:])
    assert other["serialNumber"] != bill["serialNumber"]


def test_bill_of_an_image(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    package = "Package: {}\nStatus: {} ok installed\nArchitecture: amd64\nVersion: {}\n"
    removed = "Package: old\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    write("etc/os-release", 'NAME="Debian"\nID=debian\n')
    write("var/lib/dpkg/status", package.format("g++", "install", "4:12.2.0-3") + "\n" + removed)
    torch = LOCK["gpu"]["torch"]["version"]
    for name, version in (("torch", torch), ("deep_ep", "2.1.0+dd758ca"), ("Jinja2", "1")):
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nVersion: text\n"
        write(f"opt/venv/lib/python3.12/site-packages/{name}-{version}.dist-info/METADATA", metadata)
    components = sbom.merged(sbom.of_root(tmp_path), sbom.of_lock(LOCK, "gpu"))
    urls = {component["purl"] for component in components}
    assert {"pkg:deb/debian/g++@4%3A12.2.0-3?arch=amd64", "pkg:pypi/jinja2@1", f"pkg:pypi/torch@{torch}"} <= urls
    assert len(urls) == 3 + len(LOCK["sources"]) + 1  # and the base image
    assert next(component for component in components if component["name"] == "torch")["hashes"]
    json.dumps(components)
