"""Models on the meta device as this package and others run them: what `reality.py` predicts the memory and time of."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import transformers.distributed.expert_parallel as native
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import moetrain.moe.layer as moe_layer
from moetrain.auto import AutoModelForCausalLM
from moetrain.bench.shapes import LARGE, SHAPES
from moetrain.plan import spread, standins
from moetrain.plan.memory import Unit
from moetrain.plan.standins import kernel, mamba

QWEN = "qwen3-30b-a3b"


def build_ours(model: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    return lambda: build_shape(model), nullcontext()


def build_transformers(model: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    return lambda: build_shape(model, experts_implementation="grouped_mm"), nullcontext()


def build_transformers_ep(model: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    return lambda: build_shape(model, experts_implementation="grouped_mm"), _as_native_ep()


def build_without_mamba(build: Callable[[str], Any]) -> Callable[[str], tuple[Callable[[], PreTrainedModel], Any]]:
    """The same system where mamba_ssm and causal_conv1d are not installed."""

    @contextmanager
    def both(around: Any) -> Iterator[None]:
        with around, _without_mamba_packages():
            yield

    def built(model: str) -> tuple[Callable[[], PreTrainedModel], Any]:
        made, around = build(model)
        return made, both(around)

    return built


@contextmanager
def _without_mamba_packages() -> Iterator[None]:
    kept = {name: fn for name, fn in standins._RECURRENT.items() if not name.startswith(("mamba", "causal"))}
    with (
        patch.object(standins.mamba, "use_mamba_kernels", lambda model: None),
        patch.object(standins, "_RECURRENT", kept),
    ):
        yield


def build_automodel(model: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    return lambda: _with_fused_norms(build_shape(model)), _as_automodel()


def build_automodel_with_mtp(model: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    def build() -> PreTrainedModel:
        made = build_shape(model, hybrid_override_pattern=SHAPE_OF[model]["hybrid_override_pattern"] + "*E")
        layers: Any = made.get_decoder().layers
        for layer in layers[-2:]:
            layer.forward = types.MethodType(type(layer).forward.__wrapped__, layer)  # without checkpointing
        layers.extend(layers[-2:])
        return _with_fused_norms(made)

    return build, _as_automodel()


SYSTEMS: dict[str, Callable[[str], tuple[Callable[[], PreTrainedModel], Any]]] = {
    "moetrain": build_ours,
    "transformers": build_transformers,
    "transformers ep": build_transformers_ep,
    "transformers without mamba_ssm": build_without_mamba(build_transformers),
    "transformers ep without mamba_ssm": build_without_mamba(build_transformers_ep),
    "automodel": build_automodel,
    "automodel with mtp": build_automodel_with_mtp,
}
SHAPE_OF = SHAPES | LARGE | {f"{QWEN}, {n} layers": SHAPES[QWEN] | {"num_hidden_layers": n} for n in (8, 12)}


def build_shape(model: str, experts_implementation: str | None = None, **changes: Any) -> PreTrainedModel:
    kwargs = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    config = AutoConfig.for_model(**SHAPE_OF[model] | changes)
    has_sdpa = AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa" if has_sdpa else "eager", **kwargs
        )
    return made


def _with_fused_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Norms of one kernel, which keeps its input; Transformers' keep an fp32 copy of it and the result."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(lambda norm, x: kernel([x, norm.weight], x.shape), module)
    return model


def head_apart(units: list[Unit]) -> list[Unit]:
    """The head as a unit of its own, which AutoModel makes of it; the model's own unit holds nothing else."""
    return [replace(unit, modules=("lm_head",)) if unit.name == "" else unit for unit in units]


@contextmanager
def _as_automodel() -> Iterator[None]:
    """Experts keep the activation for the down projection's gradient, which this package computes again; Mamba-2 runs
    on mamba_ssm."""
    run_experts = moe_layer.run_experts

    def run_and_keep(experts: Any, rows_RH: Tensor, offsets_e: Tensor, weights_R: Tensor, *placed: Any) -> Tensor:
        inner = experts.down_proj.shape[1 if experts.is_transposed else 2]
        kept = len(rows_RH) * inner * rows_RH.itemsize // weights_R.itemsize
        weights_R = kernel([weights_R], weights_R.shape, (kept,))
        return run_experts(experts, rows_RH, offsets_e, weights_R, *placed)

    with (
        patch.object(moe_layer, "run_experts", run_and_keep),
        patch.object(mamba, "use_mamba_kernels", lambda model: None),  # those of mamba_ssm in place of ours
    ):
        yield


@contextmanager
def _as_native_ep() -> Iterator[None]:
    """Experts get their tokens by Transformers' own all-to-all, and every rank as many rows as it sends."""

    def run(experts: Any, dispatcher: Any, tokens_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        exchange: Any = native.AllToAllEP.__new__(native.AllToAllEP)
        exchange.experts_forward = types.MethodType(type(experts).forward, experts)
        exchange.num_local_experts, exchange.tp_mesh = 1, types.SimpleNamespace(size=lambda: 1)
        exchange.ep_mesh = types.SimpleNamespace(size=lambda: dispatcher.num_experts, get_group=lambda: None)
        experts._is_expert_parallel = True
        with spread.SplitSizes([[ids_TK.numel()]] * 2):
            out: Tensor = exchange(tokens_TH, ids_TK, weights_TK)
        return out

    with (
        patch.object(spread, "moe_forward", run),
        patch.object(native, "all_to_all_single", lambda *args, **kwargs: None),
        patch.object(native, "all_to_all_single_autograd", lambda rows, *_: rows.clone()),
        patch.object(native, "_WaitTensor", types.SimpleNamespace(apply=lambda rows: rows)),
    ):
        yield
