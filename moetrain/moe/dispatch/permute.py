"""Gather tokens into expert order, and sum the rows of a token back: each other's backward, without atomics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Permutation


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TH: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_N, inverse_N)
        ctx.top_k = top_k
        return tokens_TH[order_N // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        order_N, inverse_N = ctx.saved_tensors
        return _Reduce.apply(grads[0], order_N, inverse_N, ctx.top_k), None, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_N, inverse_N)
        ctx.top_k = top_k
        slots_TKH = rows_NH[inverse_N].view(-1, top_k, rows_NH.shape[1])
        return slots_TKH.to(torch.promote_types(rows_NH.dtype, torch.float32)).sum(dim=1).to(rows_NH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        order_N, inverse_N = ctx.saved_tensors
        return _Permute.apply(grads[0], order_N, inverse_N, ctx.top_k), None, None, None


def permute(tokens_TH: Tensor, permutation: Permutation) -> Tensor:
    """Row r is the token of slot `order_N[r]`: [N, H]. The backward sums a token's K rows in fp32 or better."""
    rows: Tensor = _Permute.apply(tokens_TH, permutation.order_N, permutation.inverse_N, permutation.top_k)
    return rows


def unpermute_sum(rows_NH: Tensor, permutation: Permutation) -> Tensor:
    """Sum of each token's K rows in fp32 or better: [T, H] in the type of the rows."""
    tokens: Tensor = _Reduce.apply(rows_NH, permutation.order_N, permutation.inverse_N, permutation.top_k)
    return tokens


def permute_weights(weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """Routing weight of each row: [N]."""
    return weights_TK.reshape(-1)[permutation.order_N]
