"""A model directory is checked before a run: what can be known without reading tensors, then the checksums."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moetrain.checkpoint.agree import gather, rank, together, world_size
from moetrain.checkpoint.format import TensorInfo, read_header
from moetrain.checkpoint.manifest import Progress, read_manifest, verify_files

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """A model directory whose files fit together.

    Attributes:
        directory: where it is.
        tensors: every tensor by name.
        sizes: bytes of each file of weights.
        digests: known SHA-256 of files, from `SHA256SUMS` or from the hub's download records.
    """

    directory: Path
    tensors: dict[str, TensorInfo]
    sizes: dict[str, int]
    digests: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def without_digest(self) -> list[str]:
        return sorted(self.sizes.keys() - self.digests.keys())


def check_checkpoint(path: str | Path) -> CheckpointInfo:
    """Check a Hugging Face model directory without reading tensors; collective, each rank reads some of the headers.

    Files named by the index exist and are whole, headers are valid and cover their files exactly, index and files name
    the same tensors. Only safetensors is read: pickles (`*.bin`, `*.pt`, ...) can run code and are never opened.

    Raises:
        ValueError: any of this fails; the message names the file and the remedy. Every rank raises.
    """
    directory = Path(path)
    with together():
        weight_map = _read_layout(directory)
    files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    headers: dict[str, dict[str, TensorInfo]] = {}
    with together():
        for name in files[rank() :: world_size()]:
            headers[name] = {k: _placed(v, name) for k, v in read_header(directory / name).items()}
    for part in gather(headers):
        headers.update(part)
    if weight_map is not None:
        _compare_index(directory, weight_map, headers)
    _check_unique(directory, headers)
    sizes = {name: (directory / name).stat().st_size for name in files}
    tensors = {name: info for file in files for name, info in headers[file].items()}
    return CheckpointInfo(directory, tensors, sizes, _known_digests(directory, files))


def verify_checksums(info: CheckpointInfo, progress: Progress | None = None) -> None:
    """Read the files whose SHA-256 is known and compare; collective, each rank reads its share.

    Files without a known checksum are named in one log line: of them only the headers were checked.

    Raises:
        ValueError: a file differs from its checksum; the message names it. Every rank raises.
    """
    verify_files(info.directory, info.digests, progress)
    if info.without_digest and rank() == 0:
        logger.warning(
            "%s: no checksum is known for %d of %d files (%s, ...), so only their headers were checked",
            info.directory,
            len(info.without_digest),
            len(info.sizes),
            info.without_digest[0],
        )


def _read_layout(directory: Path) -> dict[str, str] | None:
    """The index's {tensor: file}, None for a checkpoint in one file."""
    if not directory.is_dir():
        raise ValueError(f"no model directory at {directory}")
    if (directory / SINGLE_FILE).is_file():  # Transformers prefers it to an index beside it
        return None
    if (directory / INDEX_FILE).is_file():
        weight_map = _read_index(directory / INDEX_FILE)
        if missing := sorted(name for name in set(weight_map.values()) if not (directory / name).is_file()):
            raise ValueError(
                f"{directory} lacks {len(missing)} file(s) that {INDEX_FILE} names: {', '.join(missing[:5])}; "
                "finish the download or copy them"
            )
        return weight_map
    raise ValueError(_why_nothing(directory))


def _why_nothing(directory: Path) -> str:
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if shards:
        return f"{directory} holds {shards[0]}, but neither {SINGLE_FILE} nor {INDEX_FILE}"
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{directory} holds weights only as pickles ({', '.join(pickles[:3])}), which can run code when they are "
            "loaded and are never opened. Take the model's safetensors revision, or convert it where that risk is "
            "acceptable: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}"


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is corrupt: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path} names {name!r}, which is not a file of its directory")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name!r}; only safetensors files are read")
    return dict(weight_map)


def _placed(info: TensorInfo, file: str) -> TensorInfo:
    return TensorInfo(file, info.dtype, info.shape, info.start, info.end)


def _compare_index(directory: Path, weight_map: dict[str, str], headers: dict[str, dict[str, TensorInfo]]) -> None:
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ValueError(f"{directory / file} lacks the tensor {name} that {INDEX_FILE} places there")
    for file, tensors in headers.items():
        if surplus := [name for name in tensors if name not in weight_map]:
            raise ValueError(
                f"{directory / file} holds {len(surplus)} tensor(s) that {INDEX_FILE} does not name: {surplus[0]}, ..."
            )


def _check_unique(directory: Path, headers: dict[str, dict[str, TensorInfo]]) -> None:
    seen: dict[str, str] = {}
    for file, tensors in headers.items():
        for name in tensors:
            if name in seen:
                raise ValueError(f"{directory}: the tensor {name} is in both {seen[name]} and {file}")
            seen[name] = file


def _known_digests(directory: Path, files: list[str]) -> dict[str, str]:
    manifest = read_manifest(directory)
    found = {name: manifest.get(name) or _hub_digest(directory, name) for name in files}
    return {name: digest for name, digest in found.items() if digest is not None}


def _hub_digest(directory: Path, name: str) -> str | None:
    """SHA-256 that the hub's client recorded: the blob's name in its cache, or the ETag beside a local download.

    A file changed after its download has none (the client ignores its records then, too).
    """
    blob = (directory / name).resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    record = directory / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    if not record.is_file():
        return None
    lines = record.read_text(encoding="utf-8").split()
    if len(lines) != 3 or not re.fullmatch(r"[0-9a-f]{64}", lines[1]):
        return None
    unchanged = (directory / name).stat().st_mtime - 1 <= float(lines[2])
    return lines[1] if unchanged else None
