"""AdamW on sharded parameters, learning-rate schedules, and the gradient norm over any mix of meshes.

Every update runs on the local shard of a parameter, in fp32, with torch's fused kernel. A model with expert
parallelism has parameters on several device meshes, and torch's multi-tensor kernels refuse a list that mixes them;
their local shards are ordinary tensors and go together.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from moetrain.config import OptimConfig
from moetrain.families import experts_modules

logger = logging.getLogger(__name__)

States = Literal["fp32", "master", "bf16_stochastic", "8bit"]

BUCKET_ELEMENTS = 2**26
"""Parameters updated together; bounds the fp32 temporaries of bf16 and 8-bit states to 256 MiB each."""
BLOCK = 256
"""Elements that share a scale in an 8-bit state (arXiv 2110.02861), at most; rows that it does not divide use less."""
MIN_BLOCK = 32
"""A smaller block costs more than 1/8 byte an element in scales; such states stay fp32."""
MIN_QUANTISED = 4096
"""Smaller tensors keep fp32 states, as in bitsandbytes."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over the trainable parameters of a model, sharded or not.

    Weight decay applies to matrices: to parameters with two or more dimensions an expert (the stacked bias [E, I] of
    experts is a vector each), embeddings left out, tied or not: decay would pull the rows of tokens that the data
    does not hold towards zero.

    Raises:
        ValueError: nothing is trainable, or `config.states` does not fit the parameters' types.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter requires a gradient; unfreeze some before building the optimizer")
    decayed = _decayed(model)
    groups = [
        {"params": [p for p in trainable if p in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p not in decayed], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        states=_resolve_states(config.states, trainable),
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """Linear warm-up to `lr`, then the schedule down to `lr * min_lr_ratio` in the last of `steps` steps.

    Step k counts from 0. With w = max(warmup_steps, 1) - 1, the step that reaches the peak, the factor on `lr` is
    (k + 1) / warmup_steps up to w; after it, with t = (k - w) / (steps - 1 - w), it is r + (1 - r) (1 - t) for
    `linear`, r + (1 - r) (1 + cos(pi t)) / 2 for `cosine`, and 1 for `constant`.
    """
    peak = max(config.warmup_steps, 1) - 1

    def factor(step: int) -> float:
        if step < peak:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        progress = min((step - peak) / max(steps - 1 - peak, 1), 1.0)
        left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left

    return LambdaLR(optimizer, factor)


@torch.no_grad()
@contextlib.contextmanager
def keep_settings(optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> Iterator[None]:
    """Around the loading of their states: learning rate, betas, decay and the like stay those of this run's
    configuration, which may differ from the saved run's; what was learned and counted comes from the checkpoint."""
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    scheduler.base_lrs = [settings["initial_lr"] for settings in kept]
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, settings, lr in zip(optimizer.param_groups, kept, scheduler._last_lr, strict=True):
        group.update(settings | {"lr": lr})


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Global L2 norm of the gradients, and scaling of the gradients by min(1, max_norm / (norm + 1e-6)) in place.

    Right for parameters of different device meshes: sums of squares are reduced over the mesh dimensions that shard a
    parameter and not over those that replicate it. Every rank of those meshes must call it. No host sync.

    Args:
        max_norm: None only measures.

    Returns:
        The norm before clipping, a scalar in fp32 on the parameters' device, equal on all ranks.
    """
    parameters = list(parameters)
    assert parameters, "no parameters"
    # keyed by parameter, not by gradient: a rank without gradients must still join the collectives of the others
    grads_by_groups: dict[tuple[str, ...], list[Tensor]] = {}
    groups_by_name: dict[str, dist.ProcessGroup] = {}
    for parameter in parameters:
        groups = _sharding_groups(parameter)
        groups_by_name.update({group.group_name: group for group in groups})
        grads = grads_by_groups.setdefault(tuple(group.group_name for group in groups), [])
        if parameter.grad is not None:
            grads.append(_local(parameter.grad))

    total = torch.zeros((), dtype=torch.float64, device=_local(parameters[0]).device)
    for names, grads in grads_by_groups.items():
        squares = _sum_of_squares(grads, total)
        for name in names:
            dist.all_reduce(squares, group=groups_by_name[name])
        total = total + squares
    norm = total.sqrt().float()

    if max_norm is not None:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for grads in grads_by_groups.values():
            if grads:
                torch._foreach_mul_(grads, scale)
    return norm


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101), choosing what is kept between steps.

    The state of a parameter: `step`, `exp_avg` and `exp_avg_sq`, and what `states` adds. All but `step` are sharded
    as the parameter is and are made at once, so that `state_dict()` has its final shape before the first step and
    torch's distributed checkpoint saves and loads it, on another layout too. Per element of a bf16 parameter:

    - `fp32`: fp32 averages; for fp32 parameters.
    - `master`: and an fp32 copy of the parameter; 14 bytes with the parameter itself.
    - `bf16_stochastic`: bf16 averages, parameter and averages rounded stochastically; 6 bytes. Rounding to nearest
      would lose every update below 1/512 of a value, and freeze `exp_avg_sq` for beta2 near 1.
    - `8bit`: averages quantised in blocks along the last dimension with torchao's dynamic map (arXiv 2110.02861), the
      parameter rounded stochastically; about 4 bytes. Vectors and rows without a usable block keep fp32 averages.

    Parameters that are fp32 themselves need neither master nor rounding under any choice. Random bits depend on the
    number of updates, the parameter and the shard alone: replicas round alike, and a resumed run as the uninterrupted.

    Args:
        groups: parameter groups, each with its `weight_decay`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, states: States
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": 0.0, "updates": 0})
        self.states = states
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._random_stream = {p: (index, len(parameters), _shard_index(p)) for index, p in enumerate(parameters)}
        if states == "8bit":
            device = _local(parameters[0]).device
            self._quantiser = {"exp_avg": Quantiser(True, device), "exp_avg_sq": Quantiser(False, device)}
            _warn_unquantised(parameters)
        for parameter in parameters:
            self.state[parameter] = self._new_state(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["updates"] += 1
            for bucket in _buckets([p for p in group["params"] if p.grad is not None]):
                self._update(bucket, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state into this one; torch's own would cast every state to the parameter's type.

        Raises:
            ValueError: the state was saved with another choice of `states` or for other parameters.
        """
        state = self.state
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state = state
        parameters = [p for group in self.param_groups for p in group["params"]]
        identifiers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for parameter, identifier in zip(parameters, identifiers, strict=True):
            mine, saved = state[parameter], state_dict["state"][identifier]
            types = {name: tensor.dtype for name, tensor in mine.items()}
            if types != {name: tensor.dtype for name, tensor in saved.items()}:
                raise ValueError(
                    f"saved optimizer state holds {_kinds(saved)}, optim.states={self.states} needs {_kinds(mine)}; "
                    "resume with the optim.states that saved it"
                )
            for name, tensor in mine.items():
                _local(tensor).copy_(_local(saved[name]))

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        exact = parameter.dtype == torch.float32
        state = {"step": torch.zeros((), device=_local(parameter).device)}
        for name in ("exp_avg", "exp_avg_sq"):
            if self.states == "8bit" and (block := quantised_block(parameter)):
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
                state[f"{name}_scale"] = _like_rows(parameter, parameter.shape[-1] // block)
            else:
                dtype = torch.bfloat16 if self.states == "bf16_stochastic" and not exact else torch.float32
                state[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        if self.states == "master" and not exact:
            state["master"] = parameter.detach().float()
        return state

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One fused update of a bucket: read everything as fp32, update in place, write back what was a copy."""
        values = [self._read_parameter(p) for p in parameters]
        exp_avgs = [self._read(p, "exp_avg") for p in parameters]
        exp_avg_sqs = [self._read(p, "exp_avg_sq") for p in parameters]
        adamw(
            values,
            [_local(p.grad).float() for p in parameters if p.grad is not None],
            exp_avgs,
            exp_avg_sqs,
            [],
            [self.state[p]["step"] for p in parameters],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for parameter, value, exp_avg, exp_avg_sq in zip(parameters, values, exp_avgs, exp_avg_sqs, strict=True):
            random = self._generator(parameter, group["updates"])
            self._write_parameter(parameter, value, random)
            self._write(parameter, "exp_avg", exp_avg, random)
            self._write(parameter, "exp_avg_sq", exp_avg_sq, random)

    def _read_parameter(self, parameter: Tensor) -> Tensor:
        return _local(self.state[parameter].get("master", parameter)).float()

    def _write_parameter(self, parameter: Tensor, value: Tensor, random: torch.Generator | None) -> None:
        if parameter.dtype == torch.float32:
            return
        if random is None:
            _local(parameter).copy_(value)
        else:
            stochastic_round_(_local(parameter), value, random)

    def _read(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if f"{name}_scale" in state:
            return self._quantiser[name].read(_local(state[name]), _local(state[f"{name}_scale"]))
        return _local(state[name]).float()

    def _write(self, parameter: Tensor, name: str, value: Tensor, random: torch.Generator | None) -> None:
        state = self.state[parameter]
        if f"{name}_scale" in state:
            self._quantiser[name].write(_local(state[name]), _local(state[f"{name}_scale"]), value)
        elif state[name].dtype == torch.bfloat16:
            assert random is not None
            stochastic_round_(_local(state[name]), value, random)

    def _generator(self, parameter: Tensor, updates: int) -> torch.Generator | None:
        """Random bits of one parameter in one update; None where nothing is rounded stochastically."""
        if self.states in ("fp32", "master") or parameter.dtype == torch.float32:
            return None
        index, count, shard = self._random_stream[parameter]
        generator = torch.Generator(_local(parameter).device)
        return generator.manual_seed((updates * count + index) * 2**20 + shard)


def stochastic_round_(target: Tensor, value: Tensor, random: torch.Generator) -> None:
    """Write fp32 `value` into bf16 `target`, up or down with the probability that makes the mean exact.

    bf16 is the upper half of fp32's bits, so adding 16 random bits and cutting the lower half does it; infinities stay.
    """
    bits = value.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=random)
    target.copy_((bits + noise).bitwise_and_(-(2**16)).view(torch.float32))


class Quantiser:
    """8-bit codes and a scale for each block along the last dimension (arXiv 2110.02861)."""

    def __init__(self, signed: bool, device: torch.device) -> None:
        try:
            from torchao.optim.quant_utils import create_dynamic_map
        except ImportError as error:
            raise ValueError("optim.states=8bit needs torchao: pip install torchao") from error
        self._values = torch.tensor(create_dynamic_map(signed), device=device)
        self._between = (self._values[1:] + self._values[:-1]) / 2

    def read(self, codes: Tensor, scale: Tensor) -> Tensor:
        """fp32 values of uint8 `codes` [..., L] with `scale` [..., L / block]."""
        blocks = codes.reshape(*scale.shape, codes.shape[-1] // scale.shape[-1])
        return (self._values[blocks.int()] * scale.unsqueeze(-1)).view(codes.shape)

    def write(self, codes: Tensor, scale: Tensor, value: Tensor) -> None:
        """Quantise fp32 `value` into `codes` and `scale`, each element to the nearest code."""
        blocks = value.reshape(*scale.shape, codes.shape[-1] // scale.shape[-1])
        scale.copy_(blocks.abs().amax(-1).clamp_(min=1e-12))
        nearest = torch.bucketize(blocks / scale.unsqueeze(-1), self._between, out_int32=True)
        codes.copy_(nearest.view(codes.shape))


def quantised_block(parameter: Tensor) -> int:
    """Elements that share a scale in the 8-bit state of a parameter; 0 where the state stays fp32.

    Decided by the global shape, so alike on all ranks; and blocks lie inside a row, so that any sharding of the other
    dimensions keeps them whole.
    """
    if parameter.ndim < 2 or parameter.numel() < MIN_QUANTISED:
        return 0
    if isinstance(parameter, DTensor) and any(
        getattr(placement, "dim", None) == parameter.ndim - 1 for placement in parameter.placements
    ):
        return 0
    block = math.gcd(parameter.shape[-1], BLOCK)
    return block if block >= MIN_BLOCK else 0


def _resolve_states(states: str, parameters: list[nn.Parameter]) -> States:
    """`auto` by the parameters' types; the others checked against them."""
    types = {p.dtype for p in parameters}
    if unknown := types - {torch.float32, torch.bfloat16}:
        raise ValueError(f"parameters of type {unknown}; the optimizer trains torch.float32 and torch.bfloat16")
    if states == "auto":
        return "master" if torch.bfloat16 in types else "fp32"
    if states == "fp32" and torch.bfloat16 in types:
        raise ValueError(
            "optim.states=fp32 would round every update of bf16 parameters to nearest, which loses small ones; "
            "choose master, bf16_stochastic or 8bit, or model.dtype=float32"
        )
    assert states in ("fp32", "master", "bf16_stochastic", "8bit"), states
    return states  # type: ignore[return-value]


def _decayed(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that weight decay applies to."""
    decayed, embeddings = set(), set()
    experts = {module for _, module in experts_modules(model)}
    for module in model.modules():
        stacked = module in experts  # the first dimension of their parameters counts them
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                embeddings.add(parameter)
            elif parameter.ndim - stacked >= 2:
                decayed.add(parameter)
    return decayed - embeddings


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters of about `BUCKET_ELEMENTS` local elements together."""
    bucket: list[Tensor] = []
    elements = 0
    for parameter in parameters:
        bucket.append(parameter)
        elements += _local(parameter).numel()
        if elements >= BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket


def _sum_of_squares(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Scalar in fp64: fp32 norms can square past fp32's range, and there are few of them."""
    if not tensors:
        return torch.zeros_like(like)
    if like.device.type == "cpu":
        # the CPU sums in order: 2e-3 off for 50M elements in one piece, and fp64 sums take 10 times as long
        tensors = [piece for tensor in tensors for piece in tensor.reshape(-1).split(2**16)]
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch.stack(torch._foreach_norm(tensors, 2.0, dtype=dtype))
    return norms.to(like.dtype).square().sum()


def _sharding_groups(parameter: Tensor) -> list[dist.ProcessGroup]:
    """Process groups of the mesh dimensions that split a parameter, those of one rank left out."""
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    assert not any(placement.is_partial() for placement in parameter.placements), "gradients are not reduced"
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    ]


def _shard_index(parameter: Tensor) -> int:
    """Number of this rank's shard of a parameter; replicas have the same."""
    index = 0
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if not placement.is_replicate():
                index = index * parameter.device_mesh.size(dim) + parameter.device_mesh.get_local_rank(dim)
    return index


def _like_rows(parameter: Tensor, columns: int) -> Tensor:
    """fp32 zeros of the parameter's shape but for `columns` in the last dimension, sharded alike."""
    local = _local(parameter)
    zeros = torch.zeros(*local.shape[:-1], columns, device=local.device)
    if not isinstance(parameter, DTensor):
        return zeros
    shape = torch.Size((*parameter.shape[:-1], columns))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _kinds(state: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} ({str(tensor.dtype).removeprefix('torch.')})" for name, tensor in sorted(state.items()))


def _warn_unquantised(parameters: list[Tensor]) -> None:
    """Say which matrices the 8-bit states do not cover."""
    shapes = [
        tuple(p.shape) for p in parameters if p.ndim >= 2 and p.numel() >= MIN_QUANTISED and not quantised_block(p)
    ]
    if shapes:
        logger.warning(
            "optim.states=8bit: %d matrices keep fp32 states, since the last dimension has no block of %d to %d "
            "elements or is sharded: %s",
            len(shapes),
            MIN_BLOCK,
            BLOCK,
            ", ".join(map(str, sorted(set(shapes)))),
        )
