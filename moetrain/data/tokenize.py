"""Sources -> token files: encode every document once, ahead of training or at its start."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from moetrain.config import DataConfig, Source
from moetrain.data.encode import Encoder, Form
from moetrain.data.sources import STDLIB, BadLines, InputFile, find_files, read_records, total_bytes
from moetrain.data.tokens import VERSION, TokenFile, TokenWriter

logger = logging.getLogger(__name__)

_PARALLEL_ABOVE = 32 << 20  # bytes of chats; below, starting processes takes longer than the work
_BAR_STEP = 256 << 10  # bytes
_VERIFY_BELOW = 1 << 30  # bytes; larger token files are checked by size and index alone


def apply_chat_template_file(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer the chat template of `data.chat_template`, in place, so that it is saved with the model."""
    if config.chat_template is None:
        return
    path = Path(config.chat_template).expanduser()
    if not path.is_file():
        raise ValueError(f"data.chat_template: no such file: {path}")
    tokenizer.chat_template = path.read_text(encoding="utf-8")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Raise ValueError when the tokenizer has ids without an embedding in the model of a Transformers configuration."""
    vocab_size = config.get_text_config().vocab_size
    if num_ids(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {num_ids(tokenizer) - 1}, the model has {vocab_size} embeddings: this is not "
            "the model's tokenizer. Use the one saved beside the model"
        )


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id; not the number of entries, as there may be gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def training_texts(config: DataConfig) -> Iterator[str]:
    """The text of all training documents, of chats the contents of their messages; what a new tokenizer learns from.

    Raises:
        ValueError: before the first text, where one of the sources is tokenised already.
    """
    bad = BadLines(config.on_bad_line)
    files = [(source, file) for source in config.train for file in find_files(source)]
    for _, file in files:
        if file.format == "tokens":
            raise ValueError(f"data source {file.path} is tokenised already; a new tokenizer needs the text")
    for source, file in files:
        for record in read_records(file, source, bad):
            yield record.text if record.text is not None else _chat_text(record.messages)


def _chat_text(messages: Any) -> str:
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return "\n".join(content for content in contents if isinstance(content, str))


def open_source(
    source: Source,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    first: bool = True,
    progress: bool = False,
) -> list[TokenFile]:
    """The token files of a source; what is not tokenised yet is written to `cache_dir`.

    Any number of processes may call this at once: the first to come tokenises, under a file lock that ends with its
    process, and the others wait. `first=False` leaves the lead to the process that shows the progress bar.

    Raises:
        ValueError: no documents, or token files made with another tokenizer.
    """
    files = find_files(source)
    if any(file.format == "tokens" for file in files):
        return [_open_tokens(file, config, tokenizer) for file in files]
    path = cache_dir / f"{_slug(source)}-{_cache_key(source, config, files, tokenizer)}.tokens"
    if not first and not path.exists():
        time.sleep(1.0)
    with _lock(path.with_suffix(".lock")) as held:
        if not path.exists():
            for wreck in path.parent.glob(f".{path.name}.*.partial") if held else ():  # of a process that was killed
                wreck.unlink()
            tokenize_to_file(source, config, tokenizer, path, progress=progress)
    file = TokenFile(path)
    if first:
        _warn_of_skipped(source, file)
    return [file]


def open_beginning(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, directory: Path, max_tokens: int
) -> list[TokenFile]:
    """As `open_source`, but of what is not tokenised yet only the documents up to that with the token `max_tokens`, in
    a file in `directory`."""
    if any(file.format == "tokens" for file in find_files(source)):
        return open_source(source, config, tokenizer, directory)
    path = directory / f"beginning-{_slug(source)}.tokens"
    return [tokenize_to_file(source, config, tokenizer, path, max_tokens=max_tokens)]


def tokenize_config(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, out_dir: Path, *, progress: bool = True
) -> list[tuple[Source, Path]]:
    """Tokenise every source of a configuration to a file in `out_dir`, for use as a source of format `tokens`.

    Uses all cores; see `workers` of `tokenize_to_file` for what that asks of the calling script.
    """
    apply_chat_template_file(config, tokenizer)
    parts = {"train": config.train, "validation": config.validation or []}
    written = []
    for part, sources in parts.items():
        for number, source in enumerate(sources):
            path = out_dir / f"{part}-{number}-{_slug(source)}.tokens"
            workers = os.cpu_count() or 1
            file = tokenize_to_file(source, config, tokenizer, path, progress=progress, workers=workers)
            _warn_of_skipped(source, file)
            written.append((source, path))
    return written


def tokenize_to_file(
    source: Source,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    progress: bool = False,
    workers: int = 1,
    max_tokens: int | None = None,
) -> TokenFile:
    """Encode the documents of a source into one token file at `path`, which appears when it is complete.

    Args:
        workers: processes that render and encode chats, where there are enough of them to pay. The calling script
            must then be importable (its work under `if __name__ == "__main__":`). Texts use all cores in any case.
        max_tokens: stop after the document that reaches this number.

    Raises:
        ValueError: a bad line under `on_bad_line=fail`, no documents, or a `loss_on` that the source cannot serve.
    """
    files = find_files(source)
    bad = BadLines(config.on_bad_line)
    records = chain.from_iterable(read_records(file, source, bad) for file in files)
    head = next(records, None)
    if head is None:
        raise ValueError(_nothing(source, files, bad))
    if config.loss_on == "assistant" and head.messages is None:
        raise ValueError(f"data.loss_on=assistant needs chats, but {head.origin} is text; use auto or all")
    form = Form(masked=head.messages is not None and config.loss_on != "all", all_tokens=config.loss_on == "all")
    workers = workers if head.messages is not None and total_bytes(files) > _PARALLEL_ABOVE else 1
    with (
        TokenWriter(path, vocab_size=num_ids(tokenizer), masked=form.masked) as writer,
        Encoder(tokenizer, form, bad, workers=workers, max_tokens=max_tokens) as encoder,
        _progress_bar(source, files, writer, progress) as advance,
    ):
        num_records = 0
        for size, documents in encoder.encode(chain([head], records)):
            for number, (ids, loss) in enumerate(documents):
                writer.add(ids, loss, part=number > 0)
            num_records += 1
            advance(size)
            if max_tokens is not None and writer.num_tokens >= max_tokens:
                break
        if writer.num_documents == 0:
            raise ValueError(_nothing(source, files, bad))
        writer.commit(
            {
                "source": source.path[-300:],
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "records": num_records,
                "skipped_lines": bad.count,
                "first_skipped": (bad.first or "")[:300],
            }
        )
    return TokenFile(path)


@contextmanager
def _progress_bar(
    source: Source, files: list[InputFile], writer: TokenWriter, visible: bool
) -> Iterator[Callable[[float], None]]:
    """A bar over the bytes of input; yields the function that moves it on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    total = total_bytes(files)
    shown = done = 0.0
    with Progress(*columns, disable=not visible) as bar:
        task = bar.add_task(f"tokenising {source.path}", total=total, documents=0, tokens=0)

        def show(completed: float) -> None:
            bar.update(task, completed=completed, documents=writer.num_documents, tokens=writer.num_tokens)

        def advance(size: float) -> None:
            nonlocal shown, done
            done += size
            if done - shown >= _BAR_STEP:
                shown = done
                show(done)

        yield advance
        show(total)


def _warn_of_skipped(source: Source, file: TokenFile) -> None:
    if count := file.header["skipped_lines"]:
        logger.warning("%s: bad lines skipped: %d, the first: %s", source.path, count, file.header["first_skipped"])


def _nothing(source: Source, files: list[InputFile], bad: BadLines) -> str:
    skipped = f"; {bad.count} lines were skipped, the first: {bad.first}" if bad.count else ""
    return f"data source {source.path}: no documents in {len(files)} file(s){skipped}"


def _open_tokens(file: InputFile, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> TokenFile:
    if file.format != "tokens":
        raise ValueError(f"data source {file.path}: token files and other files are mixed; make two sources")
    tokens = TokenFile(file.path, all_tokens=config.loss_on == "all")
    if config.loss_on == "assistant" and not tokens.masked:
        raise ValueError(f"data.loss_on=assistant needs chats, but {file.path} holds text; use auto or all")
    if tokens.header["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{file.path} was made with another tokenizer than the model's; tokenise the data again")
    if file.path.stat().st_size < _VERIFY_BELOW:
        tokens.verify()
    return tokens


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with anything that changes the ids of a text; the chat template is not part of it."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        del state["truncation"], state["padding"]
    else:
        state = tokenizer.get_vocab()
    text = json.dumps([state, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cache_key(source: Source, config: DataConfig, files: list[InputFile], tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with the format, the tokenizer, the options that shape tokens, and name, size or time of any file."""
    parts = [
        (file.path, part)
        for file in files
        for part in (sorted(file.path.rglob("*")) if file.path.is_dir() else [file.path])
    ]
    facts = [
        VERSION,
        tokenizer_fingerprint(tokenizer),
        tokenizer.chat_template,
        source.model_dump(exclude={"weight"}),
        config.loss_on,
        config.on_bad_line,
        [(str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) for _, part in parts],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _slug(source: Source) -> str:
    name = "stdlib" if source.path == STDLIB else Path(source.path).name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40] or "data"


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold an advisory file lock; the system releases it when the process ends, however it ends.

    On file systems without locks it yields False: every process then does the work, and the last file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            yield False
        else:
            yield True
