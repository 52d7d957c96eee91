"""AdamW whose states are sharded as the parameters are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.kernels.adamw import Slot, adamw, takes
from moetrain.optim.norm import local
from moetrain.optim.reference import BLOCK, MIN_BLOCK, MIN_QUANTISED, Quantiser, adamw_ref, quantised_block

logger = logging.getLogger(__name__)

States = Literal["fp32", "master", "bf16_stochastic", "8bit"]


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

    Parameters that are fp32 themselves need neither master nor rounding under any choice. On a GPU each update is one
    pass of `moetrain.kernels.adamw`, elsewhere `adamw_ref`; they agree but for their random bits. Those depend on the
    number of updates, the parameter, the shard and the element alone: replicas round alike, and a resumed run as the
    uninterrupted.

    Args:
        groups: parameter groups, each with its `weight_decay`. On a GPU a group's `lr` may also be a scalar tensor
            there, which a CUDA graph of `step` reads anew in each replay; one step by the host comes before a capture.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, states: States
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": 0.0, "updates": 0})
        self.states = states
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._places = {p: (number, _shard_index(p)) for number, p in enumerate(parameters)}
        self._quantisers: tuple[Quantiser, Quantiser] | None = None
        if states == "8bit":
            device = local(parameters[0]).device
            self._quantisers = Quantiser(True, device), Quantiser(False, device)
            _warn_unquantised(parameters)
        for parameter in parameters:
            self.state[parameter] = self._new_state(parameter)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, grad_factor: Tensor | None = None
    ) -> Any:
        """Update every parameter that has a gradient. No host sync on a GPU.

        Args:
            grad_factor: a scalar in fp32 on the parameters' device, that gradients are multiplied by where they are
                read (`clip_factor`); they stay as they are. It is no loss scale, which torch divides by.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["updates"] += 1
            slots = [self._slot(p) for p in group["params"] if p.grad is not None]
            fused = [takes(slot) for slot in slots]
            settings = group["betas"], group["eps"], group["weight_decay"], grad_factor
            if kernel := [slot for slot, yes in zip(slots, fused, strict=True) if yes]:
                lr, device = group["lr"], kernel[0].parameter.device
                if not isinstance(lr, Tensor):
                    lr = torch.full((), lr, dtype=torch.float64, device=device)
                codebooks = self._quantisers and (self._quantisers[0].codebook, self._quantisers[1].codebook)
                adamw(kernel, lr, *settings, codebooks)
            if rest := [slot for slot, yes in zip(slots, fused, strict=True) if not yes]:
                adamw_ref(rest, group["lr"], *settings, self._quantisers, group["updates"])
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
                local(tensor).copy_(local(saved[name]))

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        exact = parameter.dtype == torch.float32
        state = {"step": torch.zeros((), device=local(parameter).device)}
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

    def _slot(self, parameter: Tensor) -> Slot:
        assert parameter.grad is not None
        state = {name: local(tensor) for name, tensor in self.state[parameter].items()}
        number, shard = self._places[parameter]
        return Slot(
            local(parameter),
            local(parameter.grad).contiguous(),
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            state.get("master"),
            state.get("exp_avg_scale"),
            state.get("exp_avg_sq_scale"),
            number,
            shard,
        )


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
    like = local(parameter)
    zeros = torch.zeros(*like.shape[:-1], columns, device=like.device)
    if not isinstance(parameter, DTensor):
        return zeros
    shape = torch.Size((*parameter.shape[:-1], columns))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


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
