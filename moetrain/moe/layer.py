"""The forward of a Mixture-of-Experts layer after its router: dispatch, experts, combine.

It enters Transformers through two registries: as an experts function (`experts_implementation="moetrain"`, all
experts on one rank) and as an expert-parallel implementation (`DistributedConfig(ep_implementation="moetrain")`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moetrain.backends.peft import support_sharded_experts
from moetrain.moe.dispatch import DISPATCHERS, Dispatcher, RankedDispatcher, build_dispatcher
from moetrain.moe.dispatch.local import LocalDispatcher
from moetrain.moe.experts import run_all_experts, run_experts
from moetrain.tape import keep, replaying

NAME = "moetrain"
"""Name in both of Transformers' registries."""


def moe_forward(
    experts: Any, dispatcher: Dispatcher, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Weighted sum of the chosen experts' outputs for each token: [T, H] in the type of the tokens."""
    dispatched = dispatcher.dispatch(tokens_TH, expert_ids_TK, weights_TK)
    # what ranks combine is kept, and the rows it was made of are not read again
    outputs = not (replaying() and isinstance(dispatcher, RankedDispatcher))
    rows_RH = run_experts(
        experts, dispatched.rows_RH, dispatched.offsets_e, dispatched.weights_R, dispatched.place, outputs
    )
    return dispatcher.combine(rows_RH, dispatched)


def local_experts_forward(experts: Any, tokens_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Experts function for models whose experts are all on this rank."""
    out = run_all_experts(experts, tokens_TH, expert_ids_TK, weights_TK, outputs=not replaying())
    if out is None:
        return moe_forward(experts, LocalDispatcher(experts.num_experts), tokens_TH, expert_ids_TK, weights_TK)
    return keep(out)


class MoetrainEP(EPImplementation):
    """Expert parallelism with this package's dispatchers. One instance per experts module."""

    dispatch = "auto"
    """Name of the dispatcher; the subclasses that `register` makes fix the others."""

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        support_sharded_experts(experts, ep_mesh.get_local_rank() * experts.num_experts)
        self.dispatcher = build_dispatcher(self.dispatch, experts.num_experts * ep_mesh.size(), ep_mesh.get_group())
        experts._moetrain_dispatcher = self.dispatcher

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return moe_forward(self.experts, self.dispatcher, hidden_states, top_k_index, top_k_weights)


def ep_implementation(dispatch: str) -> str:
    """Name in Transformers' registry of expert parallelism with the given dispatcher.

    Raises:
        ValueError: an unknown dispatcher.
    """
    if dispatch not in ("auto", *DISPATCHERS):
        raise ValueError(f"unknown dispatch {dispatch!r}; valid: auto, {', '.join(DISPATCHERS)}")
    return NAME if dispatch == "auto" else f"{NAME}_{dispatch}"


def register() -> None:
    """Make `moetrain` and `moetrain_<dispatcher>` valid names in Transformers' registries."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, local_experts_forward)
    EPImplementationInterface.register(NAME, MoetrainEP)
    for dispatch in DISPATCHERS:
        subclass = type(f"MoetrainEP_{dispatch}", (MoetrainEP,), {"dispatch": dispatch})
        EPImplementationInterface.register(ep_implementation(dispatch), subclass)
