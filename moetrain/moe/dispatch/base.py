"""The dispatcher interface: tokens to the ranks of their experts, and the results back.

Shapes in this package: T tokens of this rank, K experts a token is routed to, H hidden size, E experts of the whole
model, e experts of this rank, R rows that this rank's experts compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from moetrain.kernels import Place


@dataclass(frozen=True)
class Dispatched:
    """What `dispatch` brought to this rank's experts, and what `combine` needs to bring their results back.

    Attributes:
        rows_RH: input rows, those of local expert 0 first, then expert 1, ...; at least one row.
        offsets_e: int32, the end of each local expert's rows (inclusive cumulative counts). Rows past
            `offsets_e[-1]` belong to no expert and may hold anything.
        weights_R: routing weight of each row, fp32.
        place: where the rows lie beside those of other layers, `place.at` rows after `rows_RH`; None: in `rows_RH`.
    """

    rows_RH: Tensor
    offsets_e: Tensor
    weights_R: Tensor
    place: Place | None = field(default=None, kw_only=True)


class Dispatcher(ABC):
    """A pair of operations. Both are differentiable, and the backward of each is the communication of the other."""

    waits: str | None = None
    """Why the host waits for the GPU in every call, so that none can be captured; None if it need not."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        """Experts of the whole model, E."""

    @abstractmethod
    def dispatch(self, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Bring every (token, expert) pair to the rank of the expert.

        Args:
            tokens_TH: this rank's tokens.
            expert_ids_TK: int64 global expert ids; E or more means that the slot is not used.
            weights_TK: routing weights.
        """

    @abstractmethod
    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring the weighted expert outputs back and sum them per token, in fp32: [T, H] in the type of the rows.

        Args:
            rows_RH: the experts' outputs, already multiplied by their routing weights, in the order of
                `dispatched.rows_RH`.
        """


class RankedDispatcher(Dispatcher):
    """Experts in contiguous ranges over the ranks of `group`, E / ranks on each.

    Raises:
        ValueError: the group's size does not divide the number of experts.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        super().__init__(num_experts)
        self.group_name = group.group_name
        self.ep_size = dist.get_world_size(group)
        if num_experts % self.ep_size:
            raise ValueError(f"{num_experts} experts cannot be split evenly over {self.ep_size} ranks")
        self.num_local = num_experts // self.ep_size
