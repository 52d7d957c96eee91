"""Bytes on one rank through a step, from a trace and a layout.

The trace says what a pass makes and frees; here are the parameters: their shards and states, which stay, and what
FSDP2 gathers, keeps and reduces while modules are entered and left. The sum over both at the fullest moment is what
`torch.cuda.max_memory_allocated` shows. The rules are those of torch 2.11 to 2.13 and `moetrain.fsdp`:

    forward     a unit's weights, and the flat buffer they were gathered into until the next unit's are there
    backward    a unit's weights, the next unit's buffer, its own whole gradients, the flat buffer that the unit
                before is reduced from; then only the shard of its gradient stays
    the model   what belongs to no smaller unit is gathered all the time, and its whole gradients stay to the end of
                the backward: FSDP2 reduces when a module's inputs have their gradients, and token ids have none
    one rank    a unit that one rank holds alone is used in place; in a captured step the gradients of such experts are
                computed beside the next layer, and what they are computed from stays until then
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

from transformers import PreTrainedModel
from transformers.distributed.fsdp import is_norm_and_head_pair
from transformers.modeling_layers import GradientCheckpointingLayer

from moetrain.config import OptimConfig
from moetrain.families import experts_modules
from moetrain.fsdp import KEPT_SHARE
from moetrain.optim import build_optimizer
from moetrain.plan.constants import FRAGMENTATION, FRAGMENTATION_CAPTURED, OUTSIDE_ALLOCATOR
from moetrain.plan.exchange import buffer_bytes
from moetrain.plan.layout import Layout
from moetrain.plan.trace import Event, StepTrace, sharded_modules

HELD = ("weights", "gradients", "optimizer", "gathered")
"""Kinds of memory that follow from the layout; `moetrain.plan.trace.KINDS` are the others."""


class Parameter(NamedTuple):
    name: str
    shape: tuple[int, ...]
    itemsize: int
    state_bytes: float
    """Of the optimizer, for one element; 0 if it is frozen."""
    in_experts: bool
    trained: bool = True

    def sizes(self, layout: Layout) -> tuple[int, int]:
        """Elements of the whole, of a rank's experts alone, and of the largest shard; with what FSDP2 adds to make
        its first dimension divide."""
        ranks = layout.efsdp if self.in_experts else layout.fsdp
        rows = self.shape[0] if self.shape else 1
        rows = rows // layout.ep if self.in_experts else rows
        shard = -(-rows // ranks) * prod(self.shape[1:])
        return shard * ranks, shard


@dataclass
class Unit:
    """Parameters that FSDP2 gathers and frees together."""

    modules: tuple[str, ...]
    parameters: list[Parameter] = field(default_factory=list)
    freed: bool = True
    """After the forward, unless the run keeps dense weights gathered."""
    is_layer: bool = False
    in_experts: bool = False

    @property
    def name(self) -> str:
        return self.modules[0]

    def ranks(self, layout: Layout) -> int:
        return layout.efsdp if self.in_experts else layout.fsdp

    def whole(self, layout: Layout) -> int:
        """Bytes of its gathered weights, of a rank's experts alone."""
        return sum(parameter.sizes(layout)[0] * parameter.itemsize for parameter in self.parameters)


@dataclass(frozen=True)
class Memory:
    """One rank at its fullest moment. Bytes."""

    kinds: dict[str, int]
    """By `HELD` and `KINDS`; their sum is what torch's allocator has handed out."""
    exchange: int
    """Buffers that other ranks write into, beside the allocator."""
    moment: str
    """What the step does then."""
    captured: bool = False
    """Forward and backward are one CUDA graph."""

    @property
    def allocated(self) -> int:
        """Comparable with `torch.cuda.max_memory_allocated`."""
        return sum(self.kinds.values())

    @property
    def fragmentation(self) -> int:
        """Taken from the GPU, and neither in use nor given back."""
        return round((FRAGMENTATION_CAPTURED if self.captured else FRAGMENTATION) * self.allocated)

    @property
    def needed(self) -> int:
        """What the GPU must have."""
        return self.allocated + self.fragmentation + self.exchange + OUTSIDE_ALLOCATOR


def units_of(model: PreTrainedModel, optim: OptimConfig) -> list[Unit]:
    """The units that FSDP2 makes of a model on the meta device, experts apart from the layers around them."""
    optimizer = build_optimizer(model, optim)
    experts = dict(experts_modules(model))
    styles = sharded_modules(model)
    kept = [(name, model.get_submodule(name)) for name, style in styles.items() if style == "keep_full_weight"]
    units = [Unit((name,), freed=style != "keep_full_weight") for name, style in styles.items()]
    if is_norm_and_head_pair(kept, model):
        units = [unit for unit in units if unit.freed] + [Unit(tuple(name for name, _ in kept), freed=False)]
    units += [Unit((name,), in_experts=True) for name in experts]
    units.append(Unit(("",), freed=False))
    owner = {module: unit for unit in units for module in unit.modules}
    for unit in units:
        unit.is_layer = isinstance(model.get_submodule(unit.modules[0]), GradientCheckpointingLayer)
    for name, parameter in model.named_parameters():
        states = optimizer.state.get(parameter, {}).values()
        state = sum(value.nbytes for value in states if value.shape) / parameter.numel()
        unit = owner[innermost(name, owner)]
        unit.parameters.append(
            Parameter(name, tuple(parameter.shape), parameter.itemsize, state, unit.in_experts, parameter.requires_grad)
        )
    return [unit for unit in units if unit.parameters]


def memory_of(
    trace: StepTrace,
    units: Sequence[Unit],
    layout: Layout,
    *,
    gpu_bytes: float,
    passes: int = 1,
    keep: str = "auto",
    captured: bool = False,
) -> Memory:
    """Memory of a step of `passes` forwards and backwards under a layout.

    Args:
        trace: of one pass; its dispatch must fit `layout.ep`.
        gpu_bytes: of the GPU, which decides what `keep="auto"` does.
        keep: `parallel.keep_gathered` of the run.
        captured: forward and backward are one CUDA graph.
    """
    beside = captured and layout.ep > 1 and layout.efsdp == 1
    held = _Held(units, layout, gpu_bytes, passes, keep, trace.aside if beside else 0)
    best: dict[str, int] = {}
    moment = ""
    for event in trace.events:
        for live in held.through(event):
            kinds = held.kinds() | live
            kinds["workspace"] += held.aside
            if sum(kinds.values()) > sum(best.values()):
                best, moment = kinds, f"{'backward' if event.backward else 'forward'} of {event.name or 'the model'}"
    return Memory(best, buffer_bytes(trace.experts, layout, trace.step.dispatch), moment, captured)


def keeps_gathered(units: Sequence[Unit], layout: Layout, gpu_bytes: float, keep: str) -> bool:
    """Whether layers stay gathered from the forward to the backward: the rule of `moetrain.fsdp.keep_gathered`."""
    gathered = sum(unit.whole(layout) for unit in units if unit.ranks(layout) > 1)
    return keep == "always" or (keep == "auto" and gathered <= KEPT_SHARE * gpu_bytes)


class _Held:
    """What a rank holds of parameters and gradients, event after event."""

    def __init__(
        self, units: Sequence[Unit], layout: Layout, gpu_bytes: float, passes: int, keep: str, aside: int
    ) -> None:
        if layout.ep == 1:
            units = _with_their_layers(units)
        self.layout = layout
        self.unit_of_module = {module: unit for unit in units for module in unit.modules}
        self.unit_of_parameter = {parameter.name: unit for unit in units for parameter in unit.parameters}
        self.kept = keeps_gathered(units, layout, gpu_bytes, keep)
        shards = [(parameter, parameter.sizes(layout)[1]) for unit in units for parameter in unit.parameters]
        self.weights = sum(size * parameter.itemsize for parameter, size in shards)
        self.states = round(sum(size * parameter.state_bytes for parameter, size in shards))
        self.accumulates = passes > 1
        self.aside, self.aside_of_a_layer = 0, aside
        """What the gradients of experts' weights are computed from, beside the layer that runs."""
        self.gradients = sum(size * p.itemsize for p, size in shards if p.trained) if self.accumulates else 0
        self.gathered: dict[str, int] = {}
        self.buffer = self.reduced = 0
        """What was gathered into, and what is being reduced."""
        self.whole_gradients: Counter[str] = Counter()
        self.awaited = {unit.name: {p.name for p in unit.parameters if p.trained} for unit in units}
        self.left: list[Unit] = []
        """Units in the order of their forwards, whose backward has not begun."""

    def kinds(self) -> dict[str, int]:
        gathered = sum(self.gathered.values()) + self.buffer
        gradients = self.gradients + sum(self.whole_gradients.values()) + self.reduced
        return {"weights": self.weights, "gradients": gradients, "optimizer": self.states, "gathered": gathered}

    def through(self, event: Event) -> Iterator[dict[str, int]]:
        """The moments around an event, by what the trace has alive at each."""
        yield event.peak
        if event.what == "gradient":
            unit = self.unit_of_parameter[event.name]
            yield from self._gradient(unit, event)
        elif event.what == "end" and "" in self.whole_gradients:
            yield from self._reduce(self.unit_of_module[""], event)
        elif event.what == "leave" and event.name == "":
            self.buffer = 0
        elif (found := self.unit_of_module.get(event.name)) is not None and event.what in _MODULE_EVENTS:
            _MODULE_EVENTS[event.what](self, found, event.backward)
        yield event.now

    def _enter(self, unit: Unit, backward: bool) -> None:
        if self._is_in_place(unit):
            return
        self.gathered[unit.name] = unit.whole(self.layout)
        if not backward:
            self.buffer = unit.whole(self.layout)

    def _leave(self, unit: Unit, backward: bool) -> None:
        if backward:
            return
        self.left.append(unit)
        if unit.freed and not (self.kept and unit.is_layer):
            self.gathered.pop(unit.name, None)

    def _return(self, unit: Unit, backward: bool) -> None:
        self._enter(unit, backward)
        if unit in self.left:
            self.left.remove(unit)
        ahead = self.left[-1] if self.left else None
        self.buffer = 0 if ahead is None or ahead.name in self.gathered else self._gathers(ahead)
        if unit.in_experts:  # one operator makes all of them
            self.whole_gradients[unit.name] = sum(
                parameter.sizes(self.layout)[0] * parameter.itemsize for parameter in unit.parameters
            )

    def _gradient(self, unit: Unit, event: Event) -> Iterator[dict[str, int]]:
        parameter = next(parameter for parameter in unit.parameters if parameter.name == event.name)
        if not unit.in_experts:
            self.whole_gradients[unit.name] += parameter.sizes(self.layout)[0] * parameter.itemsize
        self.awaited[unit.name].discard(event.name)
        if not self.awaited[unit.name] and unit.name:
            yield from self._reduce(unit, event)

    def _reduce(self, unit: Unit, event: Event) -> Iterator[dict[str, int]]:
        self.gathered.pop(unit.name, None)
        if unit.in_experts:
            self.aside = self.aside_of_a_layer
        if not self._is_in_place(unit):
            self.reduced = unit.whole(self.layout)
            yield event.now
        del self.whole_gradients[unit.name]
        if not self.accumulates:
            self.gradients += sum(p.sizes(self.layout)[1] * p.itemsize for p in unit.parameters if p.trained)

    def _gathers(self, unit: Unit) -> int:
        return 0 if self._is_in_place(unit) else unit.whole(self.layout)

    def _is_in_place(self, unit: Unit) -> bool:
        return unit.ranks(self.layout) == 1


_MODULE_EVENTS = {"enter": _Held._enter, "leave": _Held._leave, "return": _Held._return}


def _with_their_layers(units: Sequence[Unit]) -> list[Unit]:
    """Units of a layout without expert parallelism: experts are sharded as the layers that hold them."""
    dense = [replace(unit, parameters=list(unit.parameters)) for unit in units if not unit.in_experts]
    owner = {module: unit for unit in dense for module in unit.modules}
    for unit in units:
        if unit.in_experts:
            owner[innermost(unit.name, owner)].parameters += [p._replace(in_experts=False) for p in unit.parameters]
    return dense


def innermost(name: str, modules: Container[str]) -> str:
    """The module of `modules` that a module or parameter called `name` is in."""
    path = name.split(".")
    return next(inside for end in range(len(path), -1, -1) if (inside := ".".join(path[:end])) in modules)
