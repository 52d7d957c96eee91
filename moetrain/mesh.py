"""One world of ranks, two views of it: the axes of the dense parameters and those of the experts.

    dense   (dp_replicate, fsdp)          attention, dense MLPs, embeddings, heads
    experts (dp_replicate, efsdp, ep)     experts; ep is innermost, so an expert group fills whole nodes first

Every rank has its own batch, so the data ranks are the whole world. `efsdp = fsdp / ep` copies of each expert are
sharded over one another as FSDP shards the dense parameters.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def device() -> torch.device:
    """This process's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def layout(world: int, ep_size: int = 1, dp_replicate_size: int = 1, dispatch: str | None = None) -> DistributedConfig:
    """The layout of a world: `dp_replicate_size` replicas, each sharded over the rest, experts over `ep_size` ranks.

    Args:
        dispatch: name of the expert-parallel implementation in Transformers' registry; None is its default.

    Raises:
        ValueError: a size that does not divide; the message lists those that do.
    """
    if world % dp_replicate_size:
        raise ValueError(
            f"dp_replicate_size={dp_replicate_size} does not divide the world of {world} ranks; "
            f"valid: {_divisors(world)}"
        )
    fsdp_size = world // dp_replicate_size
    if fsdp_size % ep_size:
        raise ValueError(
            f"ep_size={ep_size} does not divide the {fsdp_size} ranks of a replica (world {world} / "
            f"dp_replicate_size {dp_replicate_size}); valid: {_divisors(fsdp_size)}"
        )
    return DistributedConfig(
        fsdp_size=fsdp_size,
        ep_size=ep_size,
        dp_replicate_size=dp_replicate_size,
        **({} if dispatch is None else {"ep_implementation": dispatch}),
    )


def check_ep_divides(num_experts: int, ep_size: int, fsdp_size: int) -> None:
    """Raises ValueError, listing the valid sizes, where `ep_size` ranks cannot share the experts evenly, or where a
    replica has more ranks than experts: some would hold none."""
    if num_experts % ep_size:
        valid = [size for size in _divisors(fsdp_size) if num_experts % size == 0]
        raise ValueError(
            f"ep_size={ep_size} does not divide the model's {num_experts} experts; valid on {fsdp_size} ranks: {valid}"
        )
    if ep_size > 1 and num_experts < fsdp_size:
        replicas = next(size for size in _divisors(fsdp_size) if fsdp_size // size <= num_experts)
        raise ValueError(
            f"the model's {num_experts} experts cannot be spread over the {fsdp_size} ranks of a replica; set "
            f"dp_replicate_size to {replicas} times what it is, or use fewer ranks"
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
