"""The one-import seam: Transformers' auto classes, with expert parallelism that is made to train.

    from moetrain import AutoModelForCausalLM, DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=8, ep_size=8))

What comes back is the real Transformers class of the family (a subclass of it with the same name). It differs in
three places: how tokens reach their experts, how the model is sharded while it loads, and how it is saved.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from huggingface_hub.serialization._base import parse_size_to_int
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.initialization import no_tie_weights
from transformers.utils.quantization_config import QuantizationMethod

from moetrain import families
from moetrain.attention import select_attention
from moetrain.backends.liger import apply_liger
from moetrain.backends.mamba import use_mamba_kernels
from moetrain.checkpoint import CheckpointInfo, Dropped, check_checkpoint, find_dropped, save_hf
from moetrain.checkpoint.export import MAX_SHARD_BYTES
from moetrain.checkpoint.sharded_reading import compare_shards, reread_concatenated
from moetrain.mesh import rank
from moetrain.moe.layer import NAME, register
from moetrain.parallelize import parallelize, without_expert_parallelism
from moetrain.sharded_init import initialize_weights

logger = logging.getLogger(__name__)
register()


class _Prepared:
    """Goes before a Transformers model class: its loading shards with our plans, its saving is sharded too."""

    dropped_weights: Dropped | None = None
    """Weights of the source checkpoint that the class does not build; `save_pretrained` writes them back."""

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, device_map: Any = None) -> Any:
        if isinstance(distributed_config, dict):
            distributed_config = DistributedConfig.from_dict(distributed_config)
        distributed_config = copy.copy(distributed_config)
        ranks = distributed_config.dp_size * distributed_config.tp_size * distributed_config.pp_size
        if ranks > 1 and not dist.is_initialized() and "RANK" not in os.environ:
            raise ValueError(
                f"distributed_config asks for {ranks} ranks, but this is a single process; start the script with "
                f"torchrun --nproc-per-node {ranks}, or leave distributed_config out"
            )
        if distributed_config.ep_implementation == "auto" and distributed_config.tp_size == 1:
            distributed_config.ep_implementation = NAME
        return super().prepare_distribute_model(distributed_config, device_map=device_map)  # type: ignore[misc]

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: DistributedConfig | None, mesh: Any) -> Any:
        if mesh is None or distributed_config is None:
            return model
        if distributed_config.ep_size > 1 and (reason := families.fallback_reason(model)):
            _say(f"{reason}: plain Transformers with FSDP2, no expert parallelism")
            distributed_config = without_expert_parallelism(distributed_config)

        def apply(model: PreTrainedModel) -> PreTrainedModel:
            return super(_Prepared, cls).maybe_distribute_model(model, distributed_config, mesh)  # type: ignore[misc]

        return parallelize(model, distributed_config, apply)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _refuse_sharded_fp8(model, load_config)
        info = _check_source(checkpoint_files)
        shards = checkpoint_files if getattr(model, "_mesh_manager", None) is not None else None
        if shards:
            compare_shards(load_config.weight_mapping)
        result = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if shards:
            reread_concatenated(model, shards, load_config.weight_mapping)
        if info is not None and (dropped := find_dropped(model, info)).tensors:
            _say(dropped.describe())
            model.dropped_weights = dropped
        return result

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Transformers' `save_pretrained`, written by all ranks, each its own part; every rank must call it.

        `state_dict`, adapters and what only Transformers knows (`push_to_hub`, `variant`, ...) go to its own method,
        which gathers a sharded model on rank 0.
        """
        assert isinstance(self, PreTrainedModel)
        if getattr(self, "_hf_peft_config_loaded", False) and getattr(self, "_mesh_manager", None) is not None:
            raise ValueError("a sharded model with `add_adapter` cannot be saved; adapt it with peft.get_peft_model")
        given = {name for name, value in kwargs.items() if value is not None and name != "is_main_process"}
        if args or given - {"max_shard_size"} or getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            return
        size = parse_size_to_int(str(kwargs["max_shard_size"])) if given else MAX_SHARD_BYTES
        save_hf(self, save_directory, extra=self.dropped_weights, max_shard_bytes=size)


class _PreparedMapping:
    """Transformers' mapping from configuration to model class, with each class prepared."""

    def __init__(self, mapping: Any) -> None:
        self._mapping = mapping
        self._classes: dict[type, type] = {}

    def __getitem__(self, config_class: type[PreTrainedConfig]) -> Any:
        found = self._mapping[config_class]
        if isinstance(found, (list, tuple)):
            return type(found)(self._prepare(model_class) for model_class in found)
        return self._prepare(found)

    def _prepare(self, model_class: type[PreTrainedModel]) -> type:
        if model_class not in self._classes:
            # the same name and module: Transformers reads both, for `architectures` and for the class's source
            namespace = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
            self._classes[model_class] = type(model_class.__name__, (_Prepared, model_class), namespace)
        return self._classes[model_class]

    def __contains__(self, config_class: object) -> bool:
        return config_class in self._mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mapping, name)


class _AutoModel:
    """What both auto classes share."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `from_pretrained`. With `distributed_config` each rank reads only the bytes of its own experts
        and shards. `experts_implementation` is ours unless given.

        Raises:
            ValueError: the layout does not fit the model, the family is known not to work, or the model needs code of
                its own and `trust_remote_code=True` was not given.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("trust_remote_code", False)
        kwargs.setdefault("use_safetensors", True)  # pickles can run code
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        finish(model, kwargs.get("experts_implementation"), kwargs.get("attn_implementation"))
        return (model, info) if wants_info else model

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, *, distributed_config: DistributedConfig | None = None, **kwargs: Any
    ) -> Any:
        """A model with random weights. With `distributed_config` it is built on the meta device and every rank fills
        only its own shards, from torch's current seed."""
        kwargs.setdefault("trust_remote_code", False)
        if distributed_config is None:
            model = super().from_config(config, **kwargs)  # type: ignore[misc]
        else:
            model = _sharded_from_config(super().from_config, config, distributed_config, **kwargs)  # type: ignore[misc]
        finish(model, kwargs.get("experts_implementation"), kwargs.get("attn_implementation"))
        return model


class AutoModelForCausalLM(_AutoModel, transformers.AutoModelForCausalLM):
    _model_mapping = _PreparedMapping(transformers.AutoModelForCausalLM._model_mapping)


class AutoModelForImageTextToText(_AutoModel, transformers.AutoModelForImageTextToText):
    _model_mapping = _PreparedMapping(transformers.AutoModelForImageTextToText._model_mapping)


def _sharded_from_config(build: Any, config: PreTrainedConfig, distributed_config: Any, **kwargs: Any) -> Any:
    # FSDP2 would find a tied weight in two of its groups; `initialize_weights` ties it, as loading does
    with torch.device("meta"), no_tie_weights():
        model = build(config, **kwargs)
    distributed_config, device_map, mesh = type(model).prepare_distribute_model(distributed_config)
    model = type(model).maybe_distribute_model(model, distributed_config, mesh)
    device_map = None if mesh is None else {"": device_map}
    model._move_missing_keys_from_meta_to_device(set(model.state_dict()), device_map, mesh, None)
    initialize_weights(model, 0 if mesh is None else rank() % distributed_config.fsdp_size)
    return model


def _refuse_sharded_fp8(model: Any, load_config: Any) -> None:
    method = getattr(getattr(load_config.hf_quantizer, "quantization_config", None), "quant_method", None)
    if method == QuantizationMethod.FP8 and getattr(model, "_mesh_manager", None) is not None:
        raise ValueError(
            "an FP8 checkpoint cannot be read into shards: its scales cover blocks of the whole weights. Dequantise it "
            "first: in one process, AutoModelForCausalLM.from_pretrained(path, dtype='bfloat16', "
            "quantization_config=FineGrainedFP8Config(dequantize=True)).save_pretrained(out)"
        )


def _check_source(files: list[str] | None) -> CheckpointInfo | None:
    """The checkpoint that the files belong to, checked; None for files that are not named in the standard way."""
    if not files:
        return None
    directory = Path(files[0]).parent
    standard = (directory / "model.safetensors").is_file() or (directory / "model.safetensors.index.json").is_file()
    return check_checkpoint(directory) if standard else None


def finish(model: Any, experts_implementation: str | None = None, attn_implementation: str | None = None) -> None:
    """What a model needs after its weights are there: our experts and attention, and corrections of its family."""
    families.check_supported(model.config)
    reason = families.fallback_reason(model)
    if reason is not None:
        _say(f"{reason}: plain Transformers" + (" with Liger's kernels" if apply_liger(model) else ""))
    elif experts_implementation is None:
        model.set_experts_implementation(NAME)
    if attn_implementation is None:
        select_attention(model)
    families.correct_after_load(model)
    if slow := use_mamba_kernels(model):
        _say(slow)


def _say(message: str) -> None:
    if rank() == 0:
        logger.warning(message)
