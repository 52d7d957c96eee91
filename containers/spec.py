"""What a job's container is, typed: printed as arguments of pyxis (`srun --container-*`) and as a command of enroot.

    spec = ContainerSpec(image="/shared/images/moetrain.sqsh", mounts=("/shared:/shared",), env=("HF_HOME",))
    spec.pyxis_arguments()         # for srun
    spec.enroot_command(["nvidia-smi"])   # the same container on one machine, without Slurm

pyxis writes mounts and names of variables into a shell script that it runs, so what could be more than a path or a name
there is refused here.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

PYXIS_OPTIONS = frozenset(
    {
        *("container-image", "container-mounts", "container-workdir", "container-name", "container-save"),
        *("container-mount-home", "no-container-mount-home", "container-remap-root", "no-container-remap-root"),
        *("container-entrypoint", "no-container-entrypoint", "container-entrypoint-log"),
        *("container-writable", "container-readonly", "container-env", "container-unshare"),
    }
)
"""All that pyxis 0.24 adds to srun, from the table in its args.c."""

_PATH = r"/[\w.@%+=~/-]*"
_IMAGE = re.compile(rf"{_PATH}|(?:[\w.-]+@)?(?:[\w.:-]+#)?[\w./-]+(?::[\w.-]+)?@sha256:[0-9a-f]{{64}}")
_MOUNT = re.compile(rf"({_PATH}):({_PATH})(?::([a-z=-]+(?:\+[a-z=-]+)*))?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def one_line(text: str) -> str:
    """The text, if all of it can be printed on one line.

    Raises:
        ValueError: it holds a control character, or one that moves, hides or ends a line; the message names the first.
    """
    bad = [character for character in text if not character.isprintable()]
    if bad:
        raise ValueError(f"holds the control character U+{ord(bad[0]):04X}; take it out")
    return text


def _image(text: str) -> str:
    if not _IMAGE.fullmatch(text):
        raise ValueError(
            f"{text!r} is neither the absolute path of a squashfs file nor an image pinned by digest, such as "
            "nvcr.io#nvidia/pytorch@sha256:<64 digits>"
        )
    return text


def _mount(text: str) -> str:
    if not _MOUNT.fullmatch(text):
        raise ValueError(
            f"{text!r} is not SOURCE:TARGET or SOURCE:TARGET:FLAG+FLAG with absolute paths of letters, digits and "
            "@%+=~._-, such as /shared/data:/data:ro"
        )
    return text


def _variable(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is no name of an environment variable")
    return text


def _absolute(text: str) -> str:
    if not re.fullmatch(_PATH, text):
        raise ValueError(f"{text!r} is not an absolute path of letters, digits and @%+=~._-")
    return text


Line = Annotated[str, AfterValidator(one_line)]
AbsolutePath = Annotated[Line, AfterValidator(_absolute)]
VariableName = Annotated[Line, AfterValidator(_variable)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ContainerSpec(BaseModel):
    """A container of a job. Closed by default: read-only, without home directory and the image's entrypoint."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    image: Annotated[Line, AfterValidator(_image)]
    """Absolute path of a squashfs file that all nodes see, or an image of a registry, pinned by digest."""
    sha256: Sha256 | None = None
    """Of the squashfs file. Without it, `<image>.sha256` counts, as `sha256sum` writes it, where there is one."""
    mounts: tuple[Annotated[Line, AfterValidator(_mount)], ...] = ()
    """`SOURCE:TARGET[:FLAG+FLAG]`, such as `/shared:/shared` or `/data:/data:ro`."""
    env: tuple[VariableName, ...] = ()
    """Names of the variables that come in from the host. Their host values win over the image's."""
    workdir: AbsolutePath | None = None
    """Directory in the container to start in; None: the image's."""
    writable: bool = False
    """Whether the container may write to its own file system; what it writes goes with it."""
    home: bool = False
    """Whether the user's home directory is mounted."""
    entrypoint: bool = False
    """Whether the image's entrypoint runs first."""

    def pyxis_arguments(self) -> list[str]:
        """Arguments for srun; every switch is given, so that no site's default decides."""
        arguments = [f"--container-image={self.image}"]
        if self.mounts:
            arguments.append(f"--container-mounts={','.join(self.mounts)}")
        if self.workdir:
            arguments.append(f"--container-workdir={self.workdir}")
        if self.env:
            arguments.append(f"--container-env={','.join(self.env)}")
        return [
            *arguments,
            "--container-writable" if self.writable else "--container-readonly",
            _switch("container-mount-home", self.home),
            _switch("container-entrypoint", self.entrypoint),
            "--no-container-remap-root",
        ]

    def enroot_command(self, command: Sequence[str]) -> str:
        """A line for bash that runs `command` in the same container with enroot alone.

        Without `workdir` it starts in /, pyxis in the image's directory. pyxis also hands on the other variables that
        srun exports, where the image does not set them; enroot none.

        Raises:
            ValueError: the image is in a registry; enroot starts files.
        """
        if not self.image.startswith("/"):
            raise ValueError(f"enroot starts squashfs files: first `enroot import docker://{self.image}`")
        writable, home = ("y" if on else "n" for on in (self.writable, self.home))
        words = [f"ENROOT_ROOTFS_WRITABLE={writable}", f"ENROOT_MOUNT_HOME={home}", "ENROOT_REMAP_ROOT=n"]
        words += ["enroot", "start"]
        if not self.entrypoint:
            words += ["--rc", "<(echo 'exec \"$@\"')"]  # in place of the image's command script
        for mount in self.mounts:
            words += ["--mount", shlex.quote(_fstab(mount))]
        words += [f"${{{name}:+--env {name}}}" for name in self.env]  # like pyxis only those that the host has
        inside = ["env", f"--chdir={self.workdir}", *command] if self.workdir else list(command)
        return " ".join([*words, shlex.quote(self.image), shlex.join(inside)])

    def with_mount(self, mount: str) -> ContainerSpec:
        """The same container with one mount more."""
        return ContainerSpec.model_validate(self.model_dump() | {"mounts": (*self.mounts, mount)})

    def expected_sha256(self) -> str | None:
        """What the image file must hash to: `sha256`, else the first word of `<image>.sha256`; None without either.

        Raises:
            ValueError: `<image>.sha256` holds something else.
        """
        sidecar = Path(f"{self.image}.sha256")
        if self.sha256 is not None or not sidecar.is_file():
            return self.sha256
        words = sidecar.read_text(encoding="utf-8", errors="replace").split()
        if not words or not re.fullmatch(r"[0-9a-f]{64}", words[0]):
            raise ValueError(f"{sidecar} does not begin with a SHA-256; write it with `sha256sum {self.image}`")
        return words[0]

    def check_image(self) -> str:
        """Read the image file and compare its hash; what was found, in one line.

        Raises:
            ValueError: it is missing, or its hash is not the expected one.
        """
        if not self.image.startswith("/"):
            return f"{self.image}: pinned by its digest"
        if not Path(self.image).is_file():
            raise ValueError(f"image {self.image} does not exist; make it with `make sqsh`, or name another by --image")
        expected = self.expected_sha256()
        if expected is None:
            return f"{self.image} is there; its hash is not pinned (container.sha256 in the site file)"
        found = file_sha256(self.image)
        if found != expected:
            raise ValueError(f"image {self.image} has SHA-256 {found}, expected {expected}; build or copy it again")
        return f"{self.image}: SHA-256 {found[:12]} as expected"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _switch(option: str, on: bool) -> str:
    return f"--{'' if on else 'no-'}{option}"


def _fstab(mount: str) -> str:
    """A mount as pyxis hands it to enroot: created where missing, with what is mounted below it."""
    source, target, *flags = mount.split(":")
    return ":".join([source, target, ",".join(["x-create=auto", "rbind", *(flags[0].split("+") if flags else [])])])
