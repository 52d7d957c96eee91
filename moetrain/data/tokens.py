"""Token files: tokenised documents on disk, read through a memory map.

Layout, little-endian:

    0     magic "moetrain", then the CRC-32 of the header (uint32)
    12    header, JSON, padded with blanks to byte 4096
    4096  tokens of all documents, uint16 or uint32
    then  zeros up to a multiple of 8 bytes, the end of each document's tokens (int64), the hash of each (uint64)

Where only part of the tokens carry loss (chat), tokens are uint32 and the highest bit marks those that do.
A file is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAGIC = b"moetrain"
VERSION = 1
HEADER_BYTES = 4096
LOSS_BIT = np.uint32(1 << 31)
_VERIFY_BYTES = 64 << 20  # read at a time


class TokenWriter:
    """Writes one token file; use it as a context manager. Without a call of `commit` nothing stays behind.

    Raises:
        OSError: the disk is full or not writable; the message names the directory.
    """

    def __init__(self, path: Path, *, vocab_size: int, masked: bool) -> None:
        self.path = path
        self.masked = masked
        self.dtype = np.dtype("<u4" if masked or vocab_size > 1 << 16 else "<u2")
        self.num_tokens = 0
        self.num_label_tokens = 0
        self._ends = array("q")
        self._hashes = array("Q")
        self._checksum = 0
        self._partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        self._file: BinaryIO | None = None

    def __enter__(self) -> TokenWriter:
        with self._naming_its_place():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb")
            self._file.write(b"\0" * HEADER_BYTES)
        return self

    def add(self, ids: NDArray[np.int64], loss: NDArray[np.bool_] | None = None, *, part: bool = False) -> None:
        """Append one document: int64 [n] ids, bool [n] loss flags (None: every token carries loss).

        `part` marks a further part of what the document before it came from: it takes over its hash, so that both end
        up on the same side of a split.
        """
        assert self._file is not None and (loss is not None) == self.masked
        tokens = ids.astype(self.dtype)
        if loss is not None:
            tokens |= np.where(loss, LOSS_BIT, np.uint32(0))
        data = tokens.tobytes()
        with self._naming_its_place():
            self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self.num_tokens += len(ids)
        self.num_label_tokens += len(ids) if loss is None else int(loss.sum())
        self._ends.append(self.num_tokens)
        own = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        self._hashes.append(self._hashes[-1] if part else own)

    def commit(self, facts: dict[str, Any]) -> None:
        """Write index and header, with `facts` (JSON) in it, and give the file its name."""
        assert self._file is not None
        columns = np.frombuffer(self._ends, "<i8").tobytes() + np.frombuffer(self._hashes, "<u8").tobytes()
        index = b"\0" * _padding(self.num_tokens * self.dtype.itemsize) + columns
        header = facts | {
            "version": VERSION,
            "dtype": self.dtype.name,
            "masked": self.masked,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "label_tokens": self.num_label_tokens,
            "tokens_crc32": self._checksum,
            "index_crc32": zlib.crc32(index),
        }
        text = json.dumps(header).encode()
        assert len(text) <= HEADER_BYTES - 12, "header too long"
        text = text.ljust(HEADER_BYTES - 12)
        with self._naming_its_place():
            self._file.write(index)
            self._file.seek(0)
            self._file.write(MAGIC + zlib.crc32(text).to_bytes(4, "little") + text)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            os.replace(self._partial, self.path)

    @property
    def num_documents(self) -> int:
        return len(self._ends)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            with suppress(OSError):  # closing writes what is buffered, and fails again on a full disk
                self._file.close()
        self._partial.unlink(missing_ok=True)

    @contextmanager
    def _naming_its_place(self) -> Iterator[None]:
        """What the system says of a failed write names no file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"cannot write to {self.path.parent}: {error.strerror or error}") from error


class TokenFile:
    """A complete token file, opened for reading. `all_tokens` puts loss on every token, whatever is marked.

    Raises:
        ValueError: no token file, of another version, or damaged: the header and the index are checked by CRC-32, the
            tokens by size alone (`verify` reads them all).
    """

    def __init__(self, path: Path, *, all_tokens: bool = False) -> None:
        self.path = path
        self.header = _read_header(path)
        self.num_documents: int = self.header["documents"]
        self.num_tokens: int = self.header["tokens"]
        self.masked: bool = self.header["masked"] and not all_tokens
        dtype = np.dtype(self.header["dtype"]).newbyteorder("<")
        token_bytes = self.num_tokens * dtype.itemsize
        padding = _padding(token_bytes)
        index_bytes = padding + 16 * self.num_documents
        expected, found = HEADER_BYTES + token_bytes + index_bytes, path.stat().st_size
        if expected != found:
            raise ValueError(f"{path} is truncated or damaged: {found} bytes instead of {expected}; write it again")
        self._tokens = _map(path, dtype, HEADER_BYTES, self.num_tokens)
        index = _map(path, np.dtype("u1"), HEADER_BYTES + token_bytes, index_bytes)
        if zlib.crc32(index.tobytes()) != self.header["index_crc32"]:
            raise ValueError(f"{path} is damaged: its index does not match its checksum; write it again")
        self.ends, self.hashes = _split_index(index[padding:])
        self.lengths: NDArray[np.int64] = np.diff(self.ends, prepend=0)

    def read(self, document: int, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Token ids (int64) and loss flags (bool) of a run of a document; a copy."""
        first = int(self.ends[document] - self.lengths[document]) + start
        tokens = self._tokens[first : first + length]
        ids = tokens & ~LOSS_BIT if self.header["masked"] else tokens
        loss = (tokens & LOSS_BIT) != 0 if self.masked else np.ones(length, dtype=bool)
        return ids.astype(np.int64), loss

    def labels_in(
        self, document: NDArray[np.int64], start: NDArray[np.int64], length: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Number of loss-bearing tokens in each run, int64."""
        if not self.masked:
            return length
        first = self.ends[document] - self.lengths[document] + start
        runs = zip(first.tolist(), (first + length).tolist(), strict=True)
        return np.fromiter((np.count_nonzero(self._tokens[a:b] & LOSS_BIT) for a, b in runs), np.int64, len(first))

    def verify(self) -> None:
        """Read all tokens and compare their checksum. Raises ValueError when they differ."""
        data = self._tokens.view("u1")
        checksum = 0
        for start in range(0, len(data), _VERIFY_BYTES):
            checksum = zlib.crc32(data[start : start + _VERIFY_BYTES].tobytes(), checksum)
        if checksum != self.header["tokens_crc32"]:
            raise ValueError(f"{self.path} is damaged: its tokens do not match their checksum; write it again")

    @property
    def identity(self) -> str:
        """Changes with any change of the content."""
        return f"{self.num_tokens}-{self.header['tokens_crc32']:08x}-{self.header['index_crc32']:08x}"


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if start[:8] != MAGIC:
        raise ValueError(f"{path} is not a token file; make one with `moetrain data tokenize`")
    text = start[12:]
    if len(start) < HEADER_BYTES or zlib.crc32(text) != int.from_bytes(start[8:12], "little"):
        raise ValueError(f"{path} is truncated or damaged: its header is not complete; write it again")
    header: dict[str, Any] = json.loads(text)
    if header["version"] != VERSION:
        raise ValueError(f"{path} has format version {header['version']}, this package reads {VERSION}; write it again")
    return header


def _split_index(columns: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    half = len(columns) // 2
    return columns[:half].view("<i8"), columns[half:].view("<u8")


def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> NDArray[Any]:
    """A memory map as a plain array; numpy refuses to map nothing."""
    if count == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", offset, (count,)))


def _padding(size: int) -> int:
    return -size % 8
