"""`local`: every expert is on this rank; dispatch is a permutation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Dispatched, Dispatcher, Permutation
from moetrain.moe.dispatch.permute import permute, permute_weights, unpermute_sum


@dataclass(frozen=True)
class _LocalDispatched(Dispatched):
    permutation: Permutation


class LocalDispatcher(Dispatcher):
    """One rank, any number of tokens, no host sync."""

    def dispatch(self, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> _LocalDispatched:
        permutation = Permutation(expert_ids_TK, self.num_experts)
        offsets_e = permutation.counts_E.cumsum(0).to(torch.int32)
        return _LocalDispatched(
            # the mask is for the backward: a grouped product leaves the gradient of unused rows unwritten too
            rows_RH=mask_unused_rows(permute(tokens_TH, permutation), offsets_e),
            offsets_e=offsets_e,
            weights_R=permute_weights(weights_TK, permutation),
            permutation=permutation,
        )

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        assert isinstance(dispatched, _LocalDispatched)
        return unpermute_sum(mask_unused_rows(rows_RH, dispatched.offsets_e), dispatched.permutation)


def mask_unused_rows(rows_RH: Tensor, offsets_e: Tensor) -> Tensor:
    """Zero the rows that no expert wrote, so that they add nothing to a sum."""
    unused_R = torch.arange(rows_RH.shape[0], device=rows_RH.device) >= offsets_e[-1]
    return rows_RH.masked_fill(unused_R.unsqueeze(1), 0)
