"""The steps of a run's setup and end that are not the loop: processes, the model, what people are told."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM as PlainAutoModelForCausalLM
from transformers import AutoTokenizer, PreTrainedModel

from moetrain import mesh
from moetrain.attention import select_attention
from moetrain.auto import AutoModelForCausalLM
from moetrain.backends.transformer_engine import use_transformer_engine
from moetrain.checkpoint.agree import share, together
from moetrain.checkpoint.state import find_latest, read_state, why_incomplete
from moetrain.compiled import compile_layers
from moetrain.config import ModelConfig, RunConfig
from moetrain.create import check_loaded
from moetrain.data import Data
from moetrain.fsdp import keep_gathered
from moetrain.graph import Passes
from moetrain.loss import install_loss
from moetrain.metrics.endpoint import is_loopback
from moetrain.moe.balance import LoadStats, set_aux_loss
from moetrain.moe.dispatch import fastest_dispatch
from moetrain.moe.layer import ep_implementation
from moetrain.moe.router import set_gate
from moetrain.optim import AdamW, build_optimizer
from moetrain.parallelize import checkpoint_activations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def keep_quiet() -> None:
    """Progress bars of libraries are for a terminal, and once is enough; the loop never writes to a model's outputs."""
    if mesh.rank() > 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # torch 2.13 has other names for these two, which 2.11 does not know
    renamed = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)


def start_process_group(config: RunConfig) -> torch.device:
    """Join the other ranks, if there are any; this rank's device."""
    device = mesh.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if mesh.world_size() > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=config.parallel.timeout_seconds)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store_on_loopback(timeout),
            rank=mesh.rank(),
            world_size=mesh.world_size(),
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    return device


def _store_on_loopback(timeout: timedelta) -> dist.TCPStore | None:
    """Where ranks of this machine alone meet. Torch's own store would listen on all addresses of the machine, and takes
    what anyone writes. None where ranks are elsewhere, or torchrun has the store."""
    address = os.environ.get("MASTER_ADDR", "")
    if not is_loopback(address) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = int(os.environ["MASTER_PORT"])
    if mesh.rank() > 0:
        return dist.TCPStore(address, port, is_master=False, timeout=timeout)
    sock = socket.create_server((address, port), backlog=mesh.world_size())
    return dist.TCPStore(address, port, is_master=True, timeout=timeout, master_listen_fd=sock.detach())


def check_resume(choice: str) -> None:
    """Raise ValueError where `checkpoint.resume` names something else than a complete training checkpoint."""
    if choice not in ("auto", "never") and (reason := why_incomplete(Path(choice))):
        raise ValueError(f"checkpoint.resume: {reason}; name another checkpoint, or take auto or never")


def first_checkpoint(choice: str, checkpoints: Path) -> Path | None:
    """The checkpoint that a run begins with, by `checkpoint.resume`; None for none.

    A scheduler that restarts a run repeats its command. What the run has saved by then goes before what it was told to
    begin with. Collective.
    """
    newest = find_latest(checkpoints)
    if choice == "auto":
        return newest
    saved = False
    with together():
        if mesh.rank() == 0 and newest is not None and _restarted():
            saved = read_state(newest)["extra"] == begun_by(choice)
    if share(saved):
        return newest
    return None if choice == "never" else Path(choice)


def begun_by(choice: str) -> dict[str, str]:
    """What a checkpoint holds of `checkpoint.resume`, as it was where the run began."""
    return {"resume": choice}


def _restarted() -> bool:
    """Whether Slurm or torchrun has started this very run before."""
    return any(int(os.environ.get(f"{by}_RESTART_COUNT") or 0) > 0 for by in ("SLURM", "TORCHELASTIC"))


def build_model(config: RunConfig, directory: Path) -> PreTrainedModel:
    """The model, sharded over the world, in training mode.

    Raises:
        ValueError: the checkpoint lacks weights of its own configuration, or the attention is not installed.
    """
    kwargs: dict[str, Any] = {"dtype": DTYPES[config.model.dtype], "trust_remote_code": config.model.trust_remote_code}
    if config.model.attn_implementation is not None:
        kwargs["attn_implementation"] = config.model.attn_implementation
    if config.model.experts != "auto":
        kwargs["experts_implementation"] = config.model.experts
    world = mesh.world_size()
    if world > 1:
        parallel = config.parallel
        dispatch: str = config.model.dispatch
        if dispatch == "auto" and parallel.ep_size > 1:
            dispatch = fastest_dispatch(parallel.ep_size)
        kwargs["distributed_config"] = mesh.layout(
            world, parallel.ep_size, parallel.dp_replicate_size, ep_implementation(dispatch)
        )
    # what does not fit is named below, in place of random weights and a warning
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(directory, **kwargs)
    except ImportError as error:
        raise ValueError(f"model.attn_implementation={config.model.attn_implementation}: {error}") from error
    check_loaded(directory, loading)
    if world == 1:
        model.to(mesh.device())
    choose_kernels(model, config.model)
    trained: PreTrainedModel = model.train()
    return trained


def choose_kernels(model: PreTrainedModel, config: ModelConfig) -> None:
    """Attention, projections and norms on what `kernels` names. Raises ValueError where it cannot be used."""
    if config.attn_implementation is None and config.kernels != "auto":
        select_attention(model, config.kernels)
    if config.kernels == "transformer_engine":
        use_transformer_engine(model)


@dataclass(frozen=True)
class StepParts:
    """What turns batches into gradients, and gradients into updates."""

    passes: Passes
    optimizer: AdamW
    stats: LoadStats
    notes: list[str]
    """What was chosen and why, for people."""


def step_parts(model: PreTrainedModel, config: RunConfig) -> StepParts:
    """Make a model in training mode ready for steps: its loss, gate, checkpointing, compilation and optimizer."""
    notes = [
        install_loss(model, config.train.loss),
        set_aux_loss(model, config.balance.aux_loss_coef, config.train.grad_accum),
    ]
    set_gate(model, config.balance.gate)
    stats = LoadStats.attach(model)
    notes.append(keep_gathered(model, config.parallel.keep_gathered))
    checkpoint_activations(model, config.model.activation_checkpointing, config.model.checkpointed_layers)
    notes.append(compile_layers(model, config.train.compile))
    optimizer = build_optimizer(model, config.optim)
    passes = Passes(model, config.train.cuda_graph)
    notes.append(f"passes: {passes.status}")
    return StepParts(passes, optimizer, stats, notes)


def describe(model: PreTrainedModel, data: Data) -> str:
    """The run in two lines, and a third for lines of the data that were left out."""
    config = getattr(model.config, "distributed_config", None)
    ranks = f"{mesh.world_size()} ranks" if mesh.world_size() > 1 else "one process"
    axes = f", ep={config.ep_size} fsdp={config.fsdp_size} replicas={config.dp_replicate_size}" if config else ""
    train, skipped = data.summary["train"], data.summary["skipped_lines"]
    first = next((source["first_skipped"] for source in data.summary["sources"] if source["first_skipped"]), "")
    return (
        f"{type(model).__name__.removeprefix('FSDP')}: {model.num_parameters() / 1e6:.1f} M parameters, {ranks}{axes}\n"
        f"{train['documents']:,} documents, {train['tokens']:,} tokens, {train['rows']:,} rows for training"
        + (f"\nbad lines skipped: {skipped:,}, the first: {first}" if skipped else "")
    )


def continue_text(path: Path, prompt: str, max_new_tokens: int = 80) -> str:
    """What the exported checkpoint writes after `prompt`, through plain Transformers in this process."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = PlainAutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.7, top_k=40)
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text
