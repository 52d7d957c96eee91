"""Load of the experts: its statistics, the update of correction biases, and the models' auxiliary loss.

Shape suffixes: L layers with experts, E experts of a layer over all ranks (of the layer that has most), T tokens,
K experts a token.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from moetrain.families import experts_modules
from moetrain.moe.router import count_experts

CORRECTION_BIASES = ("e_score_correction_bias", "expert_bias")
"""Names of what routers add to their scores for the choice of experts alone."""


@dataclass(frozen=True)
class LayerLoad:
    """Tokens of one layer's experts over a step, all ranks."""

    name: str
    """The experts module."""
    max_over_mean: float
    """Busiest expert over the mean; 1 is perfect."""
    min_over_mean: float
    """Least busy expert over the mean."""
    idle_experts: int
    """Experts without a token."""
    entropy: float
    """Of the load over experts, as a share of its maximum ln E; 1 is perfect."""


@dataclass(frozen=True)
class Load:
    """A step's load in brief; None throughout for a model without experts."""

    max_over_mean: float | None
    """Of the worst layer."""
    idle_experts: int | None
    """Summed over layers."""
    entropy: float | None
    """Of the worst layer."""
    layers: list[LayerLoad]


class LoadStats:
    """Counts the tokens that each expert of a model gets, on the device, from the router's choices.

    The counts of all passes add up until `read`. A recomputation for activation checkpointing counts nothing.
    """

    def __init__(self, names: list[str], experts: list[int], device: torch.device) -> None:
        self.names, self.experts = names, experts
        self.counts_LE = torch.zeros(len(names), max(experts, default=0), device=device)
        """Since the last `read`, this rank. fp32 counts exactly to 2**24."""
        self.load_LE: Tensor | None = None
        """Of the window that was closed last, all ranks, until a `BiasUpdate` takes it."""
        self._experts_L1 = torch.tensor(experts, dtype=torch.float64, device=device).unsqueeze(1)
        self._counting = True

    @classmethod
    def attach(cls, model: nn.Module) -> LoadStats:
        """Start counting in every experts module of a model, sharded or not; after `set_gate` or before."""
        modules = experts_modules(model)
        experts = [count_experts(module) for _, module in modules]
        device = next(modules[0][1].parameters()).device if modules else torch.device("cpu")
        stats = cls([name for name, _ in modules], experts, device)
        for layer, (_, module) in enumerate(modules):
            module.register_forward_pre_hook(stats._counter(layer, experts[layer]))
        return stats

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, for instance in an evaluation, nothing is counted."""
        counting, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = counting

    def read(self, group: dist.ProcessGroup | None = None) -> Load:
        """Close the window: the load since the last call, over all ranks. One all-reduce and one copy to the host.

        Args:
            group: the ranks that have tokens of their own; None is all.
        """
        if not self.names:
            return Load(None, None, None, [])
        counts_LE = self.take()
        if dist.is_initialized():
            dist.all_reduce(counts_LE, group=group)
        rows = self.close(counts_LE).tolist()
        layers = [
            LayerLoad(name, most, least, int(idle), entropy)
            for name, (most, least, idle, entropy) in zip(self.names, rows, strict=True)
        ]
        return Load(
            max(layer.max_over_mean for layer in layers),
            sum(layer.idle_experts for layer in layers),
            min(layer.entropy for layer in layers),
            layers,
        )

    def take(self) -> Tensor:
        """Tokens of this rank since the last call, [L, E]; counting begins anew. For those who sum it over the ranks
        with other numbers, and then `close` the window."""
        counts_LE = self.counts_LE.clone()
        self.counts_LE.zero_()
        return counts_LE

    def close(self, load_LE: Tensor) -> Tensor:
        """The balance of a window, on the device: [L, 4], fp64, the columns of `LayerLoad`.

        Args:
            load_LE: of all ranks; a `BiasUpdate` takes it from here.
        """
        self.load_LE = load_LE.float()
        load_LE = load_LE.double()
        exists_LE = torch.arange(load_LE.shape[1], device=load_LE.device) < self._experts_L1
        share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp(min=1.0)
        columns = (
            share_LE.amax(1, keepdim=True) * self._experts_L1,
            share_LE.masked_fill(~exists_LE, math.inf).amin(1, keepdim=True) * self._experts_L1,
            ((load_LE == 0) & exists_LE).sum(1, keepdim=True),
            -torch.xlogy(share_LE, share_LE).sum(1, keepdim=True) / self._experts_L1.clamp(min=2).log(),
        )
        return torch.cat(columns, dim=1)

    def discard(self) -> None:
        """Forget what was counted since the last `read`."""
        self.counts_LE.zero_()

    def _counter(self, layer: int, experts: int) -> Callable[..., None]:
        """Forward pre-hook of an experts module, whose arguments are tokens, expert ids [T, K] and weights."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._counting and not _in_backward():
                ids = args[1].detach().flatten().float()
                self.counts_LE[layer, :experts] += torch.histc(ids, bins=experts, min=0, max=experts - 1)

        return hook


class BiasUpdate:
    """Balance without an auxiliary loss (arXiv 2408.15664, used by DeepSeek-V3, arXiv 2412.19437).

    After each optimizer step the bias that a router adds to its scores when it chooses experts goes up by `rate` for
    experts with less than the mean load and down for those with more. Every rank computes the same from the load of
    all ranks, so replicas stay equal.

    Biases become fp32: steps of 0.001 vanish in bf16 beside values above 0.25.

    Args:
        stats: of the same model.

    Raises:
        ValueError: no router of the model has such a bias, or one is sharded in bf16.
    """

    def __init__(self, model: nn.Module, rate: float, stats: LoadStats) -> None:
        self.rate, self.stats = rate, stats
        self._biases = [
            (layer, owner, name)
            for layer, experts_name in enumerate(stats.names)
            for owner, name in _correction_biases(model.get_submodule(experts_name.rpartition(".")[0]))
        ]
        if not self._biases:
            raise ValueError(
                f"balance.bias_update_rate={rate} needs routers with a correction bias, and {type(model).__name__} has "
                "none; set it to 0, and balance.aux_loss_coef if the model has an auxiliary loss"
            )
        for _, owner, name in self._biases:
            _make_fp32(owner, name)

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by the load that the latest `stats.read` closed. Once after each `read`."""
        load_LE = self.stats.load_LE
        if load_LE is None:
            raise RuntimeError("BiasUpdate.step needs a LoadStats.read before it, one for each step")
        self.stats.load_LE = None
        for layer, owner, name in self._biases:
            load_E = load_LE[layer, : self.stats.experts[layer]]
            bias = getattr(owner, name)
            change = (self.rate * torch.sign(load_E.mean() - load_E)).view(bias.shape)
            if isinstance(bias, DTensor):
                change = distribute_tensor(change, bias.device_mesh, bias.placements, src_data_rank=None)
            bias.add_(change)


def set_aux_loss(model: PreTrainedModel, coef: float | None, grad_accum: int = 1) -> str:
    """Turn the model's own load-balancing loss on or off and set its coefficient.

    The families that have one add `coef * aux` to the loss inside their forward, from the router's choices of that
    pass on that rank (Switch Transformer, arXiv 2101.03961: experts times the sum over experts of the share of choices
    times the mean probability, the layers' tokens concatenated). The term is not divided by `num_items_in_batch`.
    Over a step it must be averaged over passes: gradients are averaged over the data ranks but summed over passes,
    hence the division by `grad_accum` here. The loss of the tokens must then carry its whole normalisation in
    `num_items_in_batch`; a factor on the returned loss would scale the auxiliary term too.

    Args:
        coef: None keeps what the model's configuration says; 0 turns the loss off.
        grad_accum: passes in a step.

    Returns:
        What is in force, for people.

    Raises:
        ValueError: a coefficient above 0 for a family without an auxiliary loss.
    """
    config = model.config.get_text_config()
    own_attribute = hasattr(model, "router_aux_loss_coef")
    if not own_attribute and "router_aux_loss_coef" not in inspect.getsource(type(model).forward):
        if coef:
            raise ValueError(
                f"balance.aux_loss_coef={coef} has no meaning for {type(model).__name__}, which has no auxiliary loss; "
                "leave it out, and use balance.bias_update_rate if its routers have a correction bias"
            )
        return "auxiliary loss: none in this family"
    if coef is None:
        coef = config.router_aux_loss_coef if config.output_router_logits else 0.0
    config.output_router_logits = coef > 0
    if coef == 0:
        return "auxiliary loss: off"
    # where the model has a copy of the coefficient, the configuration keeps the user's, for the exported checkpoint
    config.router_aux_loss_coef = coef if own_attribute else coef / grad_accum
    if own_attribute:
        model.router_aux_loss_coef = coef / grad_accum  # type: ignore[assignment]
    return f"auxiliary loss: coefficient {coef:g}" + (f" over {grad_accum} passes" if grad_accum > 1 else "")


def _correction_biases(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Module and attribute of the correction bias in a Mixture-of-Experts block: its router's or its own."""
    return [
        (module, name)
        for module in block.modules()
        for name in CORRECTION_BIASES
        if name in module._parameters or name in module._buffers
    ]


def _make_fp32(owner: nn.Module, name: str) -> None:
    bias = getattr(owner, name)
    if bias.dtype == torch.float32:
        return
    if isinstance(bias, DTensor):
        raise ValueError(
            f"the routers' {name} is sharded in {bias.dtype}, where updates vanish; set model.dtype=float32 or "
            "balance.bias_update_rate=0"
        )
    bias.data = bias.data.float()


def _in_backward() -> bool:
    """Whether autograd runs: a forward in it is a recomputation."""
    return torch._C._current_graph_task_id() != -1
