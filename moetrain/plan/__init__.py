"""Memory, time and goodput of a run before it is launched, and one of its ranks simulated alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from moetrain.config import RunConfig
    from moetrain.plan.search import Plan

__all__ = ["expected_tokens_per_second", "plan_run"]


def plan_run(config: RunConfig, nodes: int, gpus_per_node: int, gpu: str) -> Plan:
    """The plan of a run in the layout that its configuration says; `.render()` is its text.

    Args:
        gpu: key of `moetrain.plan.constants.GPUS`.

    Raises:
        ValueError: an unknown GPU, sizes that do not divide ranks or experts, or a model that cannot be planned.
    """
    from moetrain.plan.layout import Choices  # not before it is needed: it brings torch
    from moetrain.plan.search import Machine, make_plan

    return make_plan(config, Machine(nodes, gpus_per_node, gpu), Choices.of(config))


def expected_tokens_per_second(
    config: RunConfig, model_config: PreTrainedConfig, gpu: str, world_size: int
) -> float | None:
    """Tokens a second of one GPU that a plan expects of a run, or None; see `moetrain.plan.expected`."""
    from moetrain.plan import expected  # not before it is needed: it brings torch

    return expected.expected_tokens_per_second(config, model_config, gpu, world_size)
