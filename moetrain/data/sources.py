"""Reading documents from files: plain text, JSONL, Parquet, Arrow, a directory of `datasets`, Python's own source."""

from __future__ import annotations

import glob
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.config import Source

STDLIB = "python:stdlib"
# fmt: off
_TEXT_ENDINGS = (
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
    ".cuh", ".rs", ".go", ".java", ".kt", ".scala", ".js", ".ts", ".tsx", ".jsx", ".css", ".sh", ".bash", ".sql", ".r",
    ".jl", ".lua", ".rb", ".php", ".pl", ".swift", ".hs", ".ml", ".yaml", ".yml", ".toml", ".ini", ".cfg",
)
# fmt: on
_ENDINGS = dict.fromkeys(_TEXT_ENDINGS, "text") | {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tokens": "tokens",
}
_DATASETS_MARKS = ("state.json", "dataset_dict.json")
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
TEXT_BLOCK = 1 << 20  # bytes; longer text files are cut into documents at the next line end
_COLUMNAR_ROWS = 256  # read at a time


class BadLine(ValueError):
    """A record that cannot be used; `str()` names file, line and reason."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")
        self.origin = origin
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadLine], tuple[str, str]]:
        return BadLine, (self.origin, self.reason)


class BadLines:
    """What to do with bad lines: raise the first one (`fail`), or count them (`skip`)."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.count = 0
        self.first: str | None = None

    def report(self, bad: BadLine) -> None:
        if self.policy == "fail":
            raise BadLine(bad.origin, f"{bad.reason} (data.on_bad_line=skip leaves such lines out)")
        self.count += 1
        self.first = self.first or str(bad)


@dataclass(frozen=True)
class Record:
    """One document as read: text, or the messages of a chat."""

    origin: str
    """File and line, for messages to the user."""
    size: float
    """Bytes of input that it took, for progress."""
    text: str | None = None
    messages: Any = None
    tools: Any = None


class InputFile(NamedTuple):
    path: Path
    format: str
    """text, jsonl, parquet, arrow, datasets or tokens"""


def find_files(source: Source) -> list[InputFile]:
    """The files of a source in the order in which they are read (sorted by path).

    Raises:
        ValueError: nothing is there, or an ending gives no format.
    """
    if source.path == STDLIB:
        return [InputFile(path, "text") for path in _library_files()]
    wanted = "jsonl" if source.format == "chat" else source.format
    files = []
    for path in _matches(source.path):
        if path.is_dir() and not _is_dataset(path):
            files += [InputFile(file, _format_of(file, wanted)) for file in _files_below(path, wanted)]
        else:
            files.append(InputFile(path, _format_of(path, wanted)))
    return files


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.exists():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not found:
        what = "no file matches" if glob.has_magic(pattern) else "no such file or directory:"
        raise ValueError(f"data source: {what} {pattern} (looked from {Path.cwd()})")
    return found


def _files_below(directory: Path, wanted: str) -> list[Path]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and not _hidden(path, directory))
    usable = [path for path in files if wanted != "auto" or path.suffix.lower() in _ENDINGS]
    if not usable:
        endings = sorted({path.suffix for path in files}) or ["no files at all"]
        raise ValueError(
            f"data source {directory}: no file with a known ending ({', '.join(endings)}); set `format` of the source "
            f"to text, jsonl, parquet, arrow, datasets, chat or tokens"
        )
    return usable


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _is_dataset(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _DATASETS_MARKS)


def _format_of(path: Path, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if _is_dataset(path):
        return "datasets"
    if found := _ENDINGS.get(path.suffix.lower()):
        return found
    hint = "; turn a JSON array into JSONL with `jq -c '.[]'`" if path.suffix.lower() == ".json" else ""
    raise ValueError(
        f"data source {path}: the ending {path.suffix!r} gives no format; set `format` of the source to text, jsonl, "
        f"parquet, arrow, datasets, chat or tokens{hint}"
    )


def _library_files() -> list[Path]:
    """Source files of the running Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(root).parts))


def read_records(file: InputFile, source: Source, bad: BadLines) -> Iterator[Record]:
    """The documents of one file; unusable ones go to `bad`. Empty texts are passed over."""
    if file.format == "text":
        return _read_text(file.path, bad)
    if file.format == "jsonl":
        return _read_jsonl(file.path, source, bad)
    return _read_columns(file, source, bad)


def _read_text(path: Path, bad: BadLines) -> Iterator[Record]:
    with path.open("rb") as stream:
        line = 1
        while block := stream.read(TEXT_BLOCK):
            block += stream.readline()
            origin = f"{path}:{line}"
            try:
                text = block.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad.report(BadLine(origin, f"not UTF-8: {error.reason} at byte {error.start} of this part"))
                text = ""
            line += block.count(b"\n")
            if text.strip():
                yield Record(origin, len(block), text=text)


def _read_jsonl(path: Path, source: Source, bad: BadLines) -> Iterator[Record]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                record = _record(_parse(line, origin), source, origin, len(line))
            except BadLine as error:
                bad.report(error)
                continue
            if record is not None:
                yield record


def _parse(line: bytes, origin: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadLine(origin, f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadLine(origin, f"malformed JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise BadLine(origin, f"a JSON object is expected, this is a {type(row).__name__}")
    return row


def _record(row: dict[str, Any], source: Source, origin: str, size: float) -> Record | None:
    """A row of any structured format -> a record; None for an empty text."""
    if source.format == "chat" or (source.text_key not in row and source.messages_key in row):
        if source.messages_key not in row:
            raise BadLine(origin, _missing("messages_key", source.messages_key, row))
        return Record(origin, size, messages=row[source.messages_key], tools=row.get(source.tools_key))
    if source.text_key not in row:
        raise BadLine(origin, _missing("text_key", source.text_key, row))
    text = row[source.text_key]
    if not isinstance(text, str):
        raise BadLine(origin, f"field {source.text_key!r} is not text but a {type(text).__name__}")
    return Record(origin, size, text=text) if text.strip() else None


def _missing(option: str, key: str, fields: Any) -> str:
    return f"no field {key!r}; there is {', '.join(map(repr, fields)) or 'none'}; set `{option}` of the source"


def _read_columns(file: InputFile, source: Source, bad: BadLines) -> Iterator[Record]:
    """Parquet, Arrow and `datasets`: rows are read in batches of Arrow."""
    import pyarrow

    try:
        names, num_rows, size, batches = _open_columns(file, source)
        keys = [key for key in (source.text_key, source.messages_key, source.tools_key) if key in names]
        if not {source.text_key, source.messages_key} & set(keys):
            raise ValueError(f"{file.path}: {_missing('text_key', source.text_key, names)}")
        number = 0
        for batch in batches(keys):
            for row in batch.to_pylist():
                number += 1
                origin = f"{file.path}, row {number}"
                try:
                    record = _record(row, source, origin, size / max(num_rows, 1))
                except BadLine as error:
                    bad.report(error)
                    continue
                if record is not None:
                    yield record
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file.path} is not a complete {file.format} file: {error}") from error


def _open_columns(file: InputFile, source: Source) -> tuple[list[str], int, int, Any]:
    """Column names, number of rows, bytes, and a function from column names to an iterator of Arrow tables."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.format == "parquet":
        parquet = pq.ParquetFile(file.path)
        return (
            parquet.schema_arrow.names,
            parquet.metadata.num_rows,
            file.path.stat().st_size,
            lambda keys: parquet.iter_batches(_COLUMNAR_ROWS, columns=keys),
        )
    if file.format == "arrow":
        mapped = pa.memory_map(str(file.path))
        table = _read_arrow(mapped)
        size = file.path.stat().st_size
        return table.column_names, table.num_rows, size, lambda keys: table.select(keys).to_batches(_COLUMNAR_ROWS)
    dataset = _load_dataset(file.path).with_format("arrow")
    return (
        dataset.column_names,
        dataset.num_rows,
        total_bytes([file]),
        lambda keys: dataset.select_columns(keys).iter(_COLUMNAR_ROWS),
    )


def _read_arrow(mapped: Any) -> Any:
    """Arrow has a stream form (written by `datasets`) and a file form (Feather)."""
    import pyarrow as pa

    if mapped.read(6) == b"ARROW1":
        return pa.ipc.open_file(mapped).read_all()
    mapped.seek(0)
    return pa.ipc.open_stream(mapped).read_all()


def _load_dataset(path: Path) -> Any:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict) and "train" not in dataset:
        raise ValueError(
            f"data source {path} has the splits {', '.join(dataset)} and none named 'train'; "
            f"name one, such as {path / next(iter(dataset))}"
        )
    return dataset["train"] if isinstance(dataset, DatasetDict) else dataset


def total_bytes(files: list[InputFile]) -> int:
    """Bytes on disk of the files, for progress."""
    return sum(
        sum(part.stat().st_size for part in file.path.rglob("*.arrow"))
        if file.path.is_dir()
        else file.path.stat().st_size
        for file in files
    )
