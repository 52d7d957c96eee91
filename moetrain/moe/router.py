"""Gates for benchmarks, in the place of the learned routing.

A speed depends on how tokens fall on experts: `random` chooses uniformly, like a perfectly balanced router;
`sequential` gives token t the experts t*k ... t*k + k - 1 (modulo their number), which is exactly balanced but keeps
the k experts of a token on one rank, so that it sends a fraction of the real traffic. Figures name their gate.

Shape suffixes: T tokens, K experts a token, E experts of a layer over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.families import experts_modules

Gate = Callable[[Tensor, int], Tensor]


def set_gate(model: nn.Module, gate: str) -> None:
    """Choose the routing of every experts module: `learned`, `random` or `sequential`.

    With the latter two each weight is 1 / K, and the router still gets a gradient, of zeros. `random` draws from
    torch's default generator, so a seed fixes it, and activation checkpointing, which restores that generator, sees
    the same choice in the recomputation. No host sync.

    Raises:
        ValueError: an unknown gate, or one other than `learned` for a model without experts.
    """
    if gate not in ("learned", *GATES):
        raise ValueError(f"unknown gate {gate!r}; valid: learned, {', '.join(GATES)}")
    modules = experts_modules(model)
    if gate != "learned" and not modules:
        raise ValueError(f"balance.gate={gate} needs a model with experts; set balance.gate=learned")
    for _, experts in modules:
        if (earlier := vars(experts).pop("_moetrain_gate", None)) is not None:
            earlier.remove()
        experts._moetrain_gate_name = gate  # type: ignore[assignment]
        if gate != "learned":
            experts._moetrain_gate = experts.register_forward_pre_hook(  # type: ignore[assignment]
                _replace_routing(GATES[gate], count_experts(experts)), prepend=True
            )


def has_random_gate(model: nn.Module) -> bool:
    """Whether `set_gate` has put in a gate that draws its choices."""
    return any(getattr(experts, "_moetrain_gate_name", "learned") == "random" for _, experts in experts_modules(model))


def count_experts(experts: nn.Module) -> int:
    """Experts of a layer over all ranks. Valid outside the forward: inside, a rank sees its own alone."""
    return next(experts.parameters(recurse=False)).shape[0]


def random_gate(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """K distinct experts for each token, each set as likely as any other."""
    tokens, top_k = expert_ids_TK.shape
    return torch.rand(tokens, num_experts, device=expert_ids_TK.device).topk(top_k, sorted=False).indices


def sequential_gate(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Experts in turn; the loads of two experts differ by one at most."""
    tokens, top_k = expert_ids_TK.shape
    return (torch.arange(tokens * top_k, device=expert_ids_TK.device) % num_experts).view(tokens, top_k)


GATES: dict[str, Gate] = {"random": random_gate, "sequential": sequential_gate}


def _replace_routing(gate: Gate, num_experts: int) -> Callable[..., tuple[Any, ...]]:
    """Forward pre-hook of an experts module, whose arguments are tokens, expert ids and weights."""

    def hook(experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        tokens_TH, expert_ids_TK, weights_TK = args
        equal_TK = weights_TK * 0 + 1 / weights_TK.shape[-1]  # times 0: keeps the router in the graph
        return tokens_TH, gate(expert_ids_TK, num_experts).to(expert_ids_TK.dtype), equal_TK

    return hook
