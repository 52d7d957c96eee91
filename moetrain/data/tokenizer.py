"""Training a small tokenizer, for models that start from random weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
SAMPLE_CHARACTERS = 8_000_000  # more text changes the merges of a few thousand tokens little, and costs time
_PIECE = 50_000  # characters


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: Path) -> PreTrainedTokenizerFast:
    """Train byte-level BPE and save it to `out_dir` in Hugging Face form. It encodes and decodes any text exactly.

    The same texts give the same tokenizer. Of long input a sample is used: every n-th piece, spread over all of it.

    Args:
        vocab_size: entries, the 256 bytes and 2 special tokens included; fewer where the text has not enough pairs.

    Raises:
        ValueError: `vocab_size` cannot hold the bytes, or there is no text.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and 2 special tokens need 258")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = _sample(texts)
    if not sample:
        raise ValueError("no text to train a tokenizer on")
    tokenizer.train_from_iterator(sample, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    fast.save_pretrained(out_dir)
    return fast


def _sample(texts: Iterable[str]) -> list[str]:
    """Evenly spread pieces of all texts, at most `SAMPLE_CHARACTERS` and about half of it at least."""
    kept: list[str] = []
    stride, total = 1, 0
    for number, piece in enumerate(_pieces(texts)):
        if number % stride:
            continue
        kept.append(piece)
        total += len(piece)
        while total > SAMPLE_CHARACTERS and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            total = sum(map(len, kept))
    return kept


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _PIECE):
            yield text[start : start + _PIECE]
