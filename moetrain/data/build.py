"""From the data section of a configuration to loaders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from moetrain.config import DataConfig, Source
from moetrain.data.loader import Layout, Loader, Stream, Validation
from moetrain.data.packing import Pieces, RowPlan, plan_rows, whole
from moetrain.data.tokenize import apply_chat_template_file, open_source
from moetrain.data.tokens import TokenFile

Selection = list[tuple[TokenFile, Pieces]]


class Data(NamedTuple):
    train: Loader
    """Endless batches of this rank."""
    validation: Validation
    """Held-out rows: `validation.rows(n)` gives this rank's batches."""
    summary: dict[str, Any]
    """Counts of documents, tokens, rows and skipped lines, in plain Python types."""


def build_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dp_rank: int,
    dp_size: int,
    seed: int,
    cache_dir: Path,
    progress: bool,
) -> Data:
    """Tokenise what is not in `cache_dir` yet, split off the validation rows, pack, and give this rank its loaders.

    Every rank calls this; one of them tokenises and the others wait for its files. With `data.chat_template` the
    tokenizer is given that template.

    Raises:
        ValueError: a source is missing, empty, malformed or made with another tokenizer; the message names it.
    """
    apply_chat_template_file(config, tokenizer)

    def open_all(sources: list[Source]) -> list[list[TokenFile]]:
        first = dp_rank == 0
        return [open_source(source, config, tokenizer, cache_dir, first=first, progress=progress) for source in sources]

    train_files = open_all(config.train)
    if config.validation is None:
        validation_sources = config.train
        train, held_out = split(train_files, config.validation_fraction)
    else:
        validation_sources = config.validation
        train = [_everything(files) for files in train_files]
        held_out = [_everything(files) for files in open_all(config.validation)]
    train_streams = _streams(config.train, train, config, "training")
    held_out_streams = _streams(validation_sources, held_out, config, "validation")
    layout = Layout(
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        pad_id=_pad_id(tokenizer),
        packing=config.packing,
        document_mask=config.document_mask,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    loader = Loader(train_streams, layout, seed, _identity(config, train_files, seed))
    summary = {
        "train": _counts(train_streams, config.seq_len),
        "validation": _counts(held_out_streams, config.seq_len),
        "skipped_lines": sum(file.header["skipped_lines"] for files in train_files for file in files),
        "sources": [
            _source_summary(*item, config) for item in zip(config.train, train_files, train_streams, strict=True)
        ],
    }
    return Data(loader, Validation(held_out_streams, layout), summary)


def split(sources: list[list[TokenFile]], fraction: float) -> tuple[list[Selection], list[Selection]]:
    """Training and validation parts of the documents, for each source.

    A document is held out when its hash falls into the lowest `fraction` of the range: the choice depends on nothing
    but its content, so it stays as data is added, and equal documents stay together. Where no hash is that low, the
    lowest is taken; a single document is cut, and its end held out.

    Raises:
        ValueError: nothing would be left to train on.
    """
    files = [file for source in sources for file in source]
    hashes = np.concatenate([file.hashes for file in files])
    if len(hashes) == 1:
        return _cut_in_two(next(file for file in files if file.num_documents), sources, fraction)
    limit = max(int(fraction * 2**64), int(hashes.min()) + 1)
    if int(hashes.max()) < limit:
        raise ValueError("no validation documents can be split off, all documents are equal; give data.validation")

    def part(held_out: bool) -> list[Selection]:
        return [
            [(file, whole(file, np.flatnonzero((file.hashes < limit) == held_out))) for file in source]
            for source in sources
        ]

    return part(False), part(True)


def _cut_in_two(
    only: TokenFile, sources: list[list[TokenFile]], fraction: float
) -> tuple[list[Selection], list[Selection]]:
    length = int(only.lengths[0])
    at = int(length * (1 - fraction))
    document, nothing = np.zeros(1, np.int64), np.zeros(0, np.int64)

    def part(start: int, count: int) -> list[Selection]:
        piece = Pieces(document, document + start, document + count)
        return [[(file, piece if file is only else Pieces(*[nothing] * 3)) for file in source] for source in sources]

    return part(0, at), part(at, length - at)


def _everything(files: list[TokenFile]) -> Selection:
    return [(file, whole(file, np.arange(file.num_documents))) for file in files]


def _streams(sources: list[Source], selections: list[Selection], config: DataConfig, use: str) -> list[Stream]:
    """A stream for each source that has rows.

    Raises:
        ValueError: a training source has none, or no validation source has any.
    """
    streams = []
    for source, selection in zip(sources, selections, strict=True):
        plans = [plan_rows(file, pieces, config.seq_len, config.packing) for file, pieces in selection]
        stream = Stream(plans, source.weight)
        if stream.num_rows:
            streams.append(stream)
        elif use == "training":
            raise ValueError(f"data source {source.path}: no {use} document has a token that carries loss")
    if not streams:
        raise ValueError(
            f"no {use} document has a token that carries loss; raise data.validation_fraction, give data.validation or "
            "add data"
        )
    return streams


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding carries no loss and is not attended to, so that any id will do where the tokenizer names none."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def _identity(config: DataConfig, files: list[list[TokenFile]], seed: int) -> str:
    """Changes with anything that changes the sequence of training rows."""
    facts = [
        [[file.identity for file in source] for source in files],
        [source.weight for source in config.train],
        config.model_dump(include={"seq_len", "packing", "loss_on", "validation_fraction"}),
        config.validation is None,
        seed,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _counts(streams: list[Stream], seq_len: int) -> dict[str, Any]:
    plans: list[RowPlan] = [plan for stream in streams for plan in stream.plans]
    rows = sum(plan.num_rows for plan in plans)
    tokens = sum(plan.num_tokens for plan in plans)
    return {
        "documents": sum(len(np.unique(plan.pieces.document)) for plan in plans),
        "tokens": tokens,
        "label_tokens": sum(plan.num_label_tokens for plan in plans),
        "left_out_tokens": sum(plan.num_left_out for plan in plans),
        "rows": rows,
        "max_documents_in_row": max(plan.max_documents for plan in plans),
        "packing_efficiency": tokens / (rows * seq_len),
    }


def _source_summary(source: Source, files: list[TokenFile], stream: Stream, config: DataConfig) -> dict[str, Any]:
    weights = sum(other.weight for other in config.train)
    return {
        "path": source.path,
        "share": source.weight / weights,
        "records": sum(file.header["records"] for file in files),
        "skipped_lines": sum(file.header["skipped_lines"] for file in files),
        "first_skipped": next((file.header["first_skipped"] for file in files if file.header["first_skipped"]), ""),
        **_counts([stream], config.seq_len),
    }
