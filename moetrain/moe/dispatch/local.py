"""`local`: every expert is on this rank; dispatch is a permutation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moetrain.kernels import Routing, permute, route_sort, unpermute_reduce
from moetrain.moe.dispatch.base import Dispatched, Dispatcher


@dataclass(frozen=True)
class _LocalDispatched(Dispatched):
    routing: Routing


class LocalDispatcher(Dispatcher):
    """One rank, any number of tokens, no host sync."""

    def dispatch(self, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> _LocalDispatched:
        routing = route_sort(expert_ids_TK, self.num_experts)
        rows_RH, weights_R = permute(tokens_TH, weights_TK, routing)
        return _LocalDispatched(rows_RH, routing.offsets_E, weights_R, routing)

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        assert isinstance(dispatched, _LocalDispatched)
        return unpermute_reduce(rows_RH, dispatched.routing)
