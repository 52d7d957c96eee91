"""How a directory comes into being at once: written beside its place, renamed into it last.

`model.incomplete` is what a writer that died leaves behind; no reader takes it and the next writer removes it. Where
the file system cannot swap two directories, `model.replaced` holds the old one for the moment between two renames.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from .manifest import MANIFEST, read_manifest

INCOMPLETE = ".incomplete"
REPLACED = ".replaced"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def stage(target: Path) -> Path:
    """An empty directory `<target>.incomplete` to write into, after removing what an earlier writer left.

    Raises:
        ValueError: `target` is a file, or a directory with files that no earlier export or checkpoint wrote.
        OSError: the place is not writable.
    """
    staging = target.with_name(target.name + INCOMPLETE)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _settle(target)
        if staging.exists():
            shutil.rmtree(staging)
        _check_replaceable(target)
        staging.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {target.parent}: {error.strerror or error}") from error
    return staging


def publish(staging: Path, target: Path) -> None:
    """Put the finished `staging` in the place of `target`; the directory that was there is removed afterwards.

    The files must have reached the disk already; the directories are brought there here.
    """
    for directory in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        fsync_directory(directory)
    if not target.exists() or not any(target.iterdir()):
        os.rename(staging, target)
        fsync_directory(target.parent)
        return
    old = staging
    if not _exchange(staging, target):
        old = target.with_name(target.name + REPLACED)
        os.rename(target, old)
        os.rename(staging, target)
    fsync_directory(target.parent)
    shutil.rmtree(old)


def remove(target: Path) -> None:
    """Delete a published directory; one that dies on the way leaves no half of it under its name."""
    doomed = target.with_name(target.name + INCOMPLETE)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(target, doomed)
    shutil.rmtree(doomed)


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _settle(target: Path) -> None:
    """End a replacement that stopped between its two renames: the old directory goes back to its place."""
    replaced = target.with_name(target.name + REPLACED)
    if replaced.exists() and target.exists():
        shutil.rmtree(replaced)
    elif replaced.exists():
        os.rename(replaced, target)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; choose another output directory")
    ours = {MANIFEST, *read_manifest(target)}
    found = {str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir()}
    if found and MANIFEST not in found or found - ours:
        names = ", ".join(sorted(found - ours)[:3])
        raise ValueError(
            f"{target} holds files that would be lost ({names}): it is not, or no longer, as an earlier export left it. "
            "Choose another directory, or move them away"
        )


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the kernel or the file system cannot (many network ones)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, f"cannot put {a} in the place of {b}: {os.strerror(code)}")
