"""A plan for people (tables), for programs (JSON) and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moetrain.plan.constants import GIB
from moetrain.plan.memory import HELD
from moetrain.plan.search import Candidate, Plan
from moetrain.plan.trace import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DAY = 24 * 3600


def print_plan(plan: Plan, console: Console) -> None:
    """The run, its fastest layouts that fit, the memory and time of the first, and what to expect of it."""
    machine, best = plan.machine, plan.best
    data = plan.config.data
    console.print(
        f"[bold]{escape(plan.config.model.path)}[/]: {plan.parameters / 1e9:,.2f} B parameters, "
        f"{machine.nodes} x {machine.gpus_per_node} {machine.gpu} of {machine.kind.memory_bytes / GIB:.1f} GiB, "
        f"rows of {data.seq_len:,} tokens, {plan.config.model.dtype}, optim.states={plan.config.optim.states}"
    )
    if plan.fitting:
        console.print(_layout_table(plan, plan.fitting))
    else:
        console.print("[bold red]No layout fits.[/] The least that was found, and changes that would help most:")
        console.print(_layout_table(plan, [plan.smallest]))
        console.print(_change_table(plan))
    if plan.why_not_own:
        console.print(f"Without the configuration's own layout: {escape(plan.why_not_own)}", soft_wrap=True)
    console.print(_memory_table(best, plan))
    console.print(f"at its fullest: the {best.memory.moment}", highlight=False)
    console.print(_time_table(best))
    for line in expectations(plan):
        console.print(line, highlight=False, soft_wrap=True)


def expectations(plan: Plan) -> list[str]:
    """What a run on the best layout brings and costs, in lines."""
    best, goodput, machine = plan.best, plan.goodput, plan.machine
    tokens = best.time.tokens_per_second * best.layout.world
    steps = goodput.interval_seconds / best.time.seconds
    return [
        f"a step: {best.time.seconds:.2f} s for {best.time.tokens * best.layout.world:,} tokens; "
        f"a day: {tokens * DAY / 1e9:,.2f} B tokens, {tokens * DAY * goodput.goodput / 1e9:,.2f} B after stops",
        f"a checkpoint: {goodput.checkpoint_bytes / 1e9:,.1f} GB, {goodput.write_seconds:,.0f} s at "
        f"{machine.storage_gb_s:g} GB/s a node; the export: {goodput.export_bytes / 1e9:,.1f} GB",
        f"stops: {goodput.stops_per_week:.2f} a week, each {machine.restart_seconds:,.0f} s and the reading of a "
        f"checkpoint; save every {goodput.interval_seconds / 60:,.0f} minutes (checkpoint.every={max(steps, 1):,.0f}); "
        f"goodput {goodput.goodput:.1%}",
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that `print_plan` shows. Bytes and seconds."""
    return {
        "model": plan.config.model.path,
        "parameters": plan.parameters,
        "machine": vars(plan.machine),
        "fits": bool(plan.fitting),
        "layouts": [_candidate_json(candidate) for candidate in plan.fitting],
        "smallest": _candidate_json(plan.smallest),
        "own": plan.own and _candidate_json(plan.own),
        "why_not_own": plan.why_not_own,
        "changes": [{"change": change.what, **_candidate_json(change.candidate)} for change in plan.changes],
        "goodput": plan.goodput._asdict(),
        "loss": plan.loss,
    }


def draw_plan(plan: Plan, path: Path) -> None:
    """Memory of each layout by kind against the GPU's, and the parts of its step."""
    import matplotlib.pyplot as plt

    shown = [*(plan.fitting or [plan.smallest])]
    if plan.own is not None and plan.own not in shown:
        shown.append(plan.own)
    figure, (memory, time) = plt.subplots(1, 2, figsize=(13, 2.0 + 0.55 * len(shown)), layout="constrained")
    labels = [_name(candidate) + " (yours)" * (candidate == plan.own) for candidate in shown]
    _stack(memory, labels, [_memory_parts(candidate) for candidate in shown], [1 / GIB] * len(shown))
    memory.axvline(plan.machine.kind.memory_bytes / GIB, color="black", linestyle="--", label=plan.machine.gpu)
    memory.set_title("GiB on a rank", fontsize=10)
    _stack(
        time,
        labels,
        [candidate.time.parts for candidate in shown],
        [1e6 / candidate.time.tokens for candidate in shown],
    )
    time.set_title("milliseconds for 1,000 tokens of a rank", fontsize=10)
    time.set_yticklabels([])
    for axes in (memory, time):
        # below the numbers, by the height of a letter and not of the figure, which grows with the layouts
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=3.0, ncols=4, frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{plan.config.model.path} on {plan.machine.nodes} x {plan.machine.gpus_per_node} {plan.machine.gpu}"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _stack(axes: Axes, labels: Sequence[str], bars: Sequence[dict[str, float]], units: Sequence[float]) -> None:
    """A bar for each label, in parts; values are multiplied by the bar's unit."""
    widths = {part: [parts[part] * unit for parts, unit in zip(bars, units, strict=True)] for part in bars[0]}
    longest = max(map(sum, zip(*widths.values(), strict=True)))
    left = [0.0] * len(bars)
    for (part, sizes), color in zip(widths.items(), _COLORS, strict=False):
        if max(sizes) > 0.002 * longest:
            axes.barh(labels, sizes, left=left, label=part, height=0.7, color=color)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()


_COLORS = [f"C{number}" for number in range(10)] + ["lightsteelblue", "navajowhite", "palegreen", "lightcoral"]
"""One for each part: there are more than matplotlib's cycle has."""


def _name(candidate: Candidate) -> str:
    layout, step = candidate.layout, candidate.step
    return f"ep {layout.ep} x fsdp {layout.fsdp} x {layout.replicas}, batch {step.batch}, {step.recomputed}"


def _memory_parts(candidate: Candidate) -> dict[str, float]:
    """Bytes by kind, as they are shown."""
    memory = candidate.memory
    kinds: dict[str, float] = {kind: memory.kinds[kind] for kind in (*HELD, *KINDS)}
    outside = memory.needed - memory.allocated - memory.exchange - memory.fragmentation
    return kinds | {"exchange": memory.exchange, "fragmentation": memory.fragmentation, "outside torch": outside}


def _layout_table(plan: Plan, candidates: Sequence[Candidate]) -> Table:
    table = Table(
        "",
        title="layouts, GiB and rates of a GPU",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for column in ("ep", "fsdp", "rep", "batch"):
        table.add_column(column, justify="right")
    table.add_column("recompute")
    table.add_column("dispatch")
    for column in ("GiB", "tokens/s", "TFLOP/s"):
        table.add_column(column, justify="right")
    rows = [(f"{number}" + " yours" * (each == plan.own), each) for number, each in enumerate(candidates, 1)]
    if plan.own is not None and plan.own not in candidates:
        rows.append(("yours", plan.own))
    for name, candidate in rows:
        layout, step = candidate.layout, candidate.step
        table.add_row(
            name,
            *(str(size) for size in (layout.ep, layout.fsdp, layout.replicas, step.batch)),
            step.recomputed,
            step.dispatch,
            f"{candidate.memory.needed / GIB:.1f}"
            if candidate.fits
            else f"[red]{candidate.memory.needed / GIB:.1f}[/]",
            f"{candidate.time.tokens_per_second:,.0f}",
            f"{candidate.time.tflops:,.0f}",
        )
    return table


def _change_table(plan: Plan) -> Table:
    table = Table(title="changes", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("change")
    table.add_column("GiB", justify="right")
    table.add_column("")
    for change in plan.changes:
        candidate = change.candidate
        verdict = "fits: " + _name(candidate) if candidate.fits else "does not fit yet"
        table.add_row(escape(change.what), f"{candidate.memory.needed / GIB:.1f}", verdict)
    return table


def _memory_table(candidate: Candidate, plan: Plan) -> Table:
    table = Table("kind", title="memory of a rank", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("GiB", justify="right")
    for kind, size in _memory_parts(candidate).items():
        table.add_row(kind, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("needed", f"{candidate.memory.needed / GIB:.2f}")
    table.add_row(f"of {plan.machine.gpu}", f"{plan.machine.kind.memory_bytes / GIB:.2f}")
    return table


def _time_table(candidate: Candidate) -> Table:
    table = Table(title="time of a step", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("part", "ms", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, seconds in candidate.time.parts.items():
        if seconds:
            table.add_row(part, f"{1e3 * seconds:,.1f}", f"{seconds / candidate.time.seconds:.0%}")
    table.add_section()
    table.add_row("step", f"{1e3 * candidate.time.seconds:,.1f}", "")
    return table


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    layout, step, memory, time = candidate.layout, candidate.step, candidate.memory, candidate.time
    return {
        **{"ep": layout.ep, "fsdp": layout.fsdp, "replicas": layout.replicas, "batch": step.batch},
        **{"checkpointing": step.checkpointing, "checkpointed_layers": step.checkpointed_layers},
        **{"dispatch": step.dispatch, "captured": candidate.captured},
        "fits": candidate.fits,
        "memory": {kind: round(size) for kind, size in _memory_parts(candidate).items()},
        "memory_allocated": memory.allocated,
        "memory_needed": memory.needed,
        "fullest": memory.moment,
        "seconds": time.parts,
        "step_seconds": time.seconds,
        "tokens_per_second_per_gpu": time.tokens_per_second,
        "tflops_per_gpu": time.tflops,
    }
