"""The typed container: exact arguments for pyxis, an equal command for enroot, and nothing that could be more."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from containers.spec import PYXIS_OPTIONS, ContainerSpec, one_line

IMAGE = "/shared/images/moetrain.sqsh"
DIGEST = "ab" * 32


def test_arguments_of_a_closed_container() -> None:
    assert ContainerSpec(image=IMAGE).pyxis_arguments() == [
        f"--container-image={IMAGE}",
        "--container-readonly",
        "--no-container-mount-home",
        "--no-container-entrypoint",
        "--no-container-remap-root",
    ]


def test_arguments_of_an_open_one() -> None:
    spec = ContainerSpec(
        image=f"nvcr.io#nvidia/pytorch:26.06-py3@sha256:{DIGEST}",
        mounts=("/shared:/shared", "/data:/in:ro+rprivate"),
        env=("HF_HOME", "NCCL_DEBUG"),
        workdir="/workspace",
        writable=True,
        home=True,
        entrypoint=True,
    )
    assert spec.pyxis_arguments() == [
        f"--container-image=nvcr.io#nvidia/pytorch:26.06-py3@sha256:{DIGEST}",
        "--container-mounts=/shared:/shared,/data:/in:ro+rprivate",
        "--container-workdir=/workspace",
        "--container-env=HF_HOME,NCCL_DEBUG",
        "--container-writable",
        "--container-mount-home",
        "--container-entrypoint",
        "--no-container-remap-root",
    ]


@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=3)))
def test_every_option_is_one_of_pyxis(switches: tuple[bool, bool, bool]) -> None:
    writable, home, entrypoint = switches
    spec = ContainerSpec(
        image=IMAGE, mounts=("/a:/b",), env=("A",), workdir="/", writable=writable, home=home, entrypoint=entrypoint
    )
    names = [argument.removeprefix("--").partition("=")[0] for argument in spec.pyxis_arguments()]
    assert set(names) <= PYXIS_OPTIONS and len(names) == len(set(names))
    for name in ("mount-home", "entrypoint"):  # each switch is there, on or off
        assert (f"container-{name}" in names) != (f"no-container-{name}" in names)
    assert ("container-writable" in names) != ("container-readonly" in names)


ENROOT = """#!/usr/bin/env python3
import json, os, stat, sys
words = sys.argv[1:]
rc = open(words[words.index("--rc") + 1]).read() if "--rc" in words else None
settings = {name: value for name, value in os.environ.items() if name.startswith("ENROOT_")}
print(json.dumps({"words": words, "rc": rc, "settings": settings}))
"""


def started(spec: ContainerSpec, command: list[str], folder: Path) -> dict[str, Any]:
    """What enroot gets when bash runs the printed line."""
    (folder / "enroot").write_text(ENROOT)
    (folder / "enroot").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "A": "1", "B": "2 3", "EMPTY": ""}
    line = spec.enroot_command(command)
    result = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_enroot_starts_the_same_container(tmp_path: Path) -> None:
    spec = ContainerSpec(
        image=IMAGE,
        mounts=("/shared:/shared", "/data:/in:ro+rprivate"),
        env=("A", "EMPTY", "NOT_SET", "B"),
        workdir="/w",
    )
    found = started(spec, ["python", "-c", "print('a b')"], tmp_path)
    assert found["settings"] == {"ENROOT_ROOTFS_WRITABLE": "n", "ENROOT_MOUNT_HOME": "n", "ENROOT_REMAP_ROOT": "n"}
    assert found["rc"] == 'exec "$@"\n'
    words = found["words"]
    assert words[0] == "start" and words[1] == "--rc"
    assert words[3:] == [
        *("--mount", "/shared:/shared:x-create=auto,rbind"),
        *("--mount", "/data:/in:x-create=auto,rbind,ro,rprivate"),
        *("--env", "A", "--env", "B"),
        *(IMAGE, "env", "--chdir=/w", "python", "-c", "print('a b')"),
    ]


def test_enroot_opens_what_the_container_opens(tmp_path: Path) -> None:
    spec = ContainerSpec(image=IMAGE, writable=True, home=True, entrypoint=True)
    found = started(spec, ["true"], tmp_path)
    assert found["settings"] == {"ENROOT_ROOTFS_WRITABLE": "y", "ENROOT_MOUNT_HOME": "y", "ENROOT_REMAP_ROOT": "n"}
    assert found["rc"] is None and found["words"] == ["start", IMAGE, "true"]


def test_enroot_needs_a_file() -> None:
    with pytest.raises(ValueError, match="enroot import"):
        ContainerSpec(image=f"ubuntu@sha256:{DIGEST}").enroot_command(["true"])


REFUSED = [
    ("image", "moetrain.sqsh"),
    ("image", "nvcr.io#nvidia/pytorch:26.06-py3"),
    ("image", f"{IMAGE}\n#SBATCH --partition=root"),
    ("image", f"{IMAGE} --container-writable"),
    ("mounts", "/a"),
    ("mounts", "a:/b"),
    ("mounts", "/a:/b,/etc:/etc"),
    ("mounts", "/a:/b:ro:rw"),
    ("mounts", "/a:/b:RO"),
    ("mounts", '/a:/$(touch${IFS}x)"'),
    ("mounts", "/a`id`:/b"),
    ("mounts", "/a b:/c"),
    ("mounts", "/a:/b\n"),
    ("mounts", "/a:/b\x00"),
    ("env", "A=1"),
    ("env", "A,B"),
    ("env", "1A"),
    ("env", "LD_PRELOAD;x"),
    ("workdir", "w"),
    ("workdir", "/w\r"),
    ("sha256", "12"),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{field}:{value!r}" for field, value in REFUSED])
def test_what_could_be_more_than_it_says_is_refused(field: str, value: str) -> None:
    raw: dict[str, Any] = {"image": IMAGE, field: [value] if field in ("mounts", "env") else value}
    with pytest.raises(ValidationError, match=field):
        ContainerSpec.model_validate(raw)


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u200b", "\u202e"])
def test_control_characters(character: str) -> None:
    assert one_line("A line with umlauts äö, and: #$'\"`") == "A line with umlauts äö, and: #$'\"`"
    with pytest.raises(ValueError, match=f"U\\+{ord(character):04X}"):
        one_line(f"before{character}after")


def test_the_image_file_is_held_against_its_hash(tmp_path: Path) -> None:
    image = tmp_path / "image.sqsh"
    with pytest.raises(ValueError, match=r"image\.sqsh does not exist; make it with `make sqsh`"):
        ContainerSpec(image=str(image)).check_image()
    image.write_bytes(b"squashed")
    digest = hashlib.sha256(b"squashed").hexdigest()
    assert "not pinned" in ContainerSpec(image=str(image)).check_image()
    assert "as expected" in ContainerSpec(image=str(image), sha256=digest).check_image()
    with pytest.raises(ValueError, match=f"has SHA-256 {digest}, expected {DIGEST}"):
        ContainerSpec(image=str(image), sha256=DIGEST).check_image()

    sidecar = tmp_path / "image.sqsh.sha256"
    sidecar.write_text(f"{digest}  image.sqsh\n")
    assert "as expected" in ContainerSpec(image=str(image)).check_image()
    sidecar.write_text(f"{DIGEST}  image.sqsh\n")
    with pytest.raises(ValueError, match="expected abab"):
        ContainerSpec(image=str(image)).check_image()
    sidecar.write_text("no hash at all\n")
    with pytest.raises(ValueError, match="does not begin with a SHA-256"):
        ContainerSpec(image=str(image)).check_image()


def test_an_image_of_a_registry_is_pinned_by_its_name() -> None:
    spec = ContainerSpec(image=f"nvcr.io#nvidia/pytorch@sha256:{DIGEST}")
    assert "pinned by its digest" in spec.check_image()


def test_one_mount_more() -> None:
    spec = ContainerSpec(image=IMAGE, mounts=("/a:/a",))
    assert spec.with_mount("/b:/b:ro").mounts == ("/a:/a", "/b:/b:ro") and spec.mounts == ("/a:/a",)
    with pytest.raises(ValidationError):
        spec.with_mount("/b,/c")
