"""How the ranks of a run share a model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import NamedTuple

from moetrain import mesh
from moetrain.config import RunConfig


class Layout(NamedTuple):
    """Nodes, GPUs of a node, ranks that share the experts, and replicas of the sharded model."""

    nodes: int
    gpus_per_node: int
    ep: int = 1
    replicas: int = 1

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def fsdp(self) -> int:
        """Ranks that dense weights are sharded over."""
        return self.world // self.replicas

    @property
    def efsdp(self) -> int:
        """Ranks that hold the same experts, sharded over one another."""
        return self.fsdp // self.ep

    @property
    def ep_in_node(self) -> int:
        """Ranks of an expert group that lie in one node."""
        return min(self.ep, self.gpus_per_node)

    @property
    def ep_nodes(self) -> int:
        """Nodes that an expert group spans."""
        return -(-self.ep // self.gpus_per_node)

    def why_impossible(self, num_experts: Collection[int]) -> str | None:
        """What its sizes do not divide, in the words of a configuration; None for a layout that can be.

        Args:
            num_experts: of a layer, all numbers that the model has.
        """
        try:
            fsdp = mesh.layout(self.world, self.ep, self.replicas).fsdp_size
            for count in num_experts:
                mesh.check_ep_divides(count, self.ep, fsdp)
        except ValueError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Choices:
    """What is fixed; None is chosen by the plan."""

    ep: int | None = None
    replicas: int | None = None
    batch: int | None = None
    checkpointing: str | None = None

    @classmethod
    def of(cls, config: RunConfig) -> Choices:
        """All of them, as a configuration says."""
        parallel, data, model = config.parallel, config.data, config.model
        return cls(parallel.ep_size, parallel.dp_replicate_size, data.batch_size, model.activation_checkpointing)

    def allow(self, way: Choices) -> bool:
        """Whether a way, of which everything is fixed, is among the choices."""
        return all(choice in (None, its) for choice, its in zip(astuple(self), astuple(way), strict=True))


FREE = Choices()
"""Everything is chosen by the plan."""


def possible_layouts(nodes: int, gpus_per_node: int, num_experts: Collection[int], choices: Choices) -> list[Layout]:
    """Layouts whose sizes divide ranks and experts, none where the choices rule all out.

    Replicas that are not chosen hold whole nodes, or where that leaves no layout, parts of one.
    """
    world, ep = nodes * gpus_per_node, choices.ep
    for replicas in ([choices.replicas],) if choices.replicas else (_divisors(nodes), _divisors(world)):
        sizes = [(size, many) for many in replicas for size in ([ep] if ep else _divisors(world // many))]
        layouts = [Layout(nodes, gpus_per_node, size, many) for size, many in sizes]
        if found := [layout for layout in layouts if layout.why_impossible(num_experts) is None]:
            return found
    return []


def why_none(nodes: int, gpus_per_node: int, num_experts: Collection[int], choices: Choices) -> str:
    """Why `possible_layouts` finds none, and what a chosen size can be instead: the words of `moetrain plan`."""
    flags = {"--ep": choices.ep, "--replicas": choices.replicas}
    chosen = {flag: size for flag, size in flags.items() if size}
    machine, world = (nodes, gpus_per_node, num_experts), nodes * gpus_per_node
    others = {
        "--ep": sorted({layout.ep for layout in possible_layouts(*machine, Choices(replicas=choices.replicas))}),
        "--replicas": [many for many in _divisors(world) if possible_layouts(*machine, Choices(choices.ep, many))],
    }
    remedies = [f"{flag} can be {', '.join(map(str, others[flag]))}" for flag in chosen if others[flag]]
    return (
        f"no layout of {world} ranks has {' '.join(f'{flag} {size}' for flag, size in chosen.items())} "
        f"(experts of a layer: {', '.join(map(str, sorted(num_experts)))}); "
        + (", or ".join(remedies) or f"set {' and '.join(chosen)} to auto")
    )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
