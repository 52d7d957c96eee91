"""The checkpoint that a run starts from: found, fetched from the hub, or made with random weights; and checked."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig

from moetrain import families, mesh
from moetrain.checkpoint.manifest import hash_file, write_manifest
from moetrain.config import CreateConfig, ModelConfig, ParallelConfig
from moetrain.data.tokenizer import train_tokenizer
from moetrain.parallelize import check_experts_divide

_FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
_NOT_FETCHED = ["original/*", "metal/*", "onnx/*", "consolidated*"]
"""The same weights in other forms, which some repositories keep beside Transformers' own."""
_ADAPTER = "adapter_config.json"


def find_checkpoint(path: str) -> Path:
    """The directory that `model.path` names; a hub id is fetched into the hub's cache, or taken from there.

    Raises:
        ValueError: there is neither, or it holds an adapter.
    """
    directory = Path(path).expanduser()
    if not directory.exists():
        directory = _fetch(path)
    if not directory.is_dir():
        raise ValueError(f"model.path={path} is a file; name the checkpoint's directory")
    if (directory / _ADAPTER).is_file():
        raise ValueError(
            f"model.path={path} holds an adapter ({_ADAPTER}); merge it into its base model first, with "
            "PeftModel.from_pretrained(...).merge_and_unload(), and name the directory of the result"
        )
    return directory


def load_model_config(directory: Path, model: ModelConfig) -> PreTrainedConfig:
    """The Transformers configuration of a checkpoint. Raises ValueError when it is missing or damaged, has a value of
    the wrong type, or needs code of its own that is not trusted."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    except (StrictDataclassError, OSError, ValueError) as error:
        raise ValueError(f"{directory / 'config.json'}: {_one_line(error)}") from error
    return config


def meta_model(config: PreTrainedConfig, model: ModelConfig) -> PreTrainedModel:
    """The model on the meta device: its structure, without memory for its weights."""
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    return made


def load_tokenizer(directory: Path, model: ModelConfig) -> Any:
    """The tokenizer of a checkpoint. Raises ValueError when it has none or a damaged one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # what Transformers and tokenizers raise for a damaged file is of any type
        raise ValueError(f"the tokenizer of {directory} cannot be read: {_one_line(error)}") from error
    # without its files, Transformers makes some tokenizers with an empty vocabulary
    if not any((directory / name).is_file() for name in {"tokenizer.json", *tokenizer.vocab_files_names.values()}):
        raise ValueError(f"{directory} holds no tokenizer; copy the model's own there, such as tokenizer.json")
    return tokenizer


def check_layout(model: PreTrainedModel, world: int, parallel: ParallelConfig) -> DistributedConfig:
    """The layout of a world, if the model's experts can be shared out in it.

    Args:
        model: its structure alone is looked at; it may be on the meta device.

    Raises:
        ValueError: a size that does not divide ranks or experts, or a family that cannot be expert-parallel.
    """
    layout = mesh.layout(world, parallel.ep_size, parallel.dp_replicate_size)
    if parallel.ep_size > 1 and families.fallback_reason(model) is None:
        families.check_supported(model.config)
        check_experts_divide(model, layout)
    return layout


def check_loaded(directory: Path, loading: Mapping[str, Any]) -> None:
    """Raise ValueError where the weights are not those of the configuration beside them.

    Args:
        loading: what `from_pretrained` returns with `output_loading_info`.
    """
    wrong = {
        name: f"{name} has shape {list(there)}, not {list(here)}" for name, there, here in loading["mismatched_keys"]
    }
    wrong |= {name: f"{name} is missing" for name in loading["missing_keys"]}
    if wrong:
        first = ", ".join(wrong[name] for name in sorted(wrong)[:3])
        raise ValueError(
            f"the weights in {directory} do not fit its config.json, {len(wrong)} tensor(s): {first}. Copy config.json "
            "and weights from the same place"
        )


def new_config(create: CreateConfig, **defaults: Any) -> PreTrainedConfig:
    """The Transformers configuration of `model.create`.

    Raises:
        ValueError: no known `model_type`, a value of the wrong type, or a key that is nearly one of the family's.
    """
    raw = defaults | create.config
    model_type = raw.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if model_type and near else ", such as qwen3_moe"
        raise ValueError(f"model.create.config needs a model_type that Transformers knows, not {model_type!r}{hint}")
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)}
    known |= config_class.attribute_map.keys() | set(config_class.attribute_map.values())
    for key in raw.keys() - known:  # Transformers takes any key, older names of some too, and ignores the rest
        if near := difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            raise ValueError(f"model.create.config.{key}: {model_type} has no such key; did you mean {near[0]!r}?")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **raw)
    except StrictDataclassError as error:
        raise ValueError(f"model.create.config: {_one_line(error)}") from error
    return config


def create_checkpoint(path: Path, config: CreateConfig, texts: Iterable[str], seed: int) -> None:
    """Train a byte-level BPE tokenizer on `texts`, draw random weights and write both to `path`, which appears whole
    or not at all. Does nothing where `path` already holds a checkpoint.

    Raises:
        ValueError: `path` holds something else, or the configuration is wrong.
        OSError: the disk is full or not writable.
    """
    if (path / "config.json").is_file():
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"model.path={path} exists but holds no checkpoint; name another path or empty it")
    new_config(config)  # mistakes show before the tokenizer takes its time

    with _building(path) as building:
        train_tokenizer(texts, config.vocab_size, building)
        tokenizer = AutoTokenizer.from_pretrained(building)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model_config = new_config(config, **special, vocab_size=len(tokenizer))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).save_pretrained(building)
        write_manifest(building, {file.name: hash_file(file) for file in building.iterdir()})


@contextmanager
def _building(path: Path) -> Iterator[Path]:
    """A directory to fill, which is called `path` at the end. When the body raises, it is deleted, so that a full disk
    is not left full."""
    building = path.with_name(path.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        yield building
        building.rename(path)
    except Exception as error:
        shutil.rmtree(building, ignore_errors=True)
        if code := _full_disk(error):
            raise OSError(code, f"cannot write to {path.parent}: {os.strerror(code)}") from error
        raise


def _full_disk(error: Exception) -> int:
    """The errno of an error that says that the disk takes no more, or 0; tokenizers and safetensors have types of their
    own for what the system says, and its number in the text."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    return code if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else 0


def _fetch(path: str) -> Path:
    missing = f"model.path={path}: no such directory (looked from {Path.cwd()})"
    try:
        return Path(snapshot_download(path, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED))
    except HFValidationError:
        raise ValueError(missing) from None
    except OSError as error:  # the hub's errors are of this type
        raise ValueError(f"{missing}, and the hub does not give it: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError | TypeError) else text
