"""How the ranks of a run share a model."""

from __future__ import annotations

from typing import NamedTuple


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
