"""The order in which a model becomes parallel, in one place.

on the meta device   experts -> sharding          (`parallelize`, before any weight is read)
with weights         checkpointing                (`checkpoint_activations`)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from moetrain import families
from moetrain.backends import peft
from moetrain.fsdp import adapt_groups, keep_gathered, reshard
from moetrain.mesh import check_ep_divides
from moetrain.moe.router import has_random_gate
from moetrain.tape import KEEPS, keep_received

logger = logging.getLogger(__name__)


def parallelize(
    model: PreTrainedModel,
    config: DistributedConfig,
    apply: Callable[[PreTrainedModel], PreTrainedModel],
) -> PreTrainedModel:
    """Shard a model that is on the meta device: experts over `ep`, then everything over `fsdp`.

    Args:
        apply: Transformers' own application of a config with complete plans (`maybe_distribute_model`).

    Raises:
        ValueError: `ep_size` does not divide the experts, or the family cannot be expert-parallel.
    """
    if config.ep_size > 1:
        check_experts_divide(model, config)
        model._ep_plan = families.ep_plan(model)
    if config.dp_size > 1:
        model._fsdp_plan = families.fsdp_plan(model)
    model = apply(model)
    if config.dp_size > 1:
        adapt_groups(model)
        keep_gathered(model)
        peft.teach_dtensors()
        # without a backward nothing frees what the last forward gathered, and an optimizer made then would take it
        model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else reshard(model))
    return model


def check_experts_divide(model: PreTrainedModel, config: DistributedConfig) -> None:
    """Raises ValueError, listing the valid sizes, where `ep_size` ranks cannot share a layer's experts evenly."""
    experts: Any
    for _, experts in families.experts_modules(model):
        check_ep_divides(experts.num_experts, config.ep_size, config.fsdp_size)


def without_expert_parallelism(config: DistributedConfig) -> DistributedConfig:
    """The same ranks, all of them for FSDP."""
    return DistributedConfig.from_dict(config.to_dict() | {"ep_size": 1, "enable_expert_parallel": False})


def checkpoint_activations(model: PreTrainedModel, mode: str, layers: int | None = None) -> None:
    """Recompute decoder layers in the backward.

    Args:
        mode: `none`; `full`; or `selective`, which keeps what is dear to compute again and small to keep
            (`moetrain.tape`).
        layers: how many, the first ones; None: all.

    Raises:
        ValueError: an unknown mode, a model that does not support it, or more layers than it has.
    """
    if mode == "none":
        return
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(model).__name__} does not support activation checkpointing; set model.activation_checkpointing=none"
        )
    # without dropout a recomputation draws nothing, and reading the generator's state would wait for the host
    kwargs: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws_random_numbers(model)}
    if mode == "selective":
        kwargs["context_fn"] = keep_received
        for module in model.modules():
            module.__dict__[KEEPS] = True
    elif mode != "full":
        raise ValueError(f"unknown activation checkpointing {mode!r}; valid: none, full, selective")
    model.activation_checkpointing_enable(kwargs)
    if layers is None:
        return
    decoder = families.outermost_layers(model.get_decoder())
    if layers > len(decoder):
        raise ValueError(f"model.checkpointed_layers={layers}, but the model has {len(decoder)} layers")
    for layer in decoder[layers:]:
        for module in layer.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = False


def draws_random_numbers(model: PreTrainedModel) -> bool:
    """Whether a forward in training mode draws from a generator: dropout, or a random gate."""
    modules = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())
    config = model.config.get_text_config().to_dict()
    rates = [value for name, value in config.items() if ("dropout" in name or "jitter" in name) and value]
    return modules or any(isinstance(rate, float) and rate > 0 for rate in rates) or has_random_gate(model)
