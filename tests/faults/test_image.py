"""The CPU image, really built: from Debian's packages, without a registry; tests run in it; one file of it for enroot.

Minutes of work: `make test-image`. Nothing outside the test's folder changes: buildah keeps its images there too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from containers import build, check, sbom
from containers import lock as pins

NEEDED = ("buildah", "mmdebstrap", "mksquashfs")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        bool(MISSING), reason=f"needs {', '.join(MISSING)}: apt install buildah mmdebstrap squashfs-tools"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for file systems of other users"),
]
BASE = "localhost/moetrain-base:bookworm"
IMAGE = "localhost/moetrain:cpu"
ON_BASE = ["--build-arg", f"DEBIAN_IMAGE={BASE}", "--network=host"]
QUICK = ("test_config.py", "test_loss.py", "test_kernels_torch.py", "test_metrics.py", "test_imports.py")


def timed(what: str, start: float) -> None:
    print(f"{what}: {time.monotonic() - start:.0f} s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where buildah keeps its images during these tests."""
    path = tmp_path_factory.mktemp("image")
    lines = ["[storage]", 'driver = "overlay"', f'graphroot = "{path}/root"', f'runroot = "{path}/run"']
    (path / "storage.conf").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_STORAGE_CONF", str(path / "storage.conf"))
        patch.setenv("BUILDAH_ISOLATION", "chroot")  # no cgroups of its own where tests run
        yield path
        build.output(["buildah", "rm", "--all"])
        build.output(["buildah", "rmi", "--all", "--force"])
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def base(folder: Path) -> str:
    """Debian 12 as mmdebstrap makes it, with what the Dockerfile installs, so that this finds it done."""
    start = time.monotonic()
    include = "--include=ca-certificates,g++,python3,python3-dev,python3-venv"
    archive = folder / "base.tar"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", include, "bookworm", archive], check=True)
    timed("mmdebstrap", start)
    container = build.output(["buildah", "from", "scratch"])
    build.output(["buildah", "add", "--quiet", container, archive, "/"])
    build.output(["buildah", "commit", "--quiet", "--rm", container, BASE])
    archive.unlink()
    return BASE


@pytest.fixture(scope="module")
def image(base: str) -> str:
    start = time.monotonic()
    build.build("buildah", "cpu", IMAGE, more=ON_BASE)
    timed("build", start)
    return IMAGE


def layers(image: str) -> list[str]:
    """SHA-256 of each layer of an image, unpacked."""
    found = json.loads(build.output(["buildah", "inspect", "--type", "image", image]))
    return list(found["OCIv1"]["rootfs"]["diff_ids"])


def run(image: str, *command: str) -> str:
    """What a command prints in a container of the image, as the image's user."""
    container = build.output(["buildah", "from", "--pull-never", image])
    try:
        return build.output(["buildah", "run", container, "--", *command])
    finally:
        build.output(["buildah", "rm", container])


def test_labels_and_user(image: str) -> None:
    config = build.configuration("buildah", image)
    assert config["User"] == "10001:10001"
    assert config["Labels"]["moetrain.lock.sha256"] == pins.digest()
    assert config["Labels"]["org.opencontainers.image.revision"] == build.revision()[0]
    assert run(image, "id", "-u") == "10001"


def test_the_doctor_finds_what_the_lock_says(image: str) -> None:
    found = json.loads(run(image, "moetrain", "doctor", "--json"))
    locked = pins.packages(pins.read(), "cpu")
    assert found["problems"] == []
    versions = {name.replace("_", "-"): version for name, version in found["versions"].items()}
    both = versions.keys() & locked.keys()
    assert {"torch", "triton", "transformers", "safetensors", "peft", "trl"} <= both
    assert {name: versions[name] for name in both} == {name: locked[name].version for name in both}


def test_quick_tests_pass_in_it(image: str) -> None:
    start = time.monotonic()
    tests = [f"tests/cpu/{name}" for name in QUICK]
    printed = run(image, "env", "OMP_NUM_THREADS=1", "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    timed("tests in the image", start)
    assert " passed" in printed.splitlines()[-1]
    assert "failed" not in printed


def test_bill_of_materials(image: str) -> None:
    with build.root_of("buildah", image) as root:
        components = sbom.merged(sbom.of_root(root), sbom.of_lock(pins.read(), "cpu"))
    urls = {component["purl"] for component in components}
    assert any(url.startswith("pkg:deb/debian/libc6@") for url in urls)
    python = {component["name"] for component in components if component["purl"].startswith("pkg:pypi/")}
    expected = {line.partition("==")[0] for line in pins.requirements(pins.read(), "cpu").splitlines()}
    assert python == expected | {"moetrain", "pip"}


def test_one_file_for_enroot(image: str, tmp_path: Path) -> None:
    start = time.monotonic()
    file = tmp_path / "moetrain.sqsh"
    build.sqsh("buildah", image, file, "mksquashfs")
    timed(f"squashfs of {file.stat().st_size / 1e6:.0f} MB", start)
    subprocess.run(["sha256sum", "--check", "--quiet", f"{file.name}.sha256"], cwd=tmp_path, check=True)
    subprocess.run(["unsquashfs", "-quiet", "-no-progress", "-dest", tmp_path / "root", file], check=True)
    root = tmp_path / "root"
    assert f"# enroot-provenance: {image}\n" in (root / "etc/rc").read_text()
    assert os.access(root / "etc/rc", os.X_OK) and (root / "etc/fstab").exists()
    assert (root / "opt/moetrain/constraints.txt").read_text() == check.read(check.ROOT, "constraints.txt")
    # As enroot starts it: another user, the variables of the file, the script with the command's words.
    variables = (root / "etc/environment").read_text().splitlines()
    assert any(line.startswith("PATH=/opt/venv/bin:") for line in variables)
    start = time.monotonic()
    command = ["env", "-i", *variables, "chroot", "--userspec=12345:12345", str(root), "/bin/sh", "/etc/rc"]
    assert build.output([*command, "pwd"]) == "/opt/moetrain"
    assert json.loads(build.output([*command, "moetrain", "doctor", "--json"]))["problems"] == []
    timed("doctor from the file", start)
    shutil.rmtree(root)


def test_built_again_it_is_the_same(image: str) -> None:
    start = time.monotonic()
    build.build("buildah", "cpu", f"{IMAGE}-again", more=[*ON_BASE, "--no-cache"])
    timed("build without the cache", start)
    assert layers(f"{IMAGE}-again") == layers(image)


def test_the_gpu_stage_of_the_package(base: str) -> None:
    start = time.monotonic()
    build.fetch_wheels("cpu")  # setuptools, which both images have
    build.build("buildah", "gpu", "localhost/moetrain-package", "package", [*ON_BASE, "--build-arg", "PIP_NO_INDEX=1"])
    timed("stage package of the GPU image", start)
    listed = run("localhost/moetrain-package", "cat", "/dist/requirements.txt")
    assert listed + "\n" == pins.requirements(pins.read(), "gpu")
    wheels = run("localhost/moetrain-package", "ls", "/dist").split()
    assert len([name for name in wheels if name.startswith("moetrain-") and name.endswith("-none-any.whl")]) == 1


def test_the_gpu_stage_of_the_sources(base: str) -> None:
    github = os.environ.get("GITHUB", "https://github.com/")
    for source in pins.read()["sources"].values():
        url = source["url"].replace("https://github.com/", github)
        if subprocess.run(["git", "ls-remote", "--quiet", url, "HEAD"], stdout=subprocess.DEVNULL).returncode:
            pytest.skip(f"{url} cannot be reached; GITHUB=<a mirror's URL>/ names another place")
    start = time.monotonic()
    build.build(
        "buildah", "gpu", "localhost/moetrain-sources", "sources", [*ON_BASE, "--build-arg", f"GITHUB={github}"]
    )
    timed("stage sources of the GPU image", start)
    assert "libgdrapi.so.2" in run("localhost/moetrain-sources", "ls", "/opt/gdrcopy/lib").split()
    head = run("localhost/moetrain-sources", "git", "-C", "/src/deep_ep", "rev-parse", "HEAD")
    assert head == pins.read()["sources"]["deep_ep"]["commit"]
    assert "format.h" in run("localhost/moetrain-sources", "ls", "/src/deep_ep/third-party/fmt/include/fmt").split()
