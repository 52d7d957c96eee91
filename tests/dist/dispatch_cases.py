"""Ranks' work for the dispatch tests: a plain reference with every expert in one process, and random routings."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.dispatch import build_dispatcher

HIDDEN = 6
STATIC = ("allgather", "nvlink")
"""Dispatchers that need the same number of tokens on every rank."""


def routing(kind: str, num_tokens: int, top_k: int, num_experts: int, seed: int) -> Tensor:
    """int64 [T, K] distinct experts per token, in the manner that `kind` names."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    if kind == "skewed":  # nearly everything goes to the first experts
        scores[:, :top_k] += 2.0
    if kind == "last_rank":  # nothing for the first half of the experts
        scores[:, num_experts // 2 :] += 2.0
    ids = scores.topk(top_k, dim=1).indices
    if kind == "holes":  # slots that name no expert
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, num_experts)
    return ids


def expert_function(rows: Tensor, weights: Tensor, scale_of_row: Tensor) -> Tensor:
    """A nonlinear expert whose result depends on which expert it is."""
    return torch.tanh(rows * scale_of_row.unsqueeze(1)) * weights.unsqueeze(1)


class _Poisoned(torch.autograd.Function):
    """NaN in the rows that no expert owns, in values and gradients: they must not reach any result."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, used: int) -> Tensor:
        ctx.used = used
        return torch.cat([rows[:used], torch.full_like(rows[used:], float("nan"))])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat([grads[0][: ctx.used], torch.full_like(grads[0][ctx.used :], float("nan"))]), None


def reference(tokens: Tensor, ids: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """Slot by slot, no permutation, no communication."""
    out = torch.zeros_like(tokens)
    for k in range(ids.shape[1]):
        used = ids[:, k] < scales.shape[0]
        scale = scales[ids[:, k].clamp(max=scales.shape[0] - 1)]
        out = out + torch.where(used.unsqueeze(1), expert_function(tokens, weights[:, k], scale), 0.0)
    return out


def dispatch_differences(
    rank: int, world_size: int, name: str, cases: list[tuple[str, int, int, int]]
) -> dict[tuple[str, int, int, int], float]:
    """Largest difference from the reference in output and in the gradients of tokens, weights and expert parameters."""
    group = dist.group.WORLD if world_size > 1 else None
    results = {}
    for case in cases:
        kind, num_tokens, top_k, num_experts = case
        # ranks hold different numbers of tokens, one of them none, where the dispatcher allows it
        mine = num_tokens + (0 if name in STATIC else rank)
        mine = 0 if (kind == "empty_rank" and rank == 0) else mine
        ids = routing(kind, mine, top_k, num_experts, seed=rank)
        generator = torch.Generator().manual_seed(100 + rank)
        tokens = torch.randn(mine, HIDDEN, generator=generator, dtype=torch.float64)
        weights = torch.rand(mine, top_k, generator=generator, dtype=torch.float64)
        scales = torch.linspace(0.5, 2.0, num_experts, dtype=torch.float64)
        upstream = torch.randn(mine, HIDDEN, generator=generator, dtype=torch.float64)

        leaves = [tokens.clone().requires_grad_(), weights.clone().requires_grad_(), scales.clone().requires_grad_()]
        expected = reference(leaves[0], ids, leaves[1], leaves[2])
        (expected * upstream).sum().backward()
        scale_grad = torch.zeros_like(scales) if leaves[2].grad is None else leaves[2].grad.clone()
        dist.all_reduce(scale_grad)

        num_local = num_experts // world_size
        local = slice(rank * num_local, (rank + 1) * num_local)
        ours = [
            tokens.clone().requires_grad_(),
            weights.clone().requires_grad_(),
            scales[local].clone().requires_grad_(),
        ]
        dispatcher = build_dispatcher(name, num_experts, group)
        dispatched = dispatcher.dispatch(ours[0], ids, ours[1])
        ends = dispatched.offsets_e.tolist()
        counts = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)])
        scale_of_row = torch.repeat_interleave(ours[2], counts)
        rows = _Poisoned.apply(dispatched.rows_RH, ends[-1])
        used = expert_function(rows[: ends[-1]], dispatched.weights_R[: ends[-1]], scale_of_row)
        rest = rows.shape[0] - ends[-1]
        output = dispatcher.combine(
            _Poisoned.apply(torch.cat([used, used.new_zeros(rest, HIDDEN)]), ends[-1]), dispatched
        )
        (output * upstream).sum().backward()

        pairs = [
            (output, expected),
            (ours[0].grad, leaves[0].grad),
            (ours[1].grad, leaves[1].grad),
            (ours[2].grad, scale_grad[local]),
        ]
        results[case] = max(
            (0.0 if got is None else (got - torch.zeros_like(got) if want is None else got - want).abs().max().item())
            if got is not None and got.numel()
            else 0.0
            for got, want in pairs
        )
    return results
