"""SHA-256 manifests in the form of `sha256sum`: `cd DIR && sha256sum -c SHA256SUMS` checks one without this package."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from moetrain.checkpoint.agree import rank, together, world_size
from moetrain.checkpoint.format import read_range

MANIFEST = "SHA256SUMS"

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes to do, of this rank alone."""


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    for block in read_range(path, 0, path.stat().st_size):
        digest.update(block)
    return digest.hexdigest()


def write_manifest(directory: Path, digests: Mapping[str, str]) -> None:
    """Write the manifest of `directory` from {file: SHA-256 in hex}: whole and on the disk, or not at all."""
    draft = directory / (MANIFEST + ".draft")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, directory / MANIFEST)


def read_manifest(directory: Path) -> dict[str, str]:
    """The manifest as {file: SHA-256 in hex}, empty when there is none. Raises ValueError for a malformed one."""
    path = directory / MANIFEST
    if not path.is_file():
        return {}
    digests = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None:
            raise ValueError(f"{path}:{number} is no line of sha256sum; delete the file if its sums do not matter")
        digests[match[2]] = match[1]
    return digests


def verify_files(directory: Path, digests: Mapping[str, str], progress: Progress | None = None) -> None:
    """Read the files and compare their SHA-256 with `digests`; collective, each rank reads its share.

    Raises:
        ValueError: a file differs; the message names it.
    """
    with together():
        mine = _share_of(directory, sorted(digests))
        total = sum((directory / name).stat().st_size for name in mine)
        done = 0
        for name in mine:
            if hash_file(directory / name) != digests[name]:
                raise ValueError(
                    f"{directory / name} is corrupt: its SHA-256 is not {digests[name]}; fetch or write it again"
                )
            done += (directory / name).stat().st_size
            if progress is not None:
                progress(done, total)


def _share_of(directory: Path, names: list[str]) -> list[str]:
    """This rank's files: the largest first, each to the rank with the least to read."""
    sizes = {name: (directory / name).stat().st_size for name in names}
    loads = [0] * world_size()
    mine = []
    for name in sorted(names, key=lambda n: -sizes[n]):
        reader = loads.index(min(loads))
        loads[reader] += sizes[name]
        if reader == rank():
            mine.append(name)
    return mine
