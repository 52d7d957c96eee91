"""The optimizer of a model."""

from __future__ import annotations

import torch
from torch import nn

from moetrain.config import OptimConfig
from moetrain.families import experts_modules
from moetrain.optim.adamw import AdamW, States


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over the trainable parameters of a model, sharded or not.

    Weight decay applies to matrices: to parameters with two or more dimensions an expert (the stacked bias [E, I] of
    experts is a vector each), embeddings left out, tied or not: decay would pull the rows of tokens that the data
    does not hold towards zero.

    Raises:
        ValueError: nothing is trainable, or `config.states` does not fit the parameters' types.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter requires a gradient; unfreeze some before building the optimizer")
    decayed = _decayed(model)
    groups = [
        {"params": [p for p in trainable if p in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p not in decayed], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        states=_resolve_states(config.states, trainable),
    )


def _resolve_states(states: str, parameters: list[nn.Parameter]) -> States:
    """`auto` by the parameters' types; the others checked against them."""
    types = {p.dtype for p in parameters}
    if unknown := types - {torch.float32, torch.bfloat16}:
        raise ValueError(f"parameters of type {unknown}; the optimizer trains torch.float32 and torch.bfloat16")
    if states == "auto":
        return "master" if torch.bfloat16 in types else "fp32"
    if states == "fp32" and torch.bfloat16 in types:
        raise ValueError(
            "optim.states=fp32 would round every update of bf16 parameters to nearest, which loses small ones; "
            "choose master, bf16_stochastic or 8bit, or model.dtype=float32"
        )
    assert states in ("fp32", "master", "bf16_stochastic", "8bit"), states
    return states  # type: ignore[return-value]


def _decayed(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that weight decay applies to."""
    decayed, embeddings = set(), set()
    experts = {module for _, module in experts_modules(model)}
    for module in model.modules():
        stacked = module in experts  # the first dimension of their parameters counts them
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                embeddings.add(parameter)
            elif parameter.ndim - stacked >= 2:
                decayed.add(parameter)
    return decayed - embeddings
