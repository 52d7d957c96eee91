"""The model of a plan: from a run's configuration, a directory, a hub id or a published shape; never its weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moetrain.auto import AutoModelForCausalLM
from moetrain.bench.shapes import LARGE, SHAPES
from moetrain.config import ModelConfig
from moetrain.create import load_model_config, new_config
from moetrain.prepare import DTYPES

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""ORGANISATION/NAME; no MoE model has a name alone there."""


def find_config(model: ModelConfig) -> PreTrainedConfig:
    """The Transformers configuration that `model.path` or `model.create` names; of a hub id, `config.json` is fetched.

    Raises:
        ValueError: there is none; the message lists the shapes that are known by name.
    """
    path = Path(model.path).expanduser()
    if model.create is not None and not (path / "config.json").is_file():
        return new_config(model.create, vocab_size=model.create.vocab_size)
    if shape := (SHAPES | LARGE).get(model.path):
        config: PreTrainedConfig = AutoConfig.for_model(**shape)
        return config
    try:
        if not path.exists() and not _HUB_ID.fullmatch(model.path):  # the hub would be asked for half a minute
            close = difflib.get_close_matches(model.path, SHAPES | LARGE, n=1)
            raise ValueError(f"{model.path}: no such directory" + "".join(f"; did you mean {name}?" for name in close))
        return load_model_config(path, model)
    except ValueError as error:
        names = ", ".join(sorted(SHAPES | LARGE))
        raise ValueError(f"{error}\nA plan needs a config.json alone. Known without one: {names}") from error


def meta_builder(config: PreTrainedConfig, model: ModelConfig) -> Callable[[], PreTrainedModel]:
    """Makes the model on the meta device, each time anew, through the class that training uses.

    Flash attention needs its package to be made; `sdpa` keeps the same for the backward.
    """
    attention = model.attn_implementation
    kwargs: dict[str, Any] = {"dtype": DTYPES[model.dtype], "trust_remote_code": model.trust_remote_code}
    if attention is not None:
        kwargs["attn_implementation"] = "sdpa" if "flash" in attention else attention
    if model.experts != "auto":
        kwargs["experts_implementation"] = model.experts

    def build() -> PreTrainedModel:
        with torch.device("meta"):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(config, **kwargs)
        return made

    return build
