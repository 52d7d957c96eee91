"""What a run tells of itself: memory, place in the world, model, versions. No paths and no names of users."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

import moetrain
from moetrain import mesh
from moetrain.config import RunConfig
from moetrain.doctor import versions
from moetrain.metrics import Expectation, Memory, Metrics

Expect = Callable[[RunConfig, PreTrainedConfig, str, int], Expectation]
"""What is expected of a run: from its configuration, its model's, the name of the GPU and the number of ranks."""

logger = logging.getLogger(__name__)


def open_metrics(config: RunConfig, info: Mapping[str, Any]) -> Metrics:
    """This rank's metrics, and all ranks' endpoints where Prometheus finds them."""
    world = mesh.world_size()
    about = {"world_size": world, **info}
    goes_on = config.checkpoint.resume != "never"
    metrics = Metrics(config.metrics, config.output_dir, mesh.rank(), config.train.steps, info=about, goes_on=goes_on)
    metrics.announce(gather(metrics.target()))
    return metrics


def tell_expectation(
    metrics: Metrics, config: RunConfig, model_config: PreTrainedConfig, expect: Expect | None
) -> None:
    """Ask once, on rank 0, and tell all ranks. A plan that fails is no reason not to train."""
    expected = Expectation()
    if mesh.rank() == 0 and expect is not None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        try:
            expected = expect(config, model_config, gpu, mesh.world_size())
        except Exception as error:
            logger.warning("monitoring has no plan of this run: %s: %s", type(error).__name__, error)
    metrics.expect(gather(expected)[0])


def read_memory(anew: bool = False) -> Memory:
    """Of this rank, now. No sync.

    Args:
        anew: let the next peak be of what comes from here on. A CPU's is always since the start.
    """
    if not _on_gpu():
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Memory(resident, resident, resident, _total_memory(None))
    stats = torch.cuda.memory_stats_as_nested_dict()
    allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
    if anew:
        torch.cuda.reset_peak_memory_stats()
    total = _total_memory(torch.cuda.current_device())
    return Memory(allocated["current"], reserved["current"], allocated["peak"], total)


@functools.cache
def _on_gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _total_memory(gpu: int | None) -> int:
    """Bytes of a GPU; of the machine for None."""
    if gpu is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(torch.cuda.get_device_properties(gpu).total_memory)


def infos(config: RunConfig, model_config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Labels of `moetrain_rank_info`, `moetrain_run_info` and `moetrain_version_info`."""
    parallel, rank, world = config.parallel, mesh.rank(), mesh.world_size()
    fsdp = world // parallel.dp_replicate_size
    on_gpu = torch.cuda.is_available()
    found = versions()
    return {
        "rank": {
            "dp": rank,
            "ep": rank % parallel.ep_size,
            "fsdp": rank % fsdp,
            "dp_replicate": rank // fsdp,
            "gpu": torch.cuda.current_device() if on_gpu else "",
            "gpu_name": torch.cuda.get_device_name() if on_gpu else "",
        },
        "run": {
            "model": Path(config.model.path).name,
            "model_type": model_config.model_type,
            "world_size": world,
            "ep_size": parallel.ep_size,
            "gate": config.balance.gate,
            "git": commit(),
            "config_hash": hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12],
        },
        "version": {
            "moetrain": moetrain.__version__,
            **{name: found.get(name) or "" for name in ("torch", "transformers", "cuda", "triton")},
        },
    }


def layer_names(modules: list[str]) -> list[str]:
    """The number of each experts module's layer: `model.layers.3.mlp.experts` is `3`. The whole names where numbers are
    missing or not distinct."""
    found = [re.findall(r"\.(\d+)(?=\.)", f".{name}.") for name in modules]
    numbers = [digits[0] for digits in found if digits]
    return numbers if len(set(numbers)) == len(modules) else modules


def commit() -> str:
    """Commit of the checkout that runs, in short; empty for an installed package."""
    git = Path(moetrain.__file__).parents[1] / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref: "):
            head = (git / head.removeprefix("ref: ")).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    return head[:12]


def gather(value: Any) -> list[Any]:
    """A small object of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * mesh.world_size()
    dist.all_gather_object(values, value)
    return values
