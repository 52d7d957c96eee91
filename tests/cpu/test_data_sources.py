"""Every input format gives the same documents; unusable lines are named or counted."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moetrain.config import DataConfig, Source
from moetrain.data.sources import TEXT_BLOCK, BadLine, BadLines, Record, find_files, read_records, total_bytes
from moetrain.data.tokenize import training_texts
from tests.data_helpers import write_jsonl

TEXTS = ["the quick fox", "two\nlines\r\n", "\u00e9\u4e2d\U0001f98a \u2028 end", "x" * 500]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read(path: Path | str, policy: str = "fail", **source: str) -> tuple[list[Record], BadLines]:
    made, bad = Source(path=str(path), **source), BadLines(policy)
    return [record for file in find_files(made) for record in read_records(file, made, bad)], bad


def texts(path: Path | str, **source: str) -> list[str | None]:
    return [record.text for record in read(path, **source)[0]]


def test_all_formats_give_the_same_texts(tmp_path: Path) -> None:
    rows = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    table = pa.Table.from_pylist(rows)
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": " \n", "id": 9}])  # an empty text is no document
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "split")
    for name in ("a.jsonl", "a.parquet", "stream.arrow", "file.arrow", "one", "split", "split/train"):
        assert texts(tmp_path / name) == TEXTS, name
    renamed = table.rename_columns(["body", "id"])
    pq.write_table(renamed, tmp_path / "b.parquet")
    assert texts(tmp_path / "b.parquet", text_key="body") == TEXTS
    records, _ = read(tmp_path / "a.jsonl")
    assert records[1].origin == f"{tmp_path}/a.jsonl:2"
    assert sum(record.size for record in records) <= total_bytes(find_files(Source(path=str(tmp_path / "a.jsonl"))))


def test_chats_are_recognised_by_their_key(tmp_path: Path) -> None:
    tools = [{"type": "function"}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": tools}, {"messages": CHAT}])
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}, {"messages": CHAT}]), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "both", "conversation": CHAT}])
    records, _ = read(tmp_path / "a.jsonl")
    assert [(r.messages, r.tools) for r in records] == [(CHAT, tools), (CHAT, None)]
    assert [r.messages for r in read(tmp_path / "a.parquet")[0]] == [CHAT, CHAT]
    (record,) = read(tmp_path / "b.jsonl", format="chat", messages_key="conversation")[0]
    assert record.messages == CHAT and record.text is None


def test_directories_and_globs_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/c.py", ".git/x.py", "a/.hidden.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / "c.jsonl", [{"text": "c.jsonl"}])
    assert texts(tmp_path) == ["a/c.py", "a/z.md", "b.txt", "c.jsonl"]
    assert texts(f"{tmp_path}/**/*.py") == ["a/c.py"]
    assert texts(f"{tmp_path}/*.png", format="text") == ["picture.png"]


def test_long_text_files_become_several_documents_cut_at_line_ends(tmp_path: Path) -> None:
    line = "\u00e9" * 99 + "\n"  # 199 bytes, so that a block ends inside a line
    (tmp_path / "big.txt").write_text(line * 12_000)
    parts, _ = read(tmp_path / "big.txt")
    assert "".join(part.text or "" for part in parts) == line * 12_000
    assert len(parts) == 3 and all((part.text or "").endswith("\n") for part in parts)
    assert len((parts[0].text or "").encode()) >= TEXT_BLOCK
    assert parts[1].origin.endswith(f":{(parts[0].text or '').count(chr(10)) + 1}")


def test_the_standard_library() -> None:
    source = Source(path="python:stdlib")
    files = find_files(source)
    assert files == find_files(source) == sorted(files)
    assert not any("site-packages" in str(file.path) or "/test/" in str(file.path) for file in files)
    assert total_bytes(files) > 9_000_000
    assert sum(file.path.name == "argparse.py" for file in files) == 1


def test_bad_lines_are_named_or_counted(tmp_path: Path) -> None:
    good = json.dumps({"text": "good"})
    bad = {
        2: ('{"text": "open', "malformed JSON"),
        4: ('["text"]', "object is expected, this is a list"),
        5: ('{"body": "x"}', "no field 'text'; there is 'body'; set `text_key`"),
        6: ('{"text": 3}', "field 'text' is not text but a int"),
        7: ('{"text": "caf\\xe9"}', "malformed JSON"),
    }
    lines = [good, *(bad[n][0] if n in bad else "" if n == 3 else good for n in range(2, 9))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    records, report = read(tmp_path / "a.jsonl", policy="skip")
    assert [record.text for record in records] == ["good", "good"] and report.count == 5
    assert report.first is not None and "a.jsonl:2: malformed JSON" in report.first
    for number, (line, reason) in bad.items():
        (tmp_path / "one.jsonl").write_text("\n" * (number - 1) + line + "\n")
        with pytest.raises(BadLine) as caught:
            read(tmp_path / "one.jsonl")
        assert f"one.jsonl:{number}: " in str(caught.value) and reason in str(caught.value)
        assert "data.on_bad_line=skip" in str(caught.value)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    for name, place in (("a.jsonl", "a.jsonl:2"), ("a.txt", "a.txt:1")):
        with pytest.raises(BadLine, match=f"{place}: not UTF-8"):
            read(tmp_path / name)
    records, report = read(tmp_path, policy="skip")
    assert [record.text for record in records] == ["fine"] and report.count == 2


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert texts(tmp_path) == ["hello", "hello"]


def test_texts_for_a_new_tokenizer(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "plain"}])
    write_jsonl(tmp_path / "b.jsonl", [{"messages": [*CHAT, {"role": "assistant", "content": None}]}])
    assert list(training_texts(DataConfig(train=[Source(path=str(tmp_path))]))) == ["plain", "a\nb"]
