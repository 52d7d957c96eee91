"""Seconds of a step by part, from a trace's operations and a layout's bytes, at rates that were measured.

Computation is counted, not guessed: products by their operations, everything else by the bytes it moves. Dispatch and
combine hide behind nothing (docs/perf-notes.md, section 4: three attempts brought less than 2 %). What FSDP2 gathers
and reduces hides behind computation in part (`constants.HIDDEN`). In every layer the ranks of an expert group wait for
the one with the most rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moetrain.plan import constants
from moetrain.plan.constants import Gpu
from moetrain.plan.exchange import EVEN, STACKED, Balance, passed_bytes, sent_bytes
from moetrain.plan.layout import Layout
from moetrain.plan.memory import Unit, keeps_gathered
from moetrain.plan.trace import ExpertLayer, StepTrace

PARTS = (
    "attention", "dense", "experts", "head", "recurrent", "memory passes",
    "dispatch in node", "dispatch across nodes", "sharding, exposed", "optimizer", "idle",
)  # fmt: skip
"""Of a step, in the order of a table. `idle`: what the GPU waits for an eager step's operators to be issued, or between
the kernels of a captured one."""
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
    balance: Balance = EVEN,
) -> StepTime:
    """Time of a step of `passes` forwards and backwards under a layout.

    Args:
        captured: forward and backward are one CUDA graph, which costs the host nothing.
        balance: the ranks of an expert group wait for the one with the most rows.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    kept = keeps_gathered(units, layout, gpu.memory_bytes, keep)
    for phase in PHASES:
        reduces = phase == "backward"
        gathers = not (reduces and kept)
        computed = _computation(trace, layout, gpu, phase, balance.load)
        computed["memory passes"] += _rows_copied(trace, layout, gpu, phase, balance)
        computed["memory passes"] += (gathers + reduces) * _weights_copied(units, layout, gpu)
        exchanged = _exchange(trace, layout, gpu, phase, balance.gate)
        sharded = gathers * _gathering(units, layout, gpu) + reduces * _reduction(units, layout, gpu)
        busy = sum(computed.values()) + sum(exchanged.values())
        launches = sum(work.launches for (where, _), work in trace.work.items() if where == phase)
        exposed = {"sharding, exposed": max(sharded * (1 - constants.HIDDEN), sharded - busy)}
        idle = launches * constants.GAP_SECONDS if captured else max(launches * constants.LAUNCH_SECONDS - busy, 0.0)
        exposed["idle"] = idle
        for part, seconds in (computed | exchanged | exposed).items():
            parts[part] += passes * seconds
    parts["optimizer"] = _update(units, layout, gpu)
    rows = trace.step.rows_over_mean  # of the rows that are laid out, a rank computes the mean
    flops = passes * sum(work.flops / (rows if part == "experts" else 1.0) for (_, part), work in trace.work.items())
    return StepTime(parts, passes * trace.tokens, flops)


def _computation(trace: StepTrace, layout: Layout, gpu: Gpu, phase: str, load: float) -> dict[str, float]:
    products = gpu.bf16_tflops * 1e12
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
        rows = load / trace.step.rows_over_mean if part == "experts" else 1.0
        computed, moved = work.flops * rows / rates.get(part, products), work.bytes * rows / memory
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


def _exchange(trace: StepTrace, layout: Layout, gpu: Gpu, phase: str, gate: str) -> dict[str, float]:
    """Dispatch and combine."""
    if layout.ep == 1:
        return {}
    share = _NVLINK_SHARES[trace.step.dispatch]
    inside = across = 0.0
    for layer in trace.experts:
        near, far = sent_bytes(layer, layout, trace.step.dispatch, gate)
        over_nvlink = near / (share * gpu.nvlink_gb_s * 1e9)
        over_network = far / (constants.NETWORK * gpu.network_gb_s * 1e9)
        # both go on at the same time
        inside += max(over_nvlink - over_network, 0.0)
        across += over_network
    times = _exchanges(trace, phase)
    return {"dispatch in node": times * inside, "dispatch across nodes": times * across}


_NVLINK_SHARES = {
    "alltoall": constants.ALL_TO_ALL,
    "allgather": constants.COLLECTIVES,
    "nvlink": constants.NVLINK_PUSH,
    "deep_ep": constants.DEEP_EP,
}


def _exchanges(trace: StepTrace, phase: str) -> float:
    """Dispatches and combines of a layer in a phase, the mean over layers. A backward that computes the forward again
    repeats both; `selective` keeps what combine brought, and what a dispatcher brought that may cross nodes
    (`moetrain.tape`)."""
    repeated = {"none": 0, "selective": int(trace.step.dispatch in STACKED), "full": 2}
    share = trace.step.share_recomputed(len(trace.experts))
    return 2 + (share * repeated[trace.step.checkpointing] if phase == "backward" else 0)


def _rows_copied(trace: StepTrace, layout: Layout, gpu: Gpu, phase: str, balance: Balance) -> float:
    """A dispatcher's passes over memory."""
    if layout.ep == 1:
        return 0.0
    moved = sum(passed_bytes(layer, layout, trace.step.dispatch, balance) for layer in trace.experts)
    return _exchanges(trace, phase) / 2 * moved / (constants.PASSES * gpu.memory_gb_s * 1e9)


def _weights_copied(units: Sequence[Unit], layout: Layout, gpu: Gpu) -> float:
    """FSDP2's: it gathers into one buffer and copies the weights out of it, and copies gradients into one."""
    moved = 2 * sum(unit.whole(layout) for unit in units if unit.ranks(layout) > 1)
    return moved / (constants.PASSES * gpu.memory_gb_s * 1e9)


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
    return moved / (constants.UPDATE * gpu.memory_gb_s * 1e9)
