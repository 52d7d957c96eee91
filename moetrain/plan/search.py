"""The layouts of a run that fit its GPUs, the fastest first; and what to change when none does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from itertools import islice
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from moetrain import families
from moetrain.config import RunConfig
from moetrain.graph import MARGIN, STACK_MARGIN
from moetrain.plan import constants
from moetrain.plan.constants import GPUS, Gpu
from moetrain.plan.exchange import CAPTURED, OF_ALL_RANKS, STACKED, STATIC, Balance
from moetrain.plan.goodput import Goodput, goodput_of
from moetrain.plan.layout import FREE, Choices, Layout, possible_layouts, why_none
from moetrain.plan.memory import Memory, memory_of, units_of
from moetrain.plan.shapes import find_config, meta_builder
from moetrain.plan.spread import DISPATCHERS
from moetrain.plan.step_time import StepTime, time_of
from moetrain.plan.trace import RANKS, Step, StepTrace, trace_step

BATCHES = (1, 2, 4, 8)
CHECKPOINTING = ("none", "selective", "full")
EIGHTHS = 8
"""Parts of the layers, in which the fewest that must be checkpointed are looked for: three traces."""
WORTH_A_BATCH = 1.01
"""A larger batch that gains less is not looked for."""


@dataclass(frozen=True)
class Machine:
    """Where a run would go."""

    nodes: int
    gpus_per_node: int = 8
    gpu: str = "h100-80gb"
    storage_gb_s: float = constants.STORAGE_GB_S
    restart_seconds: float = constants.RESTART_SECONDS

    @property
    def kind(self) -> Gpu:
        return GPUS[self.gpu]


@dataclass(frozen=True)
class Candidate:
    """One way to run, and what it takes."""

    layout: Layout
    step: Step
    captured: bool
    memory: Memory
    time: StepTime
    fits: bool


@dataclass(frozen=True)
class Change:
    """One change to a run that does not fit, and the least memory it would take then."""

    what: str
    candidate: Candidate


@dataclass(frozen=True)
class Plan:
    """What `moetrain plan` says."""

    config: RunConfig
    machine: Machine
    parameters: int
    fitting: list[Candidate]
    """The fastest first, and no more than were asked for."""
    smallest: Candidate
    """Of all that were looked at, the one with the least memory."""
    own: Candidate | None
    """As the configuration says, fitting or not; None where the choices contradict it, or its layout cannot be."""
    why_not_own: str | None
    """Why the configuration's own layout cannot be on this machine."""
    changes: list[Change]
    """Where nothing fits."""
    goodput: Goodput
    loss: str

    @property
    def best(self) -> Candidate:
        return self.fitting[0] if self.fitting else self.smallest

    def render(self, width: int = 100) -> str:
        """The text that `moetrain plan` prints, without colours."""
        from moetrain.plan.show import print_plan  # which knows this class

        out = StringIO()
        print_plan(self, Console(file=out, width=width, color_system=None))
        return out.getvalue()


def make_plan(
    config: RunConfig,
    machine: Machine,
    choices: Choices = FREE,
    top: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Look at every layout of a run on a machine.

    Args:
        top: so many of those that fit are wanted.
        progress: called with a line when something that takes a second begins.

    Raises:
        ValueError: an unknown GPU, chosen sizes that do not divide ranks or experts, or a model that cannot be planned.
    """
    if machine.gpu not in GPUS:
        raise ValueError(f"unknown GPU {machine.gpu!r}; valid: {', '.join(GPUS)}")
    planner = Planner(config, machine, progress=progress)
    why_not_own = planner.why_not_own(choices)
    if why_not_own and choices == Choices.of(config):
        raise ValueError(why_not_own)
    found = list(planner.candidates(choices))
    fitting = list(planner.confirmed(found, top))
    if choices.checkpointing is None and config.model.checkpointed_layers is None:
        fitting = _fastest([*fitting, *planner.with_fewer_layers(fitting)])[:top]
    smallest = planner.exact(min(found, key=lambda c: c.memory.needed))
    best = fitting[0] if fitting else smallest
    return Plan(
        config=config,
        machine=machine,
        parameters=planner.parameters,
        fitting=fitting,
        smallest=smallest,
        own=None if why_not_own else planner.own(choices),
        why_not_own=why_not_own,
        changes=[] if fitting else list(_changes(planner, choices))[:3],
        goodput=goodput_of(planner.units, best.layout, machine.storage_gb_s, machine.restart_seconds),
        loss=planner.trace(best.step).loss,
    )


class Planner:
    """A model on a machine: traces are made once for each step, and serve every layout."""

    def __init__(
        self,
        config: RunConfig,
        machine: Machine,
        traces: dict[Step, StepTrace] | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.config, self.machine, self.progress = config, machine, progress
        self.build = meta_builder(find_config(config.model), config.model)
        model = self.build()
        self.parameters = model.num_parameters()
        self.units = units_of(model, config.optim)
        self.layers = len(families.outermost_layers(model.get_decoder()))
        self.num_experts = _expert_counts(model)
        self.traces = {} if traces is None else traces

    def trace(self, step: Step) -> StepTrace:
        if step not in self.traces:
            self.progress(
                f"tracing {step.batch} x {step.seq_len:,} tokens, {step.dispatch}, recompute {step.recomputed}"
            )
            self.traces[step] = trace_step(self.build, step)
        return self.traces[step]

    def estimate(self, step: Step) -> StepTrace:
        """The trace of a step, or what that of one row says about it."""
        return self.traces[step] if step in self.traces else self.trace(replace(step, batch=1)).scaled(step.batch)

    def evaluate(
        self, layout: Layout, batch: int, checkpointing: str, exact: bool = True, layers: int | None = None
    ) -> Candidate:
        """One way to run.

        Args:
            exact: trace the step as it is, not one row of it.
            layers: that are checkpointed, the first ones; None: as many as the configuration says of its own way, else
                all.
        """
        config, gpu = self.config, self.machine.kind
        dispatch = dispatch_of(config, layout)
        balance = balance_of(config, layout)
        captured = dispatch in CAPTURED and config.train.cuda_graph != "off"
        if layers is None and checkpointing == config.model.activation_checkpointing:
            layers = config.model.checkpointed_layers
        recomputed = checkpointing != "none" and layers is None
        rows, stacked = rows_over_mean(dispatch, balance, captured, recomputed)
        step = Step(
            batch=batch,
            seq_len=config.data.seq_len,
            checkpointing=checkpointing,
            checkpointed_layers=layers,
            dispatch=dispatch,
            rows_over_mean=rows,
            stacked_over_mean=stacked,
            ranks=layout.ep if dispatch in OF_ALL_RANKS else RANKS,
            packed=config.data.packing and config.data.document_mask,
            loss=config.train.loss,
            kernels="torch" if config.model.attn_implementation or config.model.kernels == "torch" else "auto",
            compiled=config.train.compile != "off",
        )
        trace = self.trace(step) if exact else self.estimate(step)
        passes, keep = config.train.grad_accum, config.parallel.keep_gathered
        memory = memory_of(
            trace, self.units, layout, gpu_bytes=gpu.memory_bytes, passes=passes, keep=keep, captured=captured
        )
        time = time_of(trace, self.units, layout, gpu, passes=passes, keep=keep, captured=captured, balance=balance)
        return Candidate(layout, step, captured, memory, time, memory.needed <= gpu.memory_bytes)

    def candidates(self, choices: Choices) -> Iterator[Candidate]:
        """Every way to run, up to the first batch that fits nowhere or is hardly faster than the one before."""
        by_dispatch: dict[str, list[Layout]] = {}
        for layout in self.layouts(choices):
            by_dispatch.setdefault(dispatch_of(self.config, layout), []).append(layout)
        for _dispatch, layouts in by_dispatch.items():
            for checkpointing in [choices.checkpointing] if choices.checkpointing else CHECKPOINTING:
                fastest = 0.0
                for batch in [choices.batch] if choices.batch else BATCHES:
                    exact = choices.batch is not None  # a trace of one row saves none where one batch is looked at
                    found = [self.evaluate(layout, batch, checkpointing, exact) for layout in layouts]
                    yield from found
                    before, fastest = fastest, max((c.time.tokens_per_second for c in found if c.fits), default=0.0)
                    if fastest < WORTH_A_BATCH * before or not fastest:
                        break

    def exact(self, candidate: Candidate) -> Candidate:
        """The same with a trace of its own."""
        step = candidate.step
        return self.evaluate(candidate.layout, step.batch, step.checkpointing, layers=step.checkpointed_layers)

    def with_fewer_layers(self, fitting: Sequence[Candidate]) -> Iterator[Candidate]:
        """The fastest of them that is checkpointed, with as few checkpointed layers as memory allows, by eighths."""
        found = next((candidate for candidate in fitting if candidate.step.checkpointing != "none"), None)
        if found is None or self.layers < EIGHTHS:
            return
        too_few, enough = 0, EIGHTHS
        while enough - too_few > 1:
            eighths = (too_few + enough) // 2
            layers, step = self.layers * eighths // EIGHTHS, found.step
            candidate = self.evaluate(found.layout, step.batch, step.checkpointing, layers=layers)
            if candidate.fits:
                enough, best = eighths, candidate
            else:
                too_few = eighths
        if enough < EIGHTHS:
            yield best

    def confirmed(self, candidates: Sequence[Candidate], top: int) -> Iterator[Candidate]:
        """The fastest `top` that fit, each traced as it is."""
        estimated = _fastest(c for c in candidates if c.fits)
        exact = (self.exact(candidate) for candidate in estimated)
        yield from _fastest(islice((candidate for candidate in exact if candidate.fits), top))

    def smallest(self, choices: Choices) -> Candidate:
        """The way to run that takes the least memory."""
        batch, checkpointing = choices.batch or 1, choices.checkpointing or "full"
        found = (self.evaluate(layout, batch, checkpointing) for layout in self.layouts(choices))
        return min(found, key=lambda candidate: candidate.memory.needed)

    def own(self, choices: Choices) -> Candidate | None:
        """The configuration's own way, if it is among the choices."""
        own, data, model = Choices.of(self.config), self.config.data, self.config.model
        if not choices.allow(own):
            return None
        [layout] = self.layouts(own)
        return self.evaluate(layout, data.batch_size, model.activation_checkpointing)

    def why_not_own(self, choices: Choices) -> str | None:
        """Why the configuration's own layout cannot be, in its words; None where it can, or is no choice."""
        if not choices.allow(Choices.of(self.config)):
            return None
        parallel, machine = self.config.parallel, self.machine
        own = Layout(machine.nodes, machine.gpus_per_node, parallel.ep_size, parallel.dp_replicate_size)
        return own.why_impossible(self.num_experts)

    def possible(self, choices: Choices) -> list[Layout]:
        """Layouts that can be, maybe none."""
        found = possible_layouts(self.machine.nodes, self.machine.gpus_per_node, self.num_experts, choices)
        if self.config.model.dispatch != "nvlink":
            return found
        return [layout for layout in found if not _across_nodes(layout)] or found

    def layouts(self, choices: Choices) -> list[Layout]:
        """Layouts that can be.

        Raises:
            ValueError: there is none; the message lists what can stand in the place of a chosen size.
        """
        if found := self.possible(choices):
            return found
        raise ValueError(why_none(self.machine.nodes, self.machine.gpus_per_node, self.num_experts, choices))


def _fastest(candidates: Iterable[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: -candidate.time.tokens_per_second)


def balance_of(config: RunConfig, layout: Layout) -> Balance:
    """How a run's routers spread tokens over the ranks of an expert group."""
    gate = config.balance.gate
    return Balance(gate, constants.LOAD[gate] if layout.ep > 1 else 1.0)


def rows_over_mean(dispatch: str, balance: Balance, captured: bool, recomputed: bool) -> tuple[float, float | None]:
    """Rows of a call that a rank has room for over the mean, and those of all layers together where they lie in one
    stack: the rules of `moetrain.graph.Passes`. Eager passes take what comes.

    Args:
        recomputed: all layers are, so that rows live no longer than their layer's backward.
    """
    of_all_layers = min(balance.load, constants.ALL_LAYERS)
    if dispatch == "local":
        return 1.0, None
    if not (captured and dispatch in STATIC):
        return of_all_layers, None
    stacks = dispatch in STACKED and not recomputed
    return MARGIN * balance.load, STACK_MARGIN * of_all_layers if stacks else None


def dispatch_of(config: RunConfig, layout: Layout) -> str:
    """The dispatcher that a run takes under a layout.

    Raises:
        ValueError: one that a plan does not know, or that cannot serve the layout.
    """
    wanted, across = config.model.dispatch, _across_nodes(layout)
    if layout.ep == 1:
        return "local"
    if wanted in ("auto", "local"):
        return "alltoall" if across else "nvlink"
    if wanted not in DISPATCHERS:
        raise ValueError(f"a plan does not know model.dispatch={wanted}; it knows auto, {', '.join(DISPATCHERS)}")
    if wanted == "nvlink" and across:
        raise ValueError(
            f"model.dispatch=nvlink needs expert groups within a node, but ep_size {layout.ep} spans nodes of "
            f"{layout.gpus_per_node} GPUs; set model.dispatch=auto"
        )
    return wanted


def _changes(planner: Planner, choices: Choices) -> Iterator[Change]:
    """Changes to a run that fits nowhere: those that make it fit first, in the order of what they cost."""
    config, machine = planner.config, planner.machine
    found: list[Change] = []

    def look(what: str, changed: RunConfig, where: Machine = machine, chosen: Choices = choices) -> None:
        same_model = changed.data.seq_len == config.data.seq_len
        other = Planner(changed, where, planner.traces if same_model else None, planner.progress)
        if other.possible(chosen):
            found.append(Change(what, other.smallest(chosen)))

    if choices.checkpointing not in (None, "full"):
        look("activation checkpointing: full", config, chosen=replace(choices, checkpointing="full"))
    if (choices.batch or 1) > 1:
        look("batch: 1", config, chosen=replace(choices, batch=1))
    if choices.ep is not None:
        look("ep: auto", config, chosen=replace(choices, ep=None))
    for states in ("bf16_stochastic", "8bit"):
        if config.model.dtype == "bfloat16" and config.optim.states not in (states, "8bit"):
            look(f"optim.states: {states}", _with(config, "optim", states=states))
    look(f"data.seq_len: {config.data.seq_len // 2:,}", _with(config, "data", seq_len=config.data.seq_len // 2))
    larger = [name for name, gpu in GPUS.items() if gpu.memory_bytes > machine.kind.memory_bytes]
    for name in larger[:1]:
        look(f"GPU: {name}", config, replace(machine, gpu=name))
    for times in (2, 4):
        look(f"nodes: {machine.nodes * times}", config, replace(machine, nodes=machine.nodes * times))
    fitting = [change for change in found if change.candidate.fits]
    others = [change for change in found if not change.candidate.fits]
    yield from fitting
    yield from sorted(others, key=lambda change: change.candidate.memory.needed)


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _expert_counts(model: PreTrainedModel) -> set[int]:
    """Experts of a layer; {1} where they cannot be spread."""
    modules: list[Any] = [module for _, module in families.experts_modules(model)]
    return {module.num_experts for module in modules} or {1}


def _across_nodes(layout: Layout) -> bool:
    """Whether an expert group lies in several nodes."""
    return layout.gpus_per_node % layout.ep != 0
