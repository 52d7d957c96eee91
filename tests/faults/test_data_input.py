"""Wrong or damaged data ends in one message that names the file and the way out."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoConfig

from moetrain.config import DataConfig, Source
from moetrain.data import check_vocabulary, tokenize, tokenize_to_file
from moetrain.data.tokens import HEADER_BYTES, TokenFile, TokenWriter
from tests.data_helpers import data, make_tokenizer, write_jsonl

ROWS = [{"text": f"the quick brown fox number {i}"} for i in range(50)]


def config(*paths: Any, **options: Any) -> dict[str, Any]:
    return {"train": [{"path": str(path)} for path in paths], "seq_len": 32, **options}


def fails(message: str, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        data(*args, **options)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("x")
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    fails("no such file or directory: .*missing.jsonl", config(tmp_path / "missing.jsonl"), tmp_path)
    fails("no file matches .*[*].txt", config(tmp_path / "*.txt"), tmp_path)
    fails(r"'.xyz' gives no format; set `format`", config(tmp_path / "a.xyz"), tmp_path)
    fails("turn a JSON array into JSONL with", config(tmp_path / "a.json"), tmp_path)
    fails("no files at all", config(tmp_path / "empty"), tmp_path)


def test_a_dataset_without_a_train_split(tmp_path: Path) -> None:
    datasets.DatasetDict({"part": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    fails("splits part and none named 'train'; name one, such as .*d/part", config(tmp_path / "d"), tmp_path)


def test_empty_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    write_jsonl(tmp_path / "b.jsonl", [{"body": "x"}] * 3)
    (tmp_path / "c.txt").write_text("\n\n")
    fails("a.jsonl: no documents in 1 file", config(tmp_path / "a.jsonl"), tmp_path)
    fails("c.txt: no documents in 1 file", config(tmp_path / "c.txt"), tmp_path)
    skipped = "b.jsonl: no documents .* 3 lines were skipped, the first: .*b.jsonl:1: no field 'text'"
    fails(skipped, config(tmp_path / "b.jsonl", on_bad_line="skip"), tmp_path)


def test_skipped_lines_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    path.write_text(path.read_text() + "{broken\n{broken\n")
    fails("a.jsonl:51: malformed JSON", config(path), tmp_path)
    assert not list((tmp_path / "cache").glob("*.tokens")) and not list((tmp_path / "cache").glob(".*.partial"))
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        summary = data(config(path, on_bad_line="skip"), tmp_path).summary
        assert summary["skipped_lines"] == 2
        assert "a.jsonl:51: malformed JSON" in summary["sources"][0]["first_skipped"]
        assert "bad lines skipped: 2, the first: " in caplog.text
    json.dumps(summary)


def test_chat_lines_that_the_template_refuses_are_skipped_too(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    template += "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [*chat, {"role": "user", "content": str(i)}, chat[1]]} for i in range(30)]
    rows[7]["messages"].insert(2, {"role": "tool", "content": "c"})
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    fails(
        "a.jsonl:8: the chat template refuses message 2 with the role 'tool': no tools",
        config(path),
        tmp_path,
        chat_template=template,
    )
    (tmp_path / "t.jinja").write_text(template)
    options = {"on_bad_line": "skip", "chat_template": str(tmp_path / "t.jinja")}
    assert data(config(path, **options), tmp_path).summary["skipped_lines"] == 1
    fails("no chat template; set data.chat_template", config(path), tmp_path)
    fails("data.chat_template: no such file", config(path, chat_template="nowhere.jinja"), tmp_path)


def test_text_cannot_have_loss_on_the_assistant(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    fails("loss_on=assistant needs chats, but .*a.jsonl:1 is text", config(path, loss_on="assistant"), tmp_path)


def test_texts_and_chats_in_one_source(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"messages": chat}])
    fails("a.jsonl:51 is a chat in a source that began with text; make two sources", config(path), tmp_path)


def test_nothing_to_validate_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "same.jsonl", [{"text": "the fox"}] * 5)
    fails("all documents are equal; give data.validation", config(tmp_path / "same.jsonl"), tmp_path)


def test_damaged_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    fails("a.parquet is not a complete parquet file", config(tmp_path / "a.parquet"), tmp_path)
    (tmp_path / "a.arrow").write_bytes(b"no arrow at all")
    fails("a.arrow is not a complete arrow file", config(tmp_path / "a.arrow"), tmp_path)


def make_tokens(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    source = Source(path=str(tmp_path / "a.jsonl"))
    tokenize_to_file(source, DataConfig(train=[source]), make_tokenizer(), tmp_path / "a.tokens")
    return tmp_path / "a.tokens"


def test_damaged_token_files(tmp_path: Path) -> None:
    path = make_tokens(tmp_path)
    good = path.read_bytes()
    data(config(path), tmp_path)
    for cut in (0, 4, 100, HEADER_BYTES, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        fails("a.tokens is (not a token file|truncated or damaged)", config(path), tmp_path)
    rng = np.random.default_rng(0)
    for place in [8, 20, HEADER_BYTES, *rng.integers(HEADER_BYTES, len(good) - 1, 20).tolist(), len(good) - 1]:
        flipped = bytearray(good)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        fails("a.tokens is (truncated or )?damaged", config(path), tmp_path)
    path.write_bytes(b"PK\x03\x04" + good[4:])
    fails("not a token file; make one with `moetrain data tokenize`", config(path), tmp_path)


def test_token_files_of_another_version_or_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tokens(tmp_path)
    fails("token files and other files are mixed", config(tmp_path), tmp_path)
    monkeypatch.setattr("moetrain.data.tokens.VERSION", 2)
    fails("format version 1, this package reads 2", config(path), tmp_path)
    monkeypatch.undo()
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["fox"])
    monkeypatch.setattr("tests.data_helpers.make_tokenizer", lambda **kwargs: tokenizer)
    fails("made with another tokenizer", config(path), tmp_path)


def test_a_model_with_a_smaller_vocabulary() -> None:
    tokenizer = make_tokenizer()
    fitting = AutoConfig.for_model("qwen3_moe", vocab_size=len(tokenizer))
    check_vocabulary(tokenizer, fitting)
    check_vocabulary(tokenizer, AutoConfig.for_model("qwen3_moe", vocab_size=50_000))
    fitting.vocab_size -= 1
    with pytest.raises(ValueError, match=f"ids up to {len(tokenizer) - 1}, the model has {len(tokenizer) - 1} embed"):
        check_vocabulary(tokenizer, fitting)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TokenWriter(tmp_path / "a.tokens", vocab_size=9, masked=False) as writer:
        writer.add(np.array([1, 2]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("documents", [600, 20_000], ids=["at the end", "amid the tokens"])
def test_a_full_disk_is_named_and_nothing_stays(tmp_path: Path, documents: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        message = f"cannot write to {tmp_path / 'cache'}: File too large"
        with (
            pytest.raises(OSError, match=message) as raised,
            TokenWriter(tmp_path / "cache" / "a.tokens", vocab_size=100, masked=False) as writer,
        ):
            for _ in range(documents):
                writer.add(np.arange(10))
            assert documents == 600, "the disk was not full"
            writer.commit({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert not list((tmp_path / "cache").iterdir())


def open_and_count(tmp_path: Path, slow: float) -> None:
    """In a process of its own: open the source, and write a line when it has to be tokenised."""
    real = tokenize.tokenize_to_file

    def counted(*args: Any, **kwargs: Any) -> TokenFile:
        with (tmp_path / "log").open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(slow)
        return real(*args, **kwargs)

    tokenize.tokenize_to_file = counted
    source = Source(path=str(tmp_path / "a.jsonl"))
    (file,) = tokenize.open_source(source, DataConfig(train=[source]), make_tokenizer(), tmp_path / "cache")
    assert file.num_documents == 50


def test_of_many_processes_one_tokenises_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "log").touch()
    context = multiprocessing.get_context("fork")
    first, *others = [
        context.Process(target=open_and_count, args=(tmp_path, slow), daemon=True) for slow in (600.0, 0.0, 0.0, 0.0)
    ]
    first.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in others:
        process.start()
    time.sleep(0.3)
    assert all(process.is_alive() for process in others), "they wait for the one that tokenises"
    first.kill()
    for process in others:
        process.join(200)
    assert [process.exitcode for process in others] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().split()) == 2, "the killed one, and one of those that waited"
