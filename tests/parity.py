"""Compare a sharded model with plain eager Transformers in one process: the worker of the parity matrix."""

from __future__ import annotations

import copy
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as PlainAutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moetrain import AutoModelForCausalLM
from moetrain.families import correct_after_load
from moetrain.mesh import device
from moetrain.optim import clip_grad_norm
from tests.families import batch, build


@dataclass(frozen=True)
class Parity:
    """How far the sharded model is from the plain one. Differences are relative to the largest reference value."""

    loss: float
    logits: float
    gradients: float
    worst_gradient: str
    norm: float
    missing_gradients: tuple[str, ...]
    same_keys: bool
    same_weights: bool
    error: str | None = None


ILL_CONDITIONED = ("hy_v4",)
"""A few scalar gradients of hy_v4's hyper-connections are sums whose terms cancel so far that plain Transformers itself
is 3e-5 from its fp64 result. Here a difference counts beyond twice that distance."""

FAILED = Parity(float("inf"), float("inf"), float("inf"), "", float("inf"), (), False, False)


def parity_of_families(
    rank: int, world_size: int, families: list[str], layout: dict[str, Any], folder: str
) -> dict[str, Parity]:
    """Parity of each family under a layout, the same on every rank. An exception becomes the family's error."""
    torch.set_num_threads(1)
    results = {}
    for family in families:
        try:
            results[family] = parity_of(rank, world_size, family, layout, Path(folder) / family.replace("+", "_"))
        except Exception:
            results[family] = Parity(**{**vars(FAILED), "error": traceback.format_exc(limit=-4)})
        # a rank that failed alone would leave the others waiting in a collective: they fail by timeout together
        dist.barrier()
    return results


def parity_of(rank: int, world_size: int, family: str, layout: dict[str, Any], folder: Path) -> Parity:
    plain = build(family).to(device())
    if rank == 0:
        plain.save_pretrained(folder / "plain")
    dist.barrier()
    config = DistributedConfig(**layout)
    sharded = AutoModelForCausalLM.from_pretrained(
        folder / "plain", dtype=torch.float32, distributed_config=config
    ).train(plain.training)

    # load -> save is compared before any gradient: what is read is what is written
    sharded.save_pretrained(folder / "sharded")
    dist.barrier()
    same_keys, same_weights = _same_checkpoint(plain, folder)

    batches = [{name: ids.to(device()) for name, ids in batch(seed).items()} for seed in range(world_size)]
    plain.set_experts_implementation("eager")
    correct_after_load(plain)  # the one deliberate difference from plain Transformers
    # batch by batch, as the ranks see them
    reference_loss = 0.0
    for number, inputs in enumerate(batches):
        reference = plain(**inputs, use_cache=False)
        (reference.loss / world_size).backward()
        reference_loss += reference.loss.item() / world_size
        if number == rank:
            expected_logits = reference.logits.detach()
    output = sharded(**batches[rank], use_cache=False)
    output.loss.backward()

    loss = output.loss.detach().clone()
    dist.all_reduce(loss)
    rounding = _rounding(plain, batches) if family in ILL_CONDITIONED else {}
    gradients, worst, missing = _gradient_difference(plain, sharded, rounding)
    norm = clip_grad_norm(sharded.parameters(), 0.1)
    expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    clipped, _, _ = _gradient_difference(plain, sharded, rounding)
    result = Parity(
        loss=abs(loss.item() / world_size - reference_loss) / abs(reference_loss),
        logits=_all_max(_relative(output.logits.detach(), expected_logits)),
        gradients=max(gradients, clipped),
        worst_gradient=worst,
        norm=abs(norm.item() - expected_norm.item()) / expected_norm.item(),
        missing_gradients=missing,
        same_keys=same_keys,
        same_weights=same_weights,
    )
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    return result


def _same_checkpoint(plain: Any, folder: Path) -> tuple[bool, bool]:
    """Whether the sharded save has the plain save's tensors, and loads in plain Transformers to the same weights."""
    same_keys = _keys(folder / "plain") == _keys(folder / "sharded")
    again = PlainAutoModelForCausalLM.from_pretrained(folder / "sharded", dtype=torch.float32)
    ours, theirs = again.state_dict(), plain.state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key].cpu()) for key in theirs)
    return same_keys, same


def _keys(folder: Path) -> set[str]:
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            keys.update(handle.keys())
    return keys


def _rounding(plain: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Largest relative distance of each of plain's gradients from the same in fp64."""
    exact = copy.deepcopy(plain).double()
    exact.zero_grad()
    for inputs in batches:
        (exact(**inputs, use_cache=False).loss / len(batches)).backward()
    wanted = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    return {name: _relative(plain.get_parameter(name).grad.double(), grad) for name, grad in wanted.items()}


def _gradient_difference(plain: Any, sharded: Any, rounding: dict[str, float]) -> tuple[float, str, tuple[str, ...]]:
    worst, worst_name, missing = 0.0, "", []
    ours = dict(sharded.named_parameters())
    largest = max(p.grad.abs().max().item() for p in plain.parameters() if p.grad is not None)
    for name, parameter in plain.named_parameters():
        expected, got = parameter.grad, ours[name].grad
        if got is None or expected is None:
            if expected is not None and expected.abs().max() > 0:
                missing.append(name)
            continue
        full = got.full_tensor() if isinstance(got, DTensor) else got
        # a gradient that is rounding noise beside the model's others is compared on their scale
        difference = _relative(full, expected, floor=1e-4 * largest) - 2 * rounding.get(name, 0.0)
        if difference > worst:
            worst, worst_name = difference, name
    return worst, worst_name, tuple(missing)


def _relative(got: torch.Tensor, expected: torch.Tensor, floor: float = 1e-12) -> float:
    return (got - expected).abs().max().item() / max(expected.abs().max().item(), floor)


def _all_max(value: float) -> float:
    tensor = torch.tensor(value, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()
