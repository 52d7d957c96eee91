"""Packing documents into rows of a fixed length.

A document longer than a row is cut into pieces of a row's length and a rest; every piece is a document of its own.
Pieces are placed by best fit: the row with the least space that still holds the piece. Documents are shuffled first
and then taken in windows, longest first inside a window, with a bounded number of rows open; so memory is bounded,
the order inside the data does not show in the rows, and waste is near that of sorting everything (1 % and less for
lengths well below a row).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetrain.data.tokens import TokenFile

Row = list[tuple[NDArray[np.int64], NDArray[np.bool_]]]  # the documents of a row: token ids and loss flags

IGNORE = -100  # label that carries no loss, in Transformers
WINDOW = 8192  # pieces sorted together
OPEN_ROWS = WINDOW  # rows with space left that are searched; fewer, and rows close before the short pieces come


class Pieces(NamedTuple):
    """Runs of tokens, one entry each; parallel int64 arrays."""

    document: NDArray[np.int64]
    """Number of the document in its file."""
    start: NDArray[np.int64]
    """First token, counted from the start of the document."""
    length: NDArray[np.int64]


def whole(file: TokenFile, documents: NDArray[np.int64]) -> Pieces:
    """The documents as one piece each."""
    return Pieces(documents, np.zeros_like(documents), file.lengths[documents])


def cut(pieces: Pieces, seq_len: int) -> Pieces:
    """Cut pieces longer than `seq_len` into parts of `seq_len` tokens and a rest."""
    counts = -(-pieces.length // seq_len)
    owner = np.repeat(np.arange(len(counts)), counts)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = part * seq_len
    length = np.minimum(pieces.length[owner] - offset, seq_len)
    return Pieces(pieces.document[owner], pieces.start[owner] + offset, length)


def truncate(pieces: Pieces, seq_len: int) -> Pieces:
    """Keep the first `seq_len` tokens of each piece."""
    return Pieces(pieces.document, pieces.start, np.minimum(pieces.length, seq_len))


def best_fit(lengths: NDArray[np.int64], seq_len: int, seed: int = 0) -> NDArray[np.int64]:
    """Row of each piece, int64 [pieces]; rows are numbered from 0 without gaps.

    No row holds more than `seq_len` tokens. The same lengths and seed give the same rows.
    """
    assert len(lengths) == 0 or lengths.max() <= seq_len
    rows = np.empty(len(lengths), dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(lengths))
    space: list[tuple[int, int]] = []  # (tokens left, row), ascending: the best fit is found by bisection
    num_rows = 0
    for first in range(0, len(order), WINDOW):
        window = order[first : first + WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        for piece, length in zip(window.tolist(), lengths[window].tolist(), strict=True):
            at = bisect_left(space, (length, -1))
            if at < len(space):
                left, row = space.pop(at)
            else:
                left, row = seq_len, num_rows
                num_rows += 1
            rows[piece] = row
            if left > length:
                insort(space, (left - length, row))
                if len(space) > OPEN_ROWS:
                    space.pop(0)
    return rows


class RowPlan:
    """Which pieces of a token file make up each row."""

    def __init__(
        self, file: TokenFile, pieces: Pieces, rows: NDArray[np.int64], *, num_label_tokens: int, num_left_out: int
    ) -> None:
        order = np.argsort(rows, kind="stable")
        self.file = file
        self.num_label_tokens = num_label_tokens
        self.num_left_out = num_left_out
        self.pieces = Pieces(*(column[order] for column in pieces))
        self.num_rows = int(rows.max()) + 1 if len(rows) else 0
        self._first = np.searchsorted(rows[order], np.arange(self.num_rows + 1))

    @property
    def num_tokens(self) -> int:
        return int(self.pieces.length.sum())

    @property
    def max_documents(self) -> int:
        """Most documents in a row, its padding counted as one."""
        return int(np.diff(self._first).max(initial=0)) + 1

    def documents_of(self, row: int) -> Row:
        """Token ids (int64) and loss flags (bool) of the documents of a row."""
        run = range(int(self._first[row]), int(self._first[row + 1]))
        document, start, length = self.pieces
        return [self.file.read(int(document[i]), int(start[i]), int(length[i])) for i in run]


def plan_rows(file: TokenFile, pieces: Pieces, seq_len: int, packing: bool) -> RowPlan:
    """Place pieces into rows. Pieces without a token that carries loss are left out, so every row has one; without
    packing, what is beyond `seq_len` is left out too.

    The first token of a piece never carries loss: nothing of its document predicts it.
    """
    num_tokens = int(pieces.length.sum())
    pieces = cut(pieces, seq_len) if packing else truncate(pieces, seq_len)
    labels = file.labels_in(pieces.document, pieces.start + 1, pieces.length - 1)
    pieces = Pieces(*(column[labels > 0] for column in pieces))
    rows = best_fit(pieces.length, seq_len) if packing else np.arange(len(pieces.length))
    return RowPlan(
        file,
        pieces,
        rows,
        num_label_tokens=int(labels[labels > 0].sum()),
        num_left_out=num_tokens - int(pieces.length.sum()),
    )


def collate(
    rows: list[Row],
    seq_len: int,
    pad_id: int,
    *,
    packing: bool,
    document_mask: bool,
) -> dict[str, Tensor]:
    """Rows of documents -> a batch of CPU tensors [rows, seq_len].

    Returns:
        `input_ids`, `labels`, `position_ids` (int64). `labels` follow Transformers (not shifted); they are -100 where
        no loss falls, on the first token of every document, and on padding.
        With packing and `document_mask`: positions restart in each document and `seq_idx` (int32, the type that the
        kernels of Mamba read) numbers the documents of a row; padding at the end is a document of its own.
        With packing alone: no positions, since the model's own run through the row.
        Without packing: `attention_mask` (int64), 0 on padding.
    """
    shape = (len(rows), seq_len)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    position_ids = np.broadcast_to(np.arange(seq_len), shape).copy()
    seq_idx = np.zeros(shape, dtype=np.int32)
    used = np.zeros(shape, dtype=np.int64)
    for row, documents in enumerate(rows):
        start = 0
        for number, (ids, loss) in enumerate(documents):
            end = start + len(ids)
            input_ids[row, start:end] = ids
            labels[row, start + 1 : end] = np.where(loss[1:], ids[1:], IGNORE)
            seq_idx[row, start:end] = number
            position_ids[row, start:end] = np.arange(len(ids))
            start = end
        used[row, :start] = 1
        seq_idx[row, start:] = len(documents)
        position_ids[row, start:] = np.arange(seq_len - start)
    batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
    if packing and document_mask:
        return batch | {"position_ids": torch.from_numpy(position_ids), "seq_idx": torch.from_numpy(seq_idx)}
    return batch if packing else batch | {"attention_mask": torch.from_numpy(used)}
