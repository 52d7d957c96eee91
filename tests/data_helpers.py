"""What the tests of data share: a small tokenizer, chat templates, a loader in one line."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moetrain.config import DataConfig
from moetrain.data import Data, build_data

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|start_header|>", "<|end_header|>", "<s>", "</s>"]
WORDS = "the quick brown fox jumps over the lazy dog. " * 20 + "\n\nuser assistant system tool think\n\n" * 20


@cache
def _trained() -> str:
    """Byte-level BPE with merges over words and line ends, so that tokens can straddle a boundary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [WORDS],
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer.to_str()


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), eos_token="<|end|>", pad_token="<|end|>", bos_token="<s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:6] + SPECIAL[7:]})
    tokenizer.chat_template = chat_template
    return tokenizer


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def data(
    config: dict[str, Any], tmp_path: Path, *, rank: int = 0, ranks: int = 1, seed: int = 0, **tokenizer: Any
) -> Data:
    return build_data(
        DataConfig(**config),
        make_tokenizer(**tokenizer),
        dp_rank=rank,
        dp_size=ranks,
        seed=seed,
        cache_dir=tmp_path / "cache",
        progress=False,
    )
