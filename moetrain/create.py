"""Make a new checkpoint with random weights, and its tokenizer, in Hugging Face format."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moetrain.config import CreateConfig
from moetrain.data.tokenizer import train_tokenizer


def create_checkpoint(path: Path, config: CreateConfig, texts: Iterable[str], seed: int) -> None:
    """Train a byte-level BPE tokenizer on `texts`, draw random weights and write both to `path`, which appears whole
    or not at all. Does nothing where `path` already holds a checkpoint.

    Raises:
        ValueError: `path` holds something else, or the configuration names no known `model_type`.
    """
    if (path / "config.json").is_file():
        return
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"model.path={path} exists but holds no checkpoint; name another path or empty it")
    raw = dict(config.config)
    model_type = raw.pop("model_type", None)
    if model_type is None:
        raise ValueError("model.create.config needs a model_type, such as qwen3_moe")

    building = path.with_name(path.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    train_tokenizer(texts, config.vocab_size, building)
    tokenizer = AutoTokenizer.from_pretrained(building)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model_config = AutoConfig.for_model(
        model_type, **(special | {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)} | raw)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).save_pretrained(building)
    building.rename(path)
