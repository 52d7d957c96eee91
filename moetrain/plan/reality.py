"""The plan's memory held against what was measured; writes the tables of docs/plan.md.

    python -m moetrain.plan.reality [docs/plan.md]

One model of memory predicts every row; nothing is fitted to any of them. Other systems keep other things than this
package: what of that is modelled stands beside each row and in code below.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import moetrain.moe.layer as moe_layer
from moetrain.auto import AutoModelForCausalLM
from moetrain.bench.shapes import SHAPES, experts_module, layer_shape
from moetrain.config import OptimConfig
from moetrain.moe.layer import local_experts_forward
from moetrain.plan.constants import GIB, GPUS
from moetrain.plan.memory import Layout, Memory, memory_of, units_of
from moetrain.plan.standins import kernel
from moetrain.plan.shapes import LARGE
from moetrain.plan.trace import Step, trace_step

BEGIN, END = "<!-- made by `python -m moetrain.plan.reality` -->", "<!-- end of what it made -->"
OPTIM = OptimConfig(states="bf16_stochastic")
"""bf16 averages: 6 bytes for a parameter and its states, as torch's Adam on bf16 parameters has them."""


@dataclass(frozen=True)
class Row:
    """A measured peak, and what the plan says about the same run."""

    run: str
    source: str
    measured_gib: float
    model: str
    layout: Layout
    step: Step
    keep: str = "auto"
    gpu: str = "h200"
    system: str = "moetrain"
    modelled: str = ""
    """What of another system is modelled, and what is not."""

    def predict(self) -> Memory:
        build, around = _SYSTEMS[self.system](self.model)
        with around:
            trace = trace_step(build, self.step)
        units = units_of(build(), OPTIM)
        return memory_of(trace, units, self.layout, gpu_bytes=GPUS[self.gpu].memory_bytes, keep=self.keep)


NODE = Layout(nodes=1, gpus_per_node=8, ep=8)
_EAGER = Step(dispatch="alltoall", kernels="torch")
_NVIDIA = (
    "norms keep their input alone, experts also the activation, dense weights stay gathered. Not modelled: DeepEP's "
    "buffers, TransformerEngine's workspaces"
)

ROWS = (
    Row(
        "Qwen3-30B-A3B, 8 H200, EP=8, batch 1, eager, `alltoall`, SDPA, layers not compiled",
        "[measured](measured.md)", 50.752, "qwen3-30b-a3b", NODE, _EAGER, keep="never",
    ),
    Row(
        "Transformers 5.17, Qwen3-30B-A3B, 8 H200, FSDP2 alone, grouped_mm, SDPA, batch 1",
        "same machine", 66.4, "qwen3-30b-a3b", NODE._replace(ep=1), Step(kernels="torch", loss="plain"), keep="never",
        system="transformers", modelled="its own experts and loss run as they are",
    ),
    Row(
        "NeMo AutoModel, Qwen3-30B-A3B, 8 H100, EP=8, batch 1",
        "NVIDIA, 24 June 2026", 48.1, "qwen3-30b-a3b", NODE, _EAGER, keep="always", gpu="h100-80gb",
        system="automodel", modelled=_NVIDIA,
    ),
    Row(
        "NeMo AutoModel 0.7, Qwen3-30B-A3B, 8 H200, EP=8, batch 4, activation checkpointing",
        "same machine", 41.4, "qwen3-30b-a3b", NODE, Step(4, checkpointing="full", dispatch="alltoall", kernels="torch"),
        keep="always", system="automodel", modelled=_NVIDIA,
    ),
    Row(
        "NeMo AutoModel, Nemotron-3-Nano-30B-A3B, 8 H100, EP=8, batch 1",
        "NVIDIA, 24 June 2026", 42.5, "nemotron-3-nano-30b-a3b", NODE, _EAGER, keep="always", gpu="h100-80gb",
        system="automodel", modelled=_NVIDIA,
    ),
    Row(
        "NeMo AutoModel, Nemotron-3-Ultra-550B-A55B, 128 H100, EP=64, batch 2, activation checkpointing",
        "NVIDIA, 24 June 2026", 58.2, "nemotron-3-ultra-550b-a55b", Layout(16, 8, 64),
        Step(2, checkpointing="full", dispatch="alltoall", kernels="torch"), keep="never", gpu="h100-80gb",
        system="automodel with mtp",
        modelled=_NVIDIA.replace("dense weights stay gathered", "dense weights are gathered twice")
        + "; its layers for two more tokens, which Transformers leaves out, are added: their weights once, their "
        "activations twice and without checkpointing",
    ),
)  # fmt: skip
"""Peaks of whole steps. Every one in docs/measured.md is here (a test looks)."""


def build_ours(model: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    return lambda: _build(model), nullcontext()


def build_transformers(model: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    return lambda: _build(model, experts_implementation="grouped_mm"), nullcontext()


def build_automodel(model: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    return lambda: _with_fused_norms(_build(model)), _experts_keep_activation()


def build_automodel_with_mtp(model: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    def build() -> PreTrainedModel:
        made = _build(model, hybrid_override_pattern=SHAPE_OF[model]["hybrid_override_pattern"] + "*E")
        layers: Any = made.get_decoder().layers
        for layer in layers[-2:]:
            layer.forward = types.MethodType(type(layer).forward.__wrapped__, layer)  # without checkpointing
        layers.extend(layers[-2:])
        return _with_fused_norms(made)

    return build, _experts_keep_activation()


_SYSTEMS: dict[str, Callable[[str], tuple[Callable[[], PreTrainedModel], Any]]] = {
    "moetrain": build_ours,
    "transformers": build_transformers,
    "automodel": build_automodel,
    "automodel with mtp": build_automodel_with_mtp,
}
SHAPE_OF = SHAPES | LARGE


def _build(model: str, experts_implementation: str | None = None, **changes: Any) -> PreTrainedModel:
    kwargs = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    config = AutoConfig.for_model(**SHAPE_OF[model] | changes)
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", **kwargs
        )
    return made


def _with_fused_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Norms of one kernel, which keeps its input; Transformers' keep an fp32 copy of it and the result."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(lambda norm, x: kernel([x, norm.weight], x.shape), module)
    return model


@contextmanager
def _experts_keep_activation() -> Iterator[None]:
    """Experts whose activation is kept for the down projection's gradient; this package computes it again."""
    run_experts = moe_layer.run_experts

    def run_and_keep(experts: Any, rows_RH: Tensor, offsets_e: Tensor, weights_R: Tensor) -> Tensor:
        inner = experts.down_proj.shape[1 if experts.is_transposed else 2]
        kept = len(rows_RH) * inner * rows_RH.itemsize // weights_R.itemsize
        weights_R = kernel([weights_R], weights_R.shape, (kept,))
        return run_experts(experts, rows_RH, offsets_e, weights_R)

    with patch.object(moe_layer, "run_experts", run_and_keep):
        yield


KEPT_MB = {"qwen3-30b-a3b": 101, "qwen3-30b-a3b-ep8": 101, "gpt-oss-20b": 189, "nemotron-3-nano-30b-a3b": 91}
"""What an expert layer of 4,096 tokens keeps for its backward on a rank that has all its experts (docs/measured.md)."""


def kept_by_experts(name: str) -> int:
    """Bytes that the experts of a `moetrain.bench` shape keep beside their inputs and weights."""
    shape = layer_shape(name)
    with torch.device("meta"):
        experts = experts_module(shape, device="meta")
        tokens = torch.empty(shape.tokens, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.empty(shape.tokens, shape.top_k, dtype=torch.int64)
        weights = torch.empty(shape.tokens, shape.top_k, requires_grad=True)
    given = {tensor.untyped_storage()._cdata for tensor in (tokens, ids, weights, *experts.parameters())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = local_experts_forward(experts, tokens, ids, weights)
    assert out.shape == tokens.shape
    return sum(kept.values())


def tables() -> str:
    """Markdown: measured and predicted."""
    lines = ["| run | from | measured GiB | predicted | off | modelled of another system |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        predicted = row.predict().allocated / GIB
        off = f"{100 * (predicted / row.measured_gib - 1):+.1f} %"
        lines.append(
            f"| {row.run} | {row.source} | {row.measured_gib:.1f} | {predicted:.1f} | {off} | {row.modelled} |"
        )
    lines += ["", "| experts, 4,096 tokens, kept for the backward | measured MB | predicted |", "|---|---|---|"]
    lines += [f"| {name} | {measured} | {kept_by_experts(name) / 1e6:.1f} |" for name, measured in KEPT_MB.items()]
    return "\n".join(lines)


def main() -> None:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/plan.md")
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    file.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
