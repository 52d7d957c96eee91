"""What this package asks of FSDP2 beyond its public interface, in one place (torch 2.11 to 2.13).

- Experts that one rank holds alone are used where they lie. FSDP2 treats them as a group of one rank and copies: every
  weight before each forward and backward, every gradient twice after it.
- Dense weights stay gathered from the forward to the backward where memory allows.
- What a rank waits for the others inside of gathers and reductions counts as waiting (`moetrain.metrics`).
- A CUDA graph can be captured: no event of an earlier step is waited for, every stream joins at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moetrain.kernels import GRADIENTS
from moetrain.kernels.aside import join_aside
from moetrain.metrics.device import timed

KEPT_SHARE = 0.08
"""Share of a GPU's memory that gathered dense weights may take under `auto`: 11 GiB of an H200's, 6.4 of an H100's."""

Keep = Literal["auto", "always", "never"]


def reshard(model: nn.Module) -> None:
    """Free what a forward has left gathered, and give `parameters()` the shards back."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keep_gathered(model: PreTrainedModel, keep: Keep = "auto") -> str:
    """Choose whether dense weights stay gathered between a pass's forward and its backward.

    Args:
        keep: `auto` keeps them if they take no more than `KEPT_SHARE` of the GPU's memory.

    Returns:
        What was chosen and why, for people.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and isinstance(m, FSDPModule)]
    groups = [group for group in param_groups(model) if not isinstance(group, _InPlace)]
    gathered = sum(_bytes(param) for group in groups for param in group.fsdp_params)
    kept = keep == "always" or (keep == "auto" and gathered <= KEPT_SHARE * _memory(model.device))
    for layer in layers:
        layer.set_reshard_after_forward(not kept, recurse=False)
    times = "once a pass, and kept for its backward" if kept else "for the forward and again for the backward"
    return f"dense weights: {gathered / 2**30:.2f} GiB, gathered {times}"


def adapt_groups(model: nn.Module) -> None:
    """Let every parameter group of one rank use its weights where they lie, and every other tell how long it waits."""
    for group in param_groups(model):
        in_place = group.mesh_info.mesh.size() == 1 and not any(_needs_copy(param) for param in group.fsdp_params)
        group.__class__ = _InPlace if in_place else _Timed
        if in_place:
            _divide_in_experts(group)


def _divide_in_experts(group: Any) -> None:
    """Let the experts' own arithmetic divide their gradients by the number of data ranks: a pass of 2 * 7 GB less at
    Qwen3-30B-A3B's size over 8 ranks, 7 ms."""
    experts = [module for module in group.modules if hasattr(module, "_moetrain_dispatcher")]
    if len(experts) == len(group.modules) and group.gradient_divide_factor is not None:
        for module in experts:
            setattr(module, GRADIENTS, (1.0 / group.gradient_divide_factor, True))
        group.divided_before = group.gradient_divide_factor


def _needs_copy(param: Any) -> bool:
    """Whether an FSDP parameter is used elsewhere or in another type than it is kept in."""
    return param.offload_to_cpu or param.mp_policy.param_dtype not in (None, param.sharded_param.dtype)


class _InPlace(FSDPParamGroup):
    """A group of one rank: its gathered parameter is a view of its shard."""

    divided_before = 1.0
    """What the experts' arithmetic has already divided the gradients by."""

    def unshard(self, async_op: bool = False) -> None:
        pass

    def wait_for_unshard(self) -> None:
        if self.is_unsharded:
            return
        for param in self.fsdp_params:
            shard = param._sharded_param_data
            if not hasattr(param, "_unsharded_param"):
                param.all_gather_outputs = [shard]
                param.init_unsharded_param()
                param.all_gather_outputs = []  # what is in it would be freed
            whole = getattr(param._unsharded_param, "_local_tensor", param._unsharded_param)
            if whole.data_ptr() != shard.data_ptr():
                # FSDP2 takes it from the start of the storage, but a loaded shard may lie further back in it
                with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(whole):
                    whole.set_(shard.untyped_storage(), shard.storage_offset(), whole.shape, whole.stride())
        self._to_unsharded()

    @torch.no_grad()
    def post_backward(self, *unused: Any) -> None:
        self._training_state = type(self._training_state).POST_BACKWARD
        divisor = (self.gradient_divide_factor or 1.0) / self.divided_before  # not 1 where a user has set the factor
        for param in self.fsdp_params:
            unsharded = getattr(param, "_unsharded_param", None)
            if unsharded is None or unsharded.grad is None:
                continue
            gradient = param.unsharded_grad_data
            unsharded.grad = None
            if divisor != 1.0:
                join_aside()
                gradient.div_(divisor)
            gradient = gradient.view(param.sharded_size)
            accumulated: Any = param.sharded_param.grad
            if accumulated is None:
                # its values may still be on their way, see kernels/aside.py
                param.sharded_param.grad = param.to_sharded_dtensor(gradient)
            else:
                join_aside()
                accumulated._local_tensor += gradient
            hooks = getattr(param.sharded_param, "_post_accumulate_grad_hooks", None)
            if hooks:
                join_aside()
                for hook in hooks.values():
                    hook(param.sharded_param)
        if self.reshard_after_backward:
            self.reshard()


class _Timed(FSDPParamGroup):
    """A group of several ranks. A GPU's computing stream stands still in the two waits, a CPU in all four."""

    def unshard(self, async_op: bool = False) -> None:
        with timed("collective_wait", self.device, many=True):
            super().unshard(async_op)

    def wait_for_unshard(self) -> None:
        with timed("collective_wait", self.device, many=True):
            super().wait_for_unshard()

    def post_backward(self, *unused: Any) -> None:
        with timed("collective_wait", self.device, many=True):
            super().post_backward(*unused)

    def finalize_backward(self) -> None:
        with timed("collective_wait", self.device, many=True):
            super().finalize_backward()


def param_groups(model: nn.Module) -> list[Any]:
    """Every FSDP2 parameter group of a model, in module order."""
    found: list[Any] = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:
                groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
            found += [group for group in groups if group not in found]
    return found


@contextmanager
def detach_streams(model: nn.Module) -> Iterator[None]:
    """Around a capture: forget events of the passes before it, and afterwards those of the capture, which no other
    work can wait for."""
    _forget_events(model)
    try:
        yield
    finally:
        _forget_events(model)


def join_streams(model: nn.Module) -> None:
    """Let the current stream wait for FSDP2's: a capture must end with every stream joined."""
    current = torch.cuda.current_stream()
    for context in _comm_contexts(model):
        for name in ("all_gather_copy_in_stream", "all_gather_stream", "reduce_scatter_stream", "all_reduce_stream"):
            stream = getattr(context, name, None)
            if stream is not None:
                stream.wait_stream(current)  # a stream that has not been used is not part of the capture yet
                current.wait_stream(stream)


def _forget_events(model: nn.Module) -> None:
    for context in _comm_contexts(model):
        context.all_gather_state = None
        if hasattr(context, "reduce_scatter_state"):
            context.reduce_scatter_state = None
        if hasattr(context, "reduce_scatter_states"):
            context.reduce_scatter_states.clear()
        if hasattr(context, "_last_post_reduce_events"):
            context._last_post_reduce_events.clear()
    for group in param_groups(model):
        group._post_reduce_event = group._all_reduce_state = group._reshard_after_forward_event = None


def _comm_contexts(model: nn.Module) -> list[Any]:
    contexts: list[Any] = []
    for group in param_groups(model):
        if hasattr(group, "comm_ctx") and group.comm_ctx not in contexts:
            contexts.append(group.comm_ctx)
    return contexts


def _memory(device: torch.device) -> float:
    """Bytes of a GPU; a CPU has as much as is asked for."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def _bytes(param: Any) -> int:
    size: int = math.prod(param._orig_size) * param.sharded_param.element_size()
    return size
