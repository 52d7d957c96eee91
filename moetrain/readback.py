"""The numbers of a step on their way from the device to the host: one all-reduce for sums, one for maxima, one copy.

The host waits for the device once in a step, here. Whatever else wants to know something of a step rides along.

Shape suffixes: L layers with experts, E experts of a layer over all ranks (of the layer that has most).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moetrain import mesh
from moetrain.graph import Passes
from moetrain.metrics import LayerLoads
from moetrain.metrics.device import DeviceTimes, timed
from moetrain.moe.balance import LoadStats


@dataclass(frozen=True)
class StepNumbers:
    """Of a step, all ranks."""

    loss: float
    """Mean over the label tokens."""
    grad_norm: float
    label_tokens: int
    seen_tokens: int
    rows: list[int]
    """For `Passes.make_room`."""
    stop_code: int
    """Greatest of all ranks, for `Guard.agree`."""
    rank_seconds: list[float]
    """What each rank put in."""
    layers: LayerLoads | None
    expert_tokens_LE: NDArray[np.float64] | None
    """Where it was asked for."""


class Readback:
    """Brings a step's numbers to the host.

    Args:
        times: is told what the device has counted.
        expert_matrix: also the tokens of every expert.
    """

    def __init__(
        self,
        passes: Passes,
        stats: LoadStats,
        times: DeviceTimes,
        device: torch.device,
        expert_matrix: bool = False,
    ) -> None:
        self.passes, self.stats, self.times, self.device = passes, stats, times, device
        self.expert_matrix = expert_matrix and bool(stats.names)

    def count(self, labels: int, seen: int) -> Tensor:
        """Tokens of all ranks, [2] on the device: label tokens, and all. The host does not wait for it on a GPU."""
        counts = torch.stack([self._scalar(labels), self._scalar(seen)])
        return over_ranks(counts, dist.ReduceOp.SUM)

    def read(self, loss: Tensor, norm: Tensor, tokens: Tensor, rank_seconds: float, stop_code: int) -> StepNumbers:
        """Close the window of the load, and wait for everything that the step has given the device to do.

        Args:
            loss: this rank's share of the step's loss.
            norm: gradient norm of all ranks.
            tokens: of `count`.
            rank_seconds: what this rank wants the others to know.
            stop_code: `Guard.stop_code`.
        """
        world, shape = mesh.world_size(), self.stats.counts_LE.shape
        seconds = torch.zeros(world, dtype=torch.float64, device=self.device)
        seconds[mesh.rank() :][:1].fill_(rank_seconds)  # an assignment would wait
        counts = self.stats.take().flatten()
        summed = over_ranks(_joined(loss, seconds, counts), dist.ReduceOp.SUM)
        load_LE = summed[1 + world :].view(shape)
        needed = self.passes.needed()
        greatest = over_ranks(_joined(needed, self._scalar(stop_code)), dist.ReduceOp.MAX)
        balance_L4 = self.stats.close(load_LE) if self.stats.names else summed.new_zeros(0)
        parts = [summed[: 1 + world], norm, tokens, self.times.counter, greatest, balance_L4]
        parts += [load_LE] if self.expert_matrix else []
        values = copy_to_host(_joined(*parts))

        cut = np.cumsum([part.numel() for part in parts])
        sums, (grad_norm,), (labels, seen), (waited,), maxima, balance, *matrix = np.split(values, cut[:-1])
        self.times.tell(int(waited))
        return StepNumbers(
            loss=float(sums[0]) / world,
            grad_norm=float(grad_norm),
            label_tokens=int(labels),
            seen_tokens=int(seen),
            rows=[int(value) for value in maxima[:-1]],
            stop_code=int(maxima[-1]),
            rank_seconds=sums[1:].tolist(),
            layers=layer_loads(balance.reshape(-1, 4)) if len(balance) else None,
            expert_tokens_LE=matrix[0].reshape(shape) if matrix else None,
        )

    def _scalar(self, value: float) -> Tensor:
        """By a kernel and not by a copy, which would wait."""
        return torch.full((), value, dtype=torch.float64, device=self.device)


def copy_to_host(values: Tensor) -> NDArray[np.float64]:
    """The one place where a training step's host waits for the device."""
    array: NDArray[np.float64] = values.cpu().numpy()
    return array


def over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """`values` reduced over all ranks, in place."""
    if dist.is_initialized():
        with timed("collective_wait", values.device):
            dist.all_reduce(values, operation)
    return values


def _joined(*parts: Tensor) -> Tensor:
    """Any tensors as one vector, in fp64: it holds counts to 2**53."""
    return torch.cat([part.detach().reshape(-1).double() for part in parts])


def layer_loads(columns_L4: NDArray[np.float64]) -> LayerLoads:
    """The columns of `LoadStats.close` as lists."""
    columns: Sequence[list[float]] = columns_L4.T.tolist()
    most, least, idle, entropy = columns
    return LayerLoads(most, least, [int(count) for count in idle], entropy)
