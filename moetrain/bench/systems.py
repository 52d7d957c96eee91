"""The systems whose steps are compared: moetrain's trainer step, and native Transformers at its own best.

All of them get random weights that each rank makes on its device, the same random tokens, and bf16 Adam states.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.initialization import no_tie_weights

from moetrain import mesh
from moetrain.auto import AutoModelForCausalLM
from moetrain.bench.shapes import model_config
from moetrain.bench.step import Subject
from moetrain.config import BalanceConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, Source, TrainConfig
from moetrain.moe.balance import LoadStats
from moetrain.moe.dispatch import fastest_dispatch
from moetrain.moe.layer import ep_implementation
from moetrain.moe.router import set_gate
from moetrain.optim import clip_factor, grad_norm
from moetrain.prepare import choose_kernels, step_parts
from moetrain.sharded_init import initialize_weights

LR = 1e-8
"""Small, so that random weights keep their routing as trained ones do: at 1e-6 the load of a rank of Qwen3-30B-A3B
moved by a quarter in ten steps."""
MAX_GRAD_NORM = 1.0
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """What is measured: a model at one setting."""

    model: str
    layers: int | None = None
    """None: all of them."""
    batch: int = 1
    """Sequences of a rank in a step."""
    seq_len: int = 4096
    gate: Literal["learned", "random", "sequential"] = "learned"
    ep_size: int = 1
    kernels: Literal["auto", "transformer_engine", "torch"] = "auto"
    dispatch: str = "auto"
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    checkpointed_layers: int | None = None
    graph: Literal["auto", "on", "off"] = "auto"
    warmup: int = 10
    steps: int = 10

    def config(self) -> PreTrainedConfig:
        return model_config(self.model, self.layers)

    def run_config(self) -> RunConfig:
        """The same setting as the trainer gets it. Nothing is read from its paths."""
        return RunConfig(
            output_dir=".",
            model=ModelConfig(
                path=".",
                kernels=self.kernels,
                activation_checkpointing=self.activation_checkpointing,
                checkpointed_layers=self.checkpointed_layers,
            ),
            data=DataConfig(train=[Source(path=".")], seq_len=self.seq_len, batch_size=self.batch),
            train=TrainConfig(steps=self.warmup + self.steps, cuda_graph=self.graph),
            optim=OptimConfig(lr=LR, states="bf16_stochastic"),
            balance=BalanceConfig(gate=self.gate),
        )


def systems_of(case: Case, world: int, against: bool) -> list[str]:
    """Names of the systems to measure, in turn; natively sharded models first, in both ways that Transformers has."""
    if not against:
        return ["moetrain"]
    if world == 1:
        return ["transformers", "moetrain"]
    return ["transformers fsdp2", *(["transformers ep"] if case.ep_size > 1 else []), "moetrain"]


def build_subject(system: str, case: Case) -> Subject:
    """One of `systems_of`, with its model on this rank's device."""
    torch.manual_seed(0)
    if system == "moetrain":
        return build_moetrain(case)
    return build_native(case, case.ep_size if system == "transformers ep" else 1)


def build_moetrain(case: Case) -> Subject:
    """The trainer's model, passes and optimizer, put together as `moetrain.trainer.setup` does."""
    config, world = case.config(), mesh.world_size()
    kwargs: dict[str, Any] = {"dtype": DTYPE}
    if world > 1:
        dispatch = case.dispatch
        if dispatch == "auto" and case.ep_size > 1:
            dispatch = fastest_dispatch(case.ep_size)
        kwargs["distributed_config"] = mesh.layout(world, case.ep_size, dispatch=ep_implementation(dispatch))
        model = AutoModelForCausalLM.from_config(config, **kwargs)
    else:
        with mesh.device():
            model = AutoModelForCausalLM.from_config(config, **kwargs)
    model.train()
    choose_kernels(model, case.run_config().model)
    parts = step_parts(model, case.run_config())
    labels = case.batch * (case.seq_len - 1)  # of a rank: the model predicts a token from those before it

    def update() -> None:
        norm = grad_norm(model.parameters())
        norm.item()  # the trainer reads it, to stop where it is not finite
        parts.optimizer.step(grad_factor=clip_factor(norm, MAX_GRAD_NORM))

    return Subject(
        model=model,
        passes=lambda batch: parts.passes(batch, float(labels)),
        overflowed=parts.passes.overflowed,
        update=update,
        status=lambda: parts.passes.status,
        stats=parts.stats,
        counts_always=True,
    )


def build_native(case: Case, ep_size: int) -> Subject:
    """Plain Transformers with FSDP2, and with its own all-to-all expert parallelism where `ep_size` > 1: grouped_mm
    experts, torch's fused AdamW on bf16 parameters. Its gradients are not clipped and its load is not counted while it
    is timed, both of which moetrain's are."""
    config = case.config()
    kwargs = {"dtype": DTYPE, "attn_implementation": native_attention(config), "experts_implementation": "grouped_mm"}
    if mesh.world_size() > 1:
        layout = DistributedConfig(fsdp_size=mesh.world_size(), ep_size=ep_size)
        model = _sharded_native(config, layout, **kwargs)
    else:
        with mesh.device():
            model = transformers.AutoModelForCausalLM.from_config(config, **kwargs)
    model.train()
    set_gate(model, case.gate)
    stats = LoadStats.attach(model)
    if case.activation_checkpointing != "none":
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizers = [
        torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True) for parameters in by_mesh(model).values()
    ]

    def passes(batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return Subject(
        model=model,
        passes=passes,
        overflowed=lambda: False,
        update=update,
        status=lambda: "eager",
        stats=stats,
        counts_always=False,
    )


def native_attention(config: PreTrainedConfig) -> str:
    """The fastest attention that Transformers has for a family without further packages."""
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    if model_class._supports_sdpa:
        return "sdpa"
    return "flex_attention" if torch.cuda.is_available() and model_class._supports_flex_attn else "eager"


def by_mesh(model: nn.Module) -> dict[Any, list[nn.Parameter]]:
    """Parameters by the device mesh that they are sharded over: torch's fused kernel refuses a list that mixes them."""
    found: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        found[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return dict(found)


def _sharded_native(config: PreTrainedConfig, layout: DistributedConfig, **kwargs: Any) -> PreTrainedModel:
    """What `from_pretrained(..., distributed_config=layout)` builds, with random weights in the place of a
    checkpoint's. Transformers' `from_config` takes no layout."""
    with torch.device("meta"), no_tie_weights():
        model: Any = transformers.AutoModelForCausalLM.from_config(config, **kwargs)
    layout, device, device_mesh = type(model).prepare_distribute_model(layout)
    model = type(model).maybe_distribute_model(model, layout, device_mesh)
    model._move_missing_keys_from_meta_to_device(set(model.state_dict()), {"": device}, device_mesh, None)
    initialize_weights(model, mesh.rank())
    return model
