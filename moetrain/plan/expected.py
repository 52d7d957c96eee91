"""Tokens a second that a run should reach, in a few tens of milliseconds: for dashboards, beside what it does reach.

A plan traces every operator, which takes seconds. Here products are counted on the modules of the model, and passes
over memory and kernels by rules that hold the traces of the published shapes (a test compares the two). Rates, exchange
and sharding are the plan's own (`step_time.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moetrain import mesh
from moetrain.config import RunConfig
from moetrain.families import experts_modules, top_k_of
from moetrain.plan.constants import GPUS
from moetrain.plan.exchange import CAPTURED
from moetrain.plan.layout import Layout
from moetrain.plan.memory import Parameter, Unit
from moetrain.plan.operators import SCAN_CHUNK, Work, scan_flops
from moetrain.plan.search import balance_of, dispatch_of
from moetrain.plan.shapes import meta_builder
from moetrain.plan.step_time import PHASES, time_of
from moetrain.plan.trace import ExpertLayer, Step, StepTrace

GPUS_PER_NODE = 8
STATE_BYTES = {"fp32": 8.0, "master": 12.0, "bf16_stochastic": 4.0, "8bit": 2.0}
"""Of the optimizer for one parameter, by `optim.states`."""

BLOCK_PASSES = {"forward": (4.0, 3.5), "backward": (6.0, 5.0)}
"""Numbers that the compiled kernels of an attention, recurrent or expert block read and write for a token: so often
the hidden size, and so many times the width of the projections in front of it."""
MLP_PASSES = {"forward": 1.5, "backward": 3.0}
"""The same for the width of a dense MLP's inner projections."""
EAGER_PASSES = 8.0
"""Times as many without torch.compile."""
ROW_PASSES = 4.0
"""The same of `alltoall`, times the width of a token's rows: into the order of ranks, then of experts."""
HEAD_PASSES = {"forward": (2.0, 4.0), "backward": (0.0, 2.0)}
"""The same of the head, times its logits, and times its weight."""
LAUNCHES = {True: {"forward": 9, "backward": 12}, False: {"forward": 47, "backward": 60}}
"""Kernels of a block, compiled or not."""


def expected_tokens_per_second(
    config: RunConfig, model_config: PreTrainedConfig, gpu: str, world_size: int
) -> float | None:
    """Tokens a second of one GPU over a whole step, the optimizer included, that a plan expects of a run.

    Args:
        model_config: Transformers' configuration of the model.
        gpu: a key of `moetrain.plan.constants.GPUS`, or the name that CUDA gives.
        world_size: ranks; nodes have eight GPUs.

    Returns:
        None where no plan can be made: an unknown GPU, a model of another kind, sizes that do not divide.
    """
    kind = known_gpu(gpu)
    if kind is None or world_size < 1 or (world_size > GPUS_PER_NODE and world_size % GPUS_PER_NODE):
        return None
    nodes = -(-world_size // GPUS_PER_NODE)
    parallel = config.parallel
    layout = Layout(nodes, world_size // nodes, parallel.ep_size, parallel.dp_replicate_size)
    try:
        return _expected(config, model_config, layout, kind)
    except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError):
        return None  # a dashboard goes on without it


def known_gpu(name: str) -> str | None:
    """The key of `GPUS` for a key or a name such as `NVIDIA H100 80GB HBM3`; boards in PCIe slots are slower."""
    lowered = str(name).lower()
    if lowered in GPUS:
        return lowered
    if "pcie" in lowered or "nvl" in lowered:
        return None
    return next((key for key in GPUS if key.partition("-")[0] in lowered.split()), None)


def _expected(config: RunConfig, model_config: PreTrainedConfig, layout: Layout, gpu: str) -> float:
    mesh.layout(layout.world, layout.ep, layout.replicas)
    sizes = Sizes(meta_builder(model_config, config.model)())
    dispatch = dispatch_of(config, layout)
    step = Step(
        batch=config.data.batch_size,
        seq_len=config.data.seq_len,
        checkpointing=config.model.activation_checkpointing,
        checkpointed_layers=config.model.checkpointed_layers,
        dispatch=dispatch,
        packed=config.data.packing and config.data.document_mask,
        compiled=config.train.compile != "off",
    )
    time = time_of(
        count(sizes, step),
        sizes.units(config),
        layout,
        GPUS[gpu],
        passes=config.train.grad_accum,
        keep=config.parallel.keep_gathered,
        captured=dispatch in CAPTURED and config.train.cuda_graph != "off",
        balance=balance_of(config, layout),
    )
    return time.tokens_per_second


class Sizes:
    """What is counted on the modules of a model, in one walk over them."""

    def __init__(self, model: PreTrainedModel) -> None:
        text: Any = model.config.get_text_config()
        self.hidden: int = text.hidden_size
        self.heads: int = text.num_attention_heads
        self.layers: int = text.num_hidden_layers
        self.head: Tensor = model.get_output_embeddings().weight
        self.experts: dict[str, Any] = dict(experts_modules(model))
        self.top_k = top_k_of(text) if self.experts else 0
        self.attention: list[Any] = []
        self.mamba: list[Any] = []
        self.dense = 0
        """Weights that multiply every token, without the head."""
        inner, spread, aside = (
            0,
            set(self.experts.values()),
            (model.get_output_embeddings(), model.get_input_embeddings()),
        )
        for module in model.modules():
            if hasattr(module, "is_causal") and hasattr(module, "layer_idx"):
                self.attention.append(module)
            elif hasattr(module, "ssm_state_size") and hasattr(module, "intermediate_size"):
                self.mamba.append(module)
            if module not in spread and module not in aside:
                self.dense += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2)
                if isinstance(module, nn.Linear) and module.out_features != self.hidden:
                    inner += module.out_features
        mixers = [*self.attention, *self.mamba]
        self.mixer_width = sum(map(_width, mixers))
        """Of the projections in front of attention and recurrent layers."""
        self.mlp_width = max(inner - self.mixer_width, 0)
        """Of the inner projections of dense MLPs and routers."""
        self.blocks = len(mixers) + len(self.experts)
        self.expert_weights = sum(p.numel() for module in self.experts.values() for p in module.parameters())
        self.all_weights = model.num_parameters()

    def units(self, config: RunConfig) -> list[Unit]:
        """All dense weights as one unit, and all experts as another: times add up over units."""
        states = config.optim.states
        if states == "auto":
            states = "fp32" if config.model.dtype == "float32" else "master"
        numbers = {"dense": self.all_weights - self.expert_weights, "experts": self.expert_weights}
        return [
            Unit(
                (name,),
                [Parameter(name, (number,), self.head.itemsize, STATE_BYTES[states], name == "experts")],
                in_experts=name == "experts",
            )
            for name, number in numbers.items()
            if number
        ]


def count(sizes: Sizes, step: Step) -> StepTrace:
    """What a trace would say of computation."""
    trace = StepTrace(step)
    again = step.share_recomputed(sizes.layers)
    for part, flops in _products(sizes, step):
        backward = 2.5 + again * (step.checkpointing == "full") if "attention" in part else 2.0 + again
        trace.work["forward", part].add(Work(flops))
        trace.work["backward", part].add(Work(flops * backward))
    head = 2.0 * trace.tokens * sizes.head.numel()
    trace.work["forward", "head"].add(Work(3 * head))  # the loss computes its gradients at once
    for phase in PHASES:
        of_logits, of_weight = HEAD_PASSES[phase]
        numbers = of_logits * trace.tokens * sizes.head.shape[0] + of_weight * sizes.head.numel()
        trace.work[phase, "passes"].add(Work(0.0, numbers * sizes.head.itemsize))
        trace.work[phase, "passes"].add(_passes(sizes, step, phase))
    if again:
        trace.work["backward", "passes"].add(_passes(sizes, step, "forward"))
    trace.experts = [_expert_layer(name, module, sizes, step) for name, module in sizes.experts.items()]
    return trace


def _products(sizes: Sizes, step: Step) -> Iterator[tuple[str, float]]:
    """Part and operations of products in a forward, the head's apart."""
    tokens = step.batch * step.seq_len
    yield "dense", 2.0 * tokens * sizes.dense
    for module in sizes.experts.values():
        chosen = sum(p.numel() for p in module.parameters() if p.dim() >= 3) * sizes.top_k / module.num_experts
        yield "experts", 2.0 * tokens * chosen
    for module in sizes.attention:
        yield _attention(module, sizes.heads, step)
    for module in sizes.mamba:
        yield "recurrent", float(scan_flops(tokens * module.intermediate_size, module.ssm_state_size, SCAN_CHUNK))


def _attention(module: Any, heads: int, step: Step) -> tuple[str, float]:
    """Its part, by the kernel that it runs on, and the operations of its scores and values."""
    window = min(getattr(module, "sliding_window", None) or step.seq_len, step.seq_len)
    keys = window - window**2 / (2 * step.seq_len)
    width = getattr(module, "qk_head_dim", None) or module.head_dim
    value = getattr(module, "v_head_dim", None) or module.head_dim
    cudnn = not step.packed and window == step.seq_len and (width <= 128 or (width, value) == (192, 128))
    flops = 2.0 * step.batch * step.seq_len * heads * (width + value) * keys
    return ("cudnn attention" if cudnn else "attention"), flops


def _passes(sizes: Sizes, step: Step, phase: str) -> Work:
    """Passes over memory and kernels of all blocks in a phase."""
    of_hidden, of_width = BLOCK_PASSES[phase]
    numbers = of_hidden * sizes.hidden * sizes.blocks + of_width * sizes.mixer_width
    numbers += MLP_PASSES[phase] * sizes.mlp_width
    if not step.compiled:
        numbers *= EAGER_PASSES
    if step.dispatch == "alltoall":
        numbers += ROW_PASSES * sizes.top_k * sizes.hidden * len(sizes.experts)
    launches = LAUNCHES[step.compiled][phase] * sizes.blocks
    return Work(0.0, step.batch * step.seq_len * numbers * sizes.head.itemsize, launches)


def _expert_layer(name: str, module: Any, sizes: Sizes, step: Step) -> ExpertLayer:
    """What is sent is as wide as the experts' result: narrower than the hidden size with latent experts (Nemotron)."""
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    return ExpertLayer(
        name, module.num_experts, step.batch * step.seq_len, width, sizes.top_k, module.down_proj.itemsize
    )


def _width(mixer: Any) -> int:
    linear = [module for module in mixer.modules() if isinstance(module, nn.Linear)]
    return sum(module.out_features for module in linear[:-1])
