"""Seconds of a step by part, from a trace's operations and a layout's bytes, at rates that were measured.

Computation is counted, not guessed: products by their operations, everything else by the bytes it moves. Dispatch and
combine hide behind nothing (docs/perf-notes.md, section 4: three attempts brought less than 2 %). What FSDP2 gathers
and reduces hides behind computation in part (`constants.HIDDEN`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb

from moetrain.plan import constants
from moetrain.plan.constants import Gpu
from moetrain.plan.memory import Layout, Unit, keeps_gathered
from moetrain.plan.trace import ExpertLayer, StepTrace

PARTS = (
    "attention", "dense", "experts", "head", "recurrent", "memory passes",
    "dispatch in node", "dispatch across nodes", "sharding, exposed", "optimizer", "host",
)  # fmt: skip
"""Of a step, in the order of a table. `host`: what the GPU waits for an eager step's operators to be issued."""
PHASES = ("forward", "backward")


@dataclass(frozen=True)
class StepTime:
    """Of a whole step: all passes and the update."""

    parts: dict[str, float]
    """Seconds by `PARTS`."""
    tokens: int
    """Of one rank."""
    flops: float
    """Of one rank, those of recomputation included."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float:
        """Of one GPU."""
        return self.flops / self.seconds / 1e12


def time_of(
    trace: StepTrace,
    units: Sequence[Unit],
    layout: Layout,
    gpu: Gpu,
    *,
    passes: int = 1,
    keep: str = "auto",
    captured: bool = True,
) -> StepTime:
    """Time of a step of `passes` forwards and backwards under a layout.

    Args:
        captured: forward and backward are one CUDA graph, which costs the host nothing.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    gathers = 1 if keeps_gathered(units, layout, gpu.memory_bytes, keep) else 2
    for phase in PHASES:
        computed = _computation(trace, layout, gpu, phase)
        exchanged = _exchange(trace, layout, gpu, phase)
        sharded = _gathering(units, layout, gpu) if phase == "forward" or gathers == 2 else 0.0
        sharded += _reduction(units, layout, gpu) if phase == "backward" else 0.0
        busy = sum(computed.values()) + sum(exchanged.values())
        launches = sum(work.launches for (where, _), work in trace.work.items() if where == phase)
        exposed = {"sharding, exposed": max(sharded * (1 - constants.HIDDEN), sharded - busy)}
        if not captured:
            exposed["host"] = max(launches * constants.LAUNCH_SECONDS - busy, 0.0)
        for part, seconds in (computed | exchanged | exposed).items():
            parts[part] += passes * seconds
    parts["optimizer"] = _update(units, layout, gpu)
    flops = passes * sum(work.flops for work in trace.work.values())
    return StepTime(parts, passes * trace.tokens, flops)


def _computation(trace: StepTrace, layout: Layout, gpu: Gpu, phase: str) -> dict[str, float]:
    products = gpu.bf16_tflops * 1e12 * constants.SUSTAINED
    memory = gpu.memory_gb_s * 1e9 * constants.PASSES
    rates = {
        "cudnn attention": constants.CUDNN_ATTENTION[phase] * products,
        "attention": constants.FLASH_ATTENTION[phase] * products,
        "dense": constants.DENSE * products,
        "experts": experts_share(trace.experts, layout) * products,
        "head": constants.HEAD * products,
        "recurrent": constants.RECURRENT * products,
        "fp32": constants.FP32_TFLOPS * 1e12,
    }
    seconds = dict.fromkeys(("attention", "dense", "experts", "head", "recurrent", "memory passes"), 0.0)
    for (where, part), work in trace.work.items():
        if where != phase:
            continue
        # of the rows that are laid out, experts compute those that hold a token
        used = trace.step.rows_over_mean if part == "experts" else 1.0
        computed, moved = work.flops / used / rates.get(part, products), work.bytes / used / memory
        if part == "recurrent":
            seconds[part] += max(computed, moved)
        else:
            seconds["memory passes"] += moved
            seconds[_SHOWN_AS.get(part, part)] += computed
    return seconds


_SHOWN_AS = {"cudnn attention": "attention", "fp32": "dense", "passes": "memory passes"}
"""Parts of a trace that a plan shows with others."""


def experts_share(layers: Sequence[ExpertLayer], layout: Layout) -> float:
    """Share of the datasheet's rate that grouped products reach, by the rows of an expert."""
    if not layers:
        return constants.DENSE
    rows = min(layer.tokens * layer.top_k * layout.ep / layer.num_experts for layer in layers)
    known = constants.EXPERTS
    for (fewer, slow), (more, fast) in pairwise(known):
        if rows <= more:
            return slow + (fast - slow) * max(rows - fewer, 0.0) / (more - fewer)
    return known[-1][1]


def _exchange(trace: StepTrace, layout: Layout, gpu: Gpu, phase: str) -> dict[str, float]:
    """Dispatch and combine: two exchanges in a phase, two more where a backward recomputes them."""
    if layout.ep == 1:
        return {}
    times = 4 if phase == "backward" and trace.step.checkpointing == "full" else 2
    inside = across = 0.0
    for layer in trace.experts:
        near, far = exchanged_bytes(layer, layout, once_per_rank=trace.step.dispatch == "nvlink")
        share = constants.NVLINK_PUSH if trace.step.dispatch == "nvlink" else constants.ALL_TO_ALL
        over_nvlink = near / (share * gpu.nvlink_gb_s * 1e9)
        over_network = far / (constants.NETWORK * gpu.network_gb_s * 1e9)
        # both go on at the same time
        inside += max(over_nvlink - over_network, 0.0)
        across += over_network
    return {"dispatch in node": times * inside, "dispatch across nodes": times * across}


def exchanged_bytes(layer: ExpertLayer, layout: Layout, once_per_rank: bool) -> tuple[float, float]:
    """Bytes that a rank sends to ranks of its node and of others in one exchange.

    Args:
        once_per_rank: a token goes once to each rank that holds any of its experts, not once to each expert.
    """
    ranks = layout.ep
    copies = distinct_ranks(layer.num_experts, layer.top_k, ranks) if once_per_rank else float(layer.top_k)
    per_rank = layer.tokens * copies / ranks * layer.hidden * layer.token_bytes
    near = min(ranks, layout.gpus_per_node)
    return per_rank * (near - 1), per_rank * (ranks - near)


def distinct_ranks(num_experts: int, top_k: int, ranks: int) -> float:
    """Ranks among `ranks` that hold any of `top_k` experts drawn without replacement, on average."""
    elsewhere = num_experts - num_experts // ranks
    return ranks * (1 - comb(elsewhere, top_k) / comb(num_experts, top_k))


def _gathering(units: Sequence[Unit], layout: Layout, gpu: Gpu) -> float:
    return sum(_collective(unit.whole(layout), unit.ranks(layout), layout, unit, gpu) for unit in units)


def _reduction(units: Sequence[Unit], layout: Layout, gpu: Gpu) -> float:
    """Reduce-scatter of gradients, and the all-reduce of the shards over the replicas."""
    seconds = _gathering(units, layout, gpu)
    if layout.replicas > 1:
        shards = sum(p.sizes(layout)[1] * p.itemsize for unit in units for p in unit.parameters)
        moved = 2 * shards * (layout.replicas - 1) / layout.replicas
        within = layout.fsdp < layout.gpus_per_node
        rate = constants.COLLECTIVES * gpu.nvlink_gb_s if within else constants.NETWORK * gpu.network_gb_s
        seconds += moved / (rate * 1e9)
    return seconds


def _collective(whole: int, ranks: int, layout: Layout, unit: Unit, gpu: Gpu) -> float:
    """An all-gather or reduce-scatter of `whole` bytes over `ranks`. NVLink brings a rank all of it; where ranks lie in
    several nodes, every node gets it once through the ports of those of its GPUs that take part."""
    if ranks == 1:
        return 0.0
    stride = layout.ep if unit.in_experts else 1  # ranks that hold the same experts lie `ep` apart
    in_node = max(layout.gpus_per_node // stride, 1)
    received = whole * (ranks - 1) / ranks
    inside = received / (constants.COLLECTIVES * gpu.nvlink_gb_s * 1e9) if in_node > 1 else 0.0
    if ranks <= in_node:
        return inside
    return max(inside, received / (min(in_node, ranks) * constants.NETWORK * gpu.network_gb_s * 1e9))


def _update(units: Sequence[Unit], layout: Layout, gpu: Gpu) -> float:
    """Gradients are read twice (their norm, then the update), parameters and states are read and written."""
    moved = sum(
        p.sizes(layout)[1] * (4 * p.itemsize + 2 * p.state_bytes)
        for unit in units
        for p in unit.parameters
        if p.trained
    )
    return moved / (constants.PASSES * gpu.memory_gb_s * 1e9)
