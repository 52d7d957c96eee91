"""One rank of a world, run alone on this machine: its own shards, the real kernels, and no network.

Torch's fake process group answers every collective at once. A gather returns copies of this rank's shard, a reduction
its own part; in the exchange of tokens a rank receives what it sends. So shapes, memory and computation are those of
the run, and the numbers in the tensors mean nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
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
from moetrain.graph import MEASURED
from moetrain.moe.layer import ep_implementation
from moetrain.plan.constants import GIB
from moetrain.plan.layout import FREE, Choices, Layout
from moetrain.plan.search import Candidate, Machine, Planner
from moetrain.plan.shapes import find_config
from moetrain.prepare import DTYPES, StepParts, keep_quiet, step_parts


def simulate(config: RunConfig, machine: Machine, choices: Choices, rank: int, steps: int = 3) -> dict[str, Any]:
    """Run steps of one rank on this machine's GPU, or its CPU.

    Args:
        choices: what is not chosen is the configuration's.
        steps: timed, after those of the warm-up.

    Returns:
        Peak memory beside the plan's, seconds of a step and operations a second, all without communication.

    Raises:
        ValueError: no such rank, a layout that does not divide, or a rank that this machine has no memory for.
    """
    if not 0 <= rank < machine.nodes * machine.gpus_per_node:
        last = machine.nodes * machine.gpus_per_node - 1
        raise ValueError(f"--simulate {rank}: the ranks of {machine.nodes} x {machine.gpus_per_node} are 0 to {last}")
    if dist.is_initialized():
        raise ValueError("--simulate runs in a process of its own, and this one has a process group already")
    config, layout = _alone(config, machine, choices)
    planned = Planner(config, machine).own(FREE)
    assert planned is not None
    _check_memory(planned)
    keep_quiet()
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")
    with fake_world(rank, layout.world):
        try:
            return {"rank": rank, "world": layout.world} | _measure(config, layout, planned, steps)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"rank {rank} ran out of this GPU's memory: {str(error).splitlines()[0]} The plan says "
                f"{planned.memory.needed / GIB:.1f} GiB; take a larger --ep, a smaller --batch or --checkpointing full"
            ) from error


def _alone(config: RunConfig, machine: Machine, choices: Choices) -> tuple[RunConfig, Layout]:
    """The configuration with what was chosen, and what needs no other rank: `alltoall`, which takes what it sends, or
    `allgather` where it is asked for. Documents are not masked, and every rank gets the mean rows."""
    parallel, batch = config.parallel, choices.batch or config.data.batch_size
    layout = Layout(
        machine.nodes,
        machine.gpus_per_node,
        choices.ep or parallel.ep_size,
        choices.replicas or parallel.dp_replicate_size,
    )
    model = {
        "dispatch": "allgather" if config.model.dispatch == "allgather" else "alltoall",
        "activation_checkpointing": choices.checkpointing or config.model.activation_checkpointing,
    }
    changes: dict[str, Any] = {
        "model": config.model.model_copy(update=model),
        "data": config.data.model_copy(update={"document_mask": False, "batch_size": batch}),
        "parallel": parallel.model_copy(update={"ep_size": layout.ep, "dp_replicate_size": layout.replicas}),
        "balance": config.balance.model_copy(update={"gate": "random"}),
        "train": config.train.model_copy(update={"grad_accum": 1}),
    }
    return config.model_copy(update=changes), layout


def _check_memory(planned: Candidate) -> None:
    """Raises ValueError where the plan says that this machine has too little memory."""
    needed = planned.memory.allocated
    if torch.cuda.is_available():
        free, name = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    else:
        free, name = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine, which has no GPU,"
    if needed > free:
        raise ValueError(
            f"a rank of this run needs {needed / GIB:.1f} GiB, and {name} has {free / GIB:.1f} free; take a larger "
            "--ep, a smaller --batch, --checkpointing full, or a larger GPU"
        )


def _measure(config: RunConfig, layout: Layout, planned: Candidate, steps: int) -> dict[str, Any]:
    torch.manual_seed(config.train.seed)
    on_gpu = torch.cuda.is_available()
    model = _build(config, layout)
    parts = step_parts(model, config)
    if on_gpu:
        # before the first step: a graph's own memory is handed out when it is captured, and counts no more in a replay
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = _run_steps(model, parts, (config.data.batch_size, config.data.seq_len), steps)
        peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
        return {
            "experts_of_a_layer": [module.num_experts for _, module in experts_modules(model)][:1],
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "passes": parts.passes.status,
            "local_parameters": sum(_local(parameter).numel() for parameter in model.parameters()),
            "peak_gib": peak,
            "planned_gib": planned.memory.allocated / GIB,
            "step_seconds": seconds,
            "planned_seconds": planned.time.seconds - sum(planned.time.parts[part] for part in COMMUNICATION),
            "tflops": planned.time.flops / seconds / 1e12,
        }
    finally:
        parts.passes.close()


COMMUNICATION = ("dispatch in node", "dispatch across nodes", "sharding, exposed")
"""Parts of a planned step that a rank alone has not."""


@contextlib.contextmanager
def fake_world(rank: int, world: int) -> Iterator[None]:
    """Inside, this process is one rank of a world whose others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment))
        stack.enter_context(patch.object(alltoall, "exchange_counts", lambda counts, group_name: counts.contiguous()))
        stack.enter_context(patch.object(collectives, "_exchange_rows", _return_rows))
        stack.enter_context(patch.object(dist, "all_gather_into_tensor", _gather_copies))
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def _build(config: RunConfig, layout: Layout) -> PreTrainedModel:
    dispatch = config.model.dispatch if layout.ep > 1 else "local"
    kwargs: dict[str, Any] = {} if config.model.experts == "auto" else {"experts_implementation": config.model.experts}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        find_config(config.model),
        dtype=DTYPES[config.model.dtype],
        attn_implementation=config.model.attn_implementation,
        distributed_config=mesh.layout(layout.world, layout.ep, layout.replicas, ep_implementation(dispatch)),
        trust_remote_code=config.model.trust_remote_code,
        **kwargs,
    )
    return model.train()


def _run_steps(model: PreTrainedModel, parts: StepParts, shape: tuple[int, int], steps: int) -> float:
    """Mean seconds of a step of one pass, without what comes first: compilation, and the passes before a capture."""
    device = mesh.device()
    ids = torch.randint(model.config.get_text_config().vocab_size, shape, device=device)
    batch = {"input_ids": ids, "labels": ids}
    for _ in range(MEASURED + 3 if parts.passes.dispatchers else 2):
        _step(model, parts, batch)
    begin = _now(device)
    for _ in range(steps):
        _step(model, parts, batch)
    return (_now(device) - begin) / steps


def _step(model: PreTrainedModel, parts: StepParts, batch: dict[str, Tensor]) -> None:
    parts.passes(batch, float(batch["labels"].numel()))
    while parts.passes.overflowed():
        parts.passes(batch, float(batch["labels"].numel()))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()  # what nobody has summed would spoil the weights
    parts.optimizer.step()


def _return_rows(rows: Tensor, recv_sizes: list[int], send_sizes: list[int], group_name: str) -> Tensor:
    received = rows.new_empty(sum(recv_sizes), *rows.shape[1:])
    received.copy_(rows[: len(received)])
    return received


def _gather_copies(output: Tensor, shard: Tensor, group: Any = None, async_op: bool = False) -> None:
    """`all_gather_into_tensor` in one kernel; the fake group's own has one for each rank."""
    with torch.no_grad():
        output.view(-1, *shard.shape).copy_(shard.expand(output.numel() // max(shard.numel(), 1), *shard.shape))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _local(parameter: Any) -> Tensor:
    tensor: Tensor = getattr(parameter, "_local_tensor", parameter)
    return tensor
