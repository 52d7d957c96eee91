"""The preview shows what carries loss, and a trained tokenizer is exact and the same each time."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from moetrain.config import DataConfig, Source
from moetrain.data import preview, tokenize_config, train_tokenizer
from moetrain.data import tokenizer as tokenizer_module
from tests.cpu.test_data_loader import CHATML
from tests.data_helpers import make_tokenizer, write_jsonl

GREEN, DIM = "\x1b[1;32m", "\x1b[2m"


def config_of(path: Path, seq_len: int = 32) -> DataConfig:
    return DataConfig(train=[Source(path=str(path))], seq_len=seq_len)


def show(config: DataConfig, rows: int = 1) -> str:
    out = io.StringIO()
    preview(
        config, make_tokenizer(CHATML), rows, Console(file=out, force_terminal=True, width=100, color_system="standard")
    )
    return out.getvalue()


def test_loss_bearing_tokens_are_coloured(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "[red]why?"}, {"role": "assistant", "content": "fox \U0001f98a"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}, {"messages": chat}])
    text = show(config_of(path, seq_len=128))
    assert f"{GREEN}fox \U0001f98a<|im_end|>" in text
    assert f"{DIM}<|im_start|>user" in text and "[red]why?" in text
    assert "document 0" in text and "document 1" in text and "document 2" not in text
    ids = make_tokenizer(CHATML).apply_chat_template(chat)["input_ids"]
    assert f"{2 * len(ids)} of 128 tokens used" in text
    ((_, tokens),) = tokenize_config(config_of(path), make_tokenizer(CHATML), tmp_path / "out", progress=False)
    again = show(config_of(tokens, seq_len=128))
    assert again.split("document 0")[1] == text.split("document 0")[1]


def test_only_the_beginning_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"the fox {i}"} for i in range(2000)])
    path.write_text(path.read_text() + "{broken")
    text = show(config_of(path, seq_len=32), rows=2)
    assert "row 1" in text and "row 2" not in text


def test_a_trained_tokenizer_is_exact_deterministic_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"def f{i}(x):\n    return x + {i}  # \u00e9\u4e2d\U0001f98a\n" for i in range(300)]
    made = train_tokenizer(iter(texts), 400, tmp_path / "one")
    train_tokenizer(iter(texts), 400, tmp_path / "two")
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(loaded) == len(made) == 400
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert loaded.eos_token_id != loaded.pad_token_id
    for text in (texts[0], "\x00 unseen \u0416\U0001f600\r\n\t  ", " "):
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded("    return x")["input_ids"]) <= 4
    with pytest.raises(ValueError, match="need 258"):
        train_tokenizer(texts, 257, tmp_path / "three")
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], 400, tmp_path / "three")
    monkeypatch.setattr(tokenizer_module, "SAMPLE_CHARACTERS", 3000)
    sample = tokenizer_module._sample(iter(texts))
    assert 1500 <= sum(map(len, sample)) <= 3000
    assert sample[0] == texts[0] and sample[-1] in texts[-20:], "spread over everything"
