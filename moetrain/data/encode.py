"""Records -> documents of token ids."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import groupby, islice
from multiprocessing import get_context
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from moetrain.data.chat import ChatEncoder
from moetrain.data.sources import BadLine, BadLines, Record

Document = tuple[NDArray[np.int64], NDArray[np.bool_] | None]
_BATCH_CHARACTERS = 4 << 20  # of text, encoded at a time over all cores
_BATCH_CHATS = 64  # sent to a worker process at a time
_WAITING = 4  # batches for each worker that are under way


class Form(NamedTuple):
    """What documents look like."""

    masked: bool
    """They have loss flags."""
    all_tokens: bool
    """Every token carries loss, in chats too."""


class Encoder:
    """Encodes records in their order; use it as a context manager.

    Texts end with the end-of-text token and are encoded in batches, on all cores (the tokenizer's own threads). Chats
    follow the chat template, whose rendering holds Python's lock, so that `workers` processes can share them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: Form,
        bad: BadLines,
        *,
        workers: int = 1,
        max_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.form = form
        self.bad = bad
        self.workers = workers
        self.batch_characters = min(_BATCH_CHARACTERS, max_tokens or _BATCH_CHARACTERS)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, records: Iterable[Record]) -> Iterator[tuple[float, list[Document]]]:
        """Bytes of input and documents of each record."""
        for is_chat, run in groupby(records, key=self._is_chat):
            encode = self._chats if is_chat else self._texts
            yield from encode(run)

    def _is_chat(self, record: Record) -> bool:
        if record.messages is None:
            return False
        if not (self.form.masked or self.form.all_tokens):
            raise ValueError(f"{record.origin} is a chat in a source that began with text; make two sources of them")
        return True

    def _texts(self, records: Iterator[Record]) -> Iterator[tuple[float, list[Document]]]:
        while batch := _take_characters(records, self.batch_characters):
            documents = self._encode_texts([record.text or "" for record in batch])
            yield from ((record.size, [document]) for record, document in zip(batch, documents, strict=True))

    def _encode_texts(self, texts: list[str]) -> list[Document]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has no eos_token, which ends each text; set it in tokenizer_config.json")
        documents: list[Document] = []
        for ids in self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
            ended = np.asarray(ids if ids[-1:] == [eos] else [*ids, eos], dtype=np.int64)
            documents.append((ended, np.ones(len(ended), dtype=bool) if self.form.masked else None))
        return documents

    def _chats(self, records: Iterator[Record]) -> Iterator[tuple[float, list[Document]]]:
        batches = iter(lambda: list(islice(records, _BATCH_CHATS)), [])
        for batch, encoded in self._in_processes(batches) if self.workers > 1 else self._here(batches):
            for record, documents in zip(batch, encoded, strict=True):
                if isinstance(documents, BadLine):
                    self.bad.report(documents)
                    documents = []
                yield record.size, documents

    def _here(self, batches: Iterator[list[Record]]) -> Iterator[tuple[list[Record], list[_Result]]]:
        chat = ChatEncoder(self.tokenizer)
        for batch in batches:
            yield batch, _encode_chats(chat, self.form, batch)

    def _in_processes(self, batches: Iterator[list[Record]]) -> Iterator[tuple[list[Record], list[_Result]]]:
        """Results in order, with a bounded number of batches under way."""
        if self._pool is None:
            # spawn: a fork of a process with threads (the tokenizer's, the GPU's) can hang
            self._pool = ProcessPoolExecutor(
                self.workers, get_context("spawn"), initializer=_start_worker, initargs=(self.tokenizer, self.form)
            )
        waiting: deque[tuple[list[Record], Future[list[_Result]]]] = deque()
        for batch in batches:
            waiting.append((batch, self._pool.submit(_work, batch)))
            if len(waiting) >= _WAITING * self.workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


_Result = list[Document] | BadLine


def _take_characters(records: Iterator[Record], characters: int) -> list[Record]:
    batch: list[Record] = []
    while characters > 0 and (record := next(records, None)) is not None:
        batch.append(record)
        characters -= len(record.text or "")
    return batch


def _encode_chats(chat: ChatEncoder, form: Form, batch: list[Record]) -> list[_Result]:
    return [_encode_chat(chat, form, record) for record in batch]


def _encode_chat(chat: ChatEncoder, form: Form, record: Record) -> _Result:
    try:
        documents = chat.encode(record.messages, record.tools, record.origin, all_tokens=form.all_tokens)
    except BadLine as error:
        return error
    return [(ids, loss if form.masked else None) for ids, loss in documents]


_worker: tuple[ChatEncoder, Form] | None = None  # of a worker process


def _start_worker(tokenizer: PreTrainedTokenizerBase, form: Form) -> None:
    global _worker
    _worker = ChatEncoder(tokenizer), form


def _work(batch: list[Record]) -> list[_Result]:
    assert _worker is not None
    return _encode_chats(*_worker, batch)
