"""How a directory comes into being at once: written beside its place, renamed into it last.

`model.incomplete` is what a writer that died leaves behind; no reader takes it and the next writer removes it. Where
the file system cannot swap two directories, `model.replaced` holds the old one for the moment between two renames.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.checkpoint.agree import rank, together
from moetrain.checkpoint.manifest import MANIFEST, read_manifest

INCOMPLETE = ".incomplete"
REPLACED = ".replaced"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staged(target: Path, needed: int) -> Iterator[Path]:
    """A directory `<target>.incomplete` for all ranks to write into, which the body publishes; collective.

    When the body raises, the directory is deleted, so a full disk is not left full.

    Args:
        needed: bytes that will be written.

    Raises:
        ValueError: `target` is a file, or a directory with weights that this package did not write.
        OSError: the place is not writable, or has less room than needed.
    """
    staging = target.with_name(target.name + INCOMPLETE)
    with together():
        if rank() == 0:
            _make_staging(staging, target, needed)
    try:
        yield staging
    except BaseException:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _make_staging(staging: Path, target: Path, needed: int) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target)
        _check_place(target)
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{_size(needed)} are needed, {_size(free)} are free")
        staging.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {target.parent}: {error.strerror or error}") from error


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.2f} MB"


def clear_leftovers(target: Path) -> None:
    """Clear up behind a writer that died: what it had not finished goes, what it was replacing is back in its place."""
    staging = target.with_name(target.name + INCOMPLETE)
    replaced = target.with_name(target.name + REPLACED)
    if replaced.exists() and not target.exists():
        os.rename(replaced, target)
    for leftover in (staging, replaced):
        if leftover.exists():
            _discard(leftover, target)


def publish(staging: Path, target: Path) -> None:
    """Put the finished `staging`, whose files are on the disk already, in the place of `target`.

    A directory that this package wrote is replaced in one step, and files that others added to it stay. In one that
    others made, which holds no weights, the files are placed one by one, the manifest last.
    """
    for directory in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        fsync_directory(directory)
    if not target.exists() or not any(target.iterdir()):
        os.rename(staging, target)
    elif (target / MANIFEST).exists():
        _replace(staging, target)
    else:
        _place_files(staging, target)
    fsync_directory(target.parent)


def remove(target: Path) -> None:
    """Delete a published directory; one that dies on the way leaves no half of it under its name."""
    clear_leftovers(target)
    doomed = target.with_name(target.name + INCOMPLETE)
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


def _check_place(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; choose another output directory")
    weights = sorted(path.name for glob in ("*.safetensors", "pytorch_model*.bin") for path in target.glob(glob))
    if weights and not (target / MANIFEST).exists():
        raise ValueError(f"{target} holds weights of another origin ({weights[0]}); choose another output directory")


def _replace(staging: Path, target: Path) -> None:
    old = staging
    if not _exchange(staging, target):
        old = target.with_name(target.name + REPLACED)
        os.rename(target, old)
        os.rename(staging, target)
    fsync_directory(target.parent)
    _discard(old, target)


def _place_files(staging: Path, target: Path) -> None:
    """Move the files one by one: weights before the index that names them, the manifest last."""
    order = [".safetensors", ".json", ".index.json", MANIFEST]
    files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda f: max((i for i, end in enumerate(order) if f.name.endswith(end)), default=1)):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / file, target / file)
    fsync_directory(target)
    shutil.rmtree(staging)


def _discard(old: Path, target: Path) -> None:
    """Delete a directory that is not in its place, after moving what its manifest does not name to `target`."""
    written = {name.split("/")[0] for name in read_manifest(old)}
    if written and target.is_dir():
        for entry in old.iterdir():
            if entry.name not in written | {MANIFEST} and not (target / entry.name).exists():
                os.rename(entry, target / entry.name)
    shutil.rmtree(old)


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
