"""Ranks' work for the tests of captured steps on GPUs."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moetrain import AutoModelForCausalLM, DistributedConfig, graph
from moetrain.compiled import compile_layers
from moetrain.config import OptimConfig
from moetrain.data.isolation import isolate_documents
from moetrain.graph import Passes
from moetrain.loss import install_loss
from moetrain.moe.dispatch.static import forget_exchanges
from moetrain.moe.layer import ep_implementation
from moetrain.optim import build_optimizer, clip_factor, grad_norm
from moetrain.parallelize import checkpoint_activations
from tests.families import tiny

BF16 = torch.bfloat16
graph.MEASURED = 1
ROWS, LENGTH = 2, 256
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "intermediate_size": 128,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "num_hidden_layers": 3,
}


def build(family: str, dispatch: str | None = None, checkpointing: str = "none", documents: int | None = None) -> Any:
    """A small model of a family in bf16, its layers compiled, its loss fused."""
    torch.manual_seed(0)
    config = tiny(family, **{name: value for name, value in SIZES.items() if hasattr(tiny(family), name)})
    if dispatch is None:
        model = AutoModelForCausalLM.from_config(config, dtype=BF16).cuda().train()
    else:
        world = dist.get_world_size()
        layout = DistributedConfig(fsdp_size=world, ep_size=world, ep_implementation=ep_implementation(dispatch))
        model = AutoModelForCausalLM.from_config(config, dtype=BF16, distributed_config=layout).train()
    if documents is not None:
        isolate_documents(model, documents)
    install_loss(model)
    mode, _, layers = checkpointing.partition(":")
    checkpoint_activations(model, mode, int(layers) if layers else None)
    compile_layers(model)
    return model


def batch(seed: int, documents: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 512, (ROWS, LENGTH), generator=generator)
    found = {"input_ids": ids, "labels": ids.clone()}
    if documents:
        cuts = torch.randint(20, LENGTH - 20, (ROWS, 2), generator=generator).sort(1).values
        seq_idx = (torch.arange(LENGTH)[None, :, None] >= cuts[:, None, :]).sum(-1).int()
        starts = torch.cat([torch.zeros(ROWS, 1, dtype=torch.int64), cuts], 1).gather(1, seq_idx.long())
        found |= {"seq_idx": seq_idx, "position_ids": torch.arange(LENGTH)[None] - starts}
    return found


def train(model: PreTrainedModel, mode: str, steps: int, accum: int = 1, documents: bool = False, rank: int = 0) -> Any:
    """Losses and gradient norms of some steps with a changing learning rate, and how the passes ran."""
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, states="bf16_stochastic"))
    passes = Passes(model, mode)  # type: ignore[arg-type]
    losses, norms = [], []
    for step in range(steps):
        batches = [batch(1000 * rank + 10 * step + number, documents) for number in range(accum)]
        scale = float(accum * ROWS * (LENGTH - 1))
        while True:
            loss = sum(passes(one, scale, accumulate=number > 0).item() for number, one in enumerate(batches))
            if not passes.overflowed():
                break
        norm = grad_norm(model.parameters())
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + step)
        optimizer.step(grad_factor=clip_factor(norm, 1.0))
        losses.append(loss)
        norms.append(norm.item())
    status = passes.status
    passes.close()
    return losses, norms, status


def over_ranks(rank: int, world_size: int, case: str) -> dict[str, Any]:
    """The same training by `alltoall`, eagerly, and by `nvlink`, captured; and each layer forced to overflow."""
    checkpointing, accum = ("selective", 2) if case == "selective" else (case, 1)
    plain = train(build("qwen3_moe", "alltoall", checkpointing), "off", 6, accum, rank=rank)
    captured = train(build("qwen3_moe", "nvlink", checkpointing), "on", 6, accum, rank=rank)
    forced = overflows(rank) if case == "none" else []
    dist.barrier()
    forget_exchanges()
    return {"plain": plain, "captured": captured, "overflows": forced}


def overflows(rank: int) -> list[tuple[float, float, float]]:
    """Loss by `alltoall`, loss and largest gradient error by `nvlink` in a step that overflowed, layer by layer."""
    reference = build("qwen3_moe", "alltoall")
    wanted_loss = Passes(reference, "off")(batch(rank), 512.0).item()
    wanted = {name: _local(p.grad).float() for name, p in reference.named_parameters() if p.grad is not None}
    found = []
    passes = Passes(build("qwen3_moe", "nvlink"), "on")
    for layer in range(len(passes.dispatchers)):
        for _ in range(3):
            passes(batch(rank), 512.0)
            passes.overflowed()
        passes.dispatchers[layer].capacity = passes._most_needed[layer] - 1
        passes._graphs.clear()
        passes(batch(rank), 512.0)
        assert passes.overflowed(), layer
        loss = passes(batch(rank), 512.0).item()
        assert not passes.overflowed(), layer
        error = max(
            ((_local(p.grad).float() - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-4)).item()
            for name, p in passes.model.named_parameters()
            if p.grad is not None
        )
        found.append((wanted_loss, loss, error))
    passes.close()
    return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def join_nccl() -> tuple[int, int]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    return rank, world


if __name__ == "__main__":
    import json
    import sys

    rank, world = join_nccl()
    for case in sys.argv[1:]:
        result = over_ranks(rank, world, case)
        if rank == 0:
            print("RESULT", case, json.dumps(result), flush=True)
    dist.destroy_process_group()
