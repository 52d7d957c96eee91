"""One rank of a world, built and run alone: its real shards and kernels, and no network.

Torch's fake process group answers every collective at once. A gather returns copies of this rank's shard, a reduction
its own part; in the exchange of tokens a rank receives what it sends. So shapes, memory and computation are those of
the run, and the numbers in the tensors mean nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

import moetrain.moe.dispatch.alltoall as alltoall
import moetrain.moe.dispatch.collectives as collectives
from moetrain import mesh
from moetrain.auto import AutoModelForCausalLM
from moetrain.config import RunConfig
from moetrain.families import experts_modules
from moetrain.moe.layer import ep_implementation
from moetrain.plan.constants import GIB
from moetrain.plan.memory import Layout
from moetrain.plan.search import Choices, Machine, Planner
from moetrain.plan.shapes import find_config
from moetrain.prepare import DTYPES, StepParts, step_parts


def simulate(config: RunConfig, machine: Machine, choices: Choices, rank: int, steps: int = 3) -> dict[str, Any]:
    """Run steps of one rank on this machine's GPU, or its CPU.

    Args:
        choices: what is not chosen is the configuration's.
        steps: timed, after one that is not.

    Returns:
        Peak memory beside the plan's, seconds of a step and operations a second, all without communication.

    Raises:
        ValueError: no such rank, or a layout that does not divide.
    """
    parallel = config.parallel
    layout = Layout(
        machine.nodes,
        machine.gpus_per_node,
        choices.ep or parallel.ep_size,
        choices.replicas or parallel.dp_replicate_size,
    )
    if not 0 <= rank < layout.world:
        raise ValueError(
            f"--simulate {rank}: the ranks of {machine.nodes} x {machine.gpus_per_node} are 0 to {layout.world - 1}"
        )
    batch = choices.batch or config.data.batch_size
    checkpointing = choices.checkpointing or config.model.activation_checkpointing
    changes = {"dispatch": "alltoall", "activation_checkpointing": checkpointing}
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update=changes),
            "data": config.data.model_copy(update={"document_mask": False}),
        }
    )
    planned = Planner(config, machine).evaluate(layout, batch, checkpointing)
    with fake_world(rank, layout.world):
        model = _build(config, layout)
        seconds = _run_steps(model, step_parts(model, config), (batch, config.data.seq_len), steps)
        return {
            "rank": rank,
            "world": layout.world,
            "experts_of_a_layer": [module.num_experts for _, module in experts_modules(model)][:1],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "local_parameters": sum(_local(parameter).numel() for parameter in model.parameters()),
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
            "planned_gib": planned.memory.allocated / GIB,
            "step_seconds": seconds,
            "tflops": planned.time.flops / seconds / 1e12,
        }


@contextlib.contextmanager
def fake_world(rank: int, world: int) -> Iterator[None]:
    """Inside, this process is one rank of a world whose others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment))
        stack.enter_context(patch.object(alltoall, "exchange_counts", lambda counts, group_name: counts.contiguous()))
        stack.enter_context(patch.object(collectives, "_exchange_rows", _return_rows))
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def _build(config: RunConfig, layout: Layout) -> PreTrainedModel:
    torch.manual_seed(config.train.seed)
    distributed = mesh.layout(layout.world, layout.ep, layout.replicas, ep_implementation("alltoall"))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        find_config(config.model),
        dtype=DTYPES[config.model.dtype],
        attn_implementation=config.model.attn_implementation,
        distributed_config=distributed,
        trust_remote_code=config.model.trust_remote_code,
    )
    return model.train()


def _run_steps(model: PreTrainedModel, parts: StepParts, shape: tuple[int, int], steps: int) -> float:
    """Mean seconds of a step of one pass."""
    device = mesh.device()
    ids = torch.randint(model.config.get_text_config().vocab_size, shape, device=device)
    begin = 0.0
    for step in range(steps + 1):
        if step == 1:
            begin = _now(device)
        parts.passes({"input_ids": ids, "labels": ids}, float(ids.numel()))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()  # what nobody has summed would spoil the weights
        parts.optimizer.step()
    return (_now(device) - begin) / steps


def _return_rows(rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
    received = rows.new_empty(sum(recv_sizes), *rows.shape[1:])
    received.copy_(rows[: len(received)])
    return received


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _local(parameter: Any) -> Tensor:
    tensor: Tensor = getattr(parameter, "_local_tensor", parameter)
    return tensor
