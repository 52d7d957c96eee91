"""Experts on several ranks, with the part of their exchange that hides well behind their arithmetic.

Tokens go in two halves: while the experts work on the first, the second travels on another stream. In the backward the
tokens' gradients travel back while the parameters' gradients, which no other rank waits for, are computed.

Shapes as in exchange.py; G is the width of the up projection.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from moetrain.kernels.activation import Activation
from moetrain.kernels.exchange import Exchange
from moetrain.kernels.rows import Batch, ExpertWeights, backward_parameters, backward_rows, forward_rows

TOKEN_PROGRAMS, SUM_PROGRAMS = 32, 132
"""Programs that push beside the products. 32 push tokens at 93 % of the links' rate and cost the products a fifth of
that time; sums wait for eight reads each and need more (8 H200)."""


class OverlappedExperts:
    """The experts of a layer of `group`'s ranks. One instance serves all layers of a model, in the order of one stream.

    Args:
        tokens: tokens of every rank in every call, an even number.
        capacity: rows of this rank's experts that there is room for, half of it for each half of the tokens.
    """

    def __init__(
        self, group: dist.ProcessGroup, tokens: int, hidden: int, top_k: int, num_local_experts: int, capacity: int
    ) -> None:
        if tokens % 2:
            raise ValueError(f"tokens go in two halves, and {tokens} is odd; use an even sequence length or batch")
        sizes = (tokens // 2, hidden, top_k, num_local_experts, capacity // 2)
        self.halves = [Exchange(group, *sizes) for _ in range(2)]
        self.stream = torch.cuda.Stream()

    def __call__(
        self,
        x_TH: torch.Tensor,
        index_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        experts: ExpertWeights,
        activation: Activation,
    ) -> torch.Tensor:
        """Sum over k of weight * expert(x) for every token of this rank [T, H]."""
        out_TH: torch.Tensor = _Overlapped.apply(x_TH, weights_TK, index_TK, self, activation, *experts)
        return out_TH

    def post_tokens(
        self, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor | None
    ) -> list[torch.cuda.Event]:
        """Send both halves on the second stream; an event for each that has arrived everywhere."""
        self.stream.wait_stream(torch.cuda.current_stream())
        halves_TK = [None, None] if weights_TK is None else weights_TK.chunk(2)
        arrived = []
        with torch.cuda.stream(self.stream):
            for exchange, x, index, weights in zip(
                self.halves, x_TH.chunk(2), index_TK.chunk(2), halves_TK, strict=True
            ):
                exchange.post_tokens(x, index, weights, TOKEN_PROGRAMS)
                exchange.settle()
                arrived.append(self.stream.record_event())
        return arrived

    def take_sums(self, index_TK: torch.Tensor, weighted: bool, out_TH: torch.Tensor) -> list[torch.Tensor]:
        """Sums of both halves into `out_TH`; the weights of the choices of each half if `weighted`."""
        weights = []
        for exchange, out, index in zip(self.halves, out_TH.chunk(2), index_TK.chunk(2), strict=True):
            weights.append(exchange.take_sums(index, weighted, out)[1])
        return [half for half in weights if half is not None]


class _Overlapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH, weights_TK, index_TK, layer, activation, *experts):  # type: ignore[no-untyped-def]
        x_TH, index_TK, weights = x_TH.contiguous(), index_TK.int(), ExpertWeights(*experts)
        # what the second stream reads must live until this one has waited for it: no temporaries
        fp32_weights_TK = weights_TK.float()
        arrived = layer.post_tokens(x_TH, index_TK, fp32_weights_TK)
        saved = []
        for exchange, event in zip(layer.halves, arrived, strict=True):
            torch.cuda.current_stream().wait_event(event)
            rows_RH, weights_R, routing = exchange.take_rows()
            out_RH, up_RG = forward_rows(rows_RH, weights_R, routing.offsets_E, weights, activation)
            exchange.post_sums(out_RH, None, routing.row_TK)
            saved += [rows_RH, weights_R, up_RG, routing.offsets_E, routing.row_TK]
        for exchange in layer.halves:
            exchange.settle()
        out_TH = torch.empty_like(x_TH)
        layer.take_sums(index_TK, False, out_TH)
        ctx.layer, ctx.activation, ctx.transposed, ctx.dtype = layer, activation, weights.transposed, weights_TK.dtype
        ctx.save_for_backward(index_TK, *saved, *experts[:4])
        return out_TH

    @staticmethod
    def backward(ctx: Any, grad_TH):  # type: ignore[no-untyped-def]
        main, layer = torch.cuda.current_stream(), ctx.layer
        index_TK, *saved = ctx.saved_tensors
        up, down, up_bias, down_bias = saved[10:]
        weights = ExpertWeights(up, down, up_bias, down_bias, ctx.transposed)
        grad_TH = grad_TH.contiguous()
        arrived = layer.post_tokens(grad_TH, index_TK, None)
        batches = []
        for half, (exchange, event) in enumerate(zip(layer.halves, arrived, strict=True)):
            rows_RH, weights_R, up_RG, offsets_E, row_SK = saved[5 * half : 5 * half + 5]
            main.wait_event(event)
            grad_RH = exchange.take_more_rows(row_SK)
            gradients = backward_rows(grad_RH, up_RG, weights_R, offsets_E, weights, ctx.activation)
            batches.append(Batch(rows_RH, weights_R, offsets_E, grad_RH, gradients))
        layer.stream.wait_stream(main)
        with torch.cuda.stream(layer.stream):
            for half, (exchange, batch) in enumerate(zip(layer.halves, batches, strict=True)):
                assert batch.gradients.rows_RH is not None
                row_SK = saved[5 * half + 4]
                exchange.post_sums(batch.gradients.rows_RH, batch.gradients.weights_R, row_SK, SUM_PROGRAMS)
            for exchange in layer.halves:
                exchange.settle()
        parameters: list[torch.Tensor | None] = [None] * 4
        if any(ctx.needs_input_grad[5:9]):
            parameters = backward_parameters(batches, weights)
        main.wait_stream(layer.stream)
        grad_x_TH = torch.empty_like(grad_TH)
        grad_weights_TK = torch.cat(layer.take_sums(index_TK, True, grad_x_TH)).to(ctx.dtype)
        return grad_x_TH, grad_weights_TK, None, None, None, *parameters, None
