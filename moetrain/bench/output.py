"""What `moetrain bench MODEL` leaves: a table on the console, everything as JSON, and two bar charts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.bench.isolate import Failure
from moetrain.bench.rows import ON_CPU

if TYPE_CHECKING:
    from moetrain.bench.compare import Measurement
    from moetrain.bench.systems import Case

OURS = "moetrain"
BLUE, GREY = "#2f6fde", "#8c959f"
NOTHING = "-"


def stem(case: Case, world: int) -> str:
    """Name of a case's files without their endings."""
    layers = f"-{case.layers}layers" if case.layers else ""
    return f"{case.model}{layers}-{world}x{case.batch}x{case.seq_len}-{case.gate}"


def title(case: Case, world: int) -> str:
    layers = f" cut to {case.layers} layers" if case.layers else ""
    ranks = f"{world} ranks" if world > 1 else "1 rank"
    return f"{case.model}{layers}, {ranks}, {case.batch} x {case.seq_len} tokens each, {case.gate} gate"


def ratio(measured: Mapping[str, Measurement]) -> dict[str, Any] | None:
    """moetrain over the fastest of the others; None where one of the two is missing."""
    others = {name: result for name, result in measured.items() if name != OURS}
    if OURS not in measured or not others:
        return None
    best = max(others, key=lambda name: others[name].tps_per_gpu)
    ours, theirs = measured[OURS], others[best]
    return {
        "against": best,
        "tps": ours.tps_per_gpu / theirs.tps_per_gpu,
        "tps_with_optimizer": ours.tps_per_gpu_with_optimizer / theirs.tps_per_gpu_with_optimizer,
        "peak_memory": ours.peak_gib / theirs.peak_gib,
    }


def show(case: Case, world: int, results: Mapping[str, Measurement | Failure], console: Console | None = None) -> None:
    """Print the table, how each system ran or failed, the ratio, and the profile."""
    console = console or Console()
    console.print(Text(title(case, world), "bold"))
    console.print(_table(results))
    measured: dict[str, Measurement] = {}
    for name, result in results.items():
        if isinstance(result, Failure):
            console.print(Text(f"{name}: {result.reason}, on rank {result.rank}", "red"), soft_wrap=True)
        else:
            measured[name] = result
            redone = f"; {result.redone_steps} runs again after an overflow" if result.redone_steps else ""
            console.print(f"{name}: {result.status}{redone}", highlight=False, soft_wrap=True)
    if limit := _limit(measured):
        console.print(limit, highlight=False, soft_wrap=True)
    if compared := ratio(measured):
        console.print(
            Text(
                f"{OURS}: {compared['tps']:.2f} x the tokens per second of {compared['against']} "
                f"({compared['tps_with_optimizer']:.2f} x with the optimizer), "
                f"{compared['peak_memory']:.2f} x its memory",
                "bold",
            ),
            soft_wrap=True,
        )
    profile = measured[OURS].profile if OURS in measured else None
    if profile:
        _show_profile(profile, console)
    if any(result.environment["gpu"] == "cpu" for result in measured.values()):
        console.print(ON_CPU, soft_wrap=True)


def _table(results: Mapping[str, Measurement | Failure]) -> Table:
    """A row a figure that any system has, a column a system."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in results:
        table.add_column(name, justify="right", style="bold" if name == OURS else "")
    columns = [_cells(result) for result in results.values()]
    for figure in _FIGURES:
        if any(figure in column for column in columns):
            table.add_row(figure, *(column.get(figure, NOTHING) for column in columns))
    return table


_FIGURES = {
    "TPS/GPU": ("tps_per_gpu", ",.0f"),
    "TPS/GPU, optimizer counted": ("tps_per_gpu_with_optimizer", ",.0f"),
    "forward + backward, ms": ("forward_backward_ms", ",.1f"),
    "  forward, ms": ("forward_ms", ",.1f"),
    "  backward, ms": ("backward_ms", ",.1f"),
    "optimizer, ms": ("optimizer_ms", ",.1f"),
    "launched by the host, ms": ("host_ms", ",.1f"),
    "peak memory, GiB": ("peak_gib", ",.1f"),
    "taken from the GPU, GiB": ("device_gib", ",.1f"),
    "TFLOP/s/GPU": ("tflops_per_gpu", ",.1f"),
    "of the limit": ("share_of_limit", ".1%"),
    "load, max / mean": ("load_max_over_mean", ".2f"),
    "loss": ("loss", ".4f"),
}
"""Rows of the table: what is written there, the field of `Measurement`, and its format."""


def _cells(result: Measurement | Failure) -> dict[str, str | Text]:
    """What stands in a system's column, by figure; nothing for what was not measured."""
    if isinstance(result, Failure):
        return {"TPS/GPU": Text(re.split(r" \(|: ", result.reason)[0], "red")}
    values = {figure: (getattr(result, name), style) for figure, (name, style) in _FIGURES.items()}
    return {figure: format(value, style) for figure, (value, style) in values.items() if value is not None}


def _limit(measured: Mapping[str, Measurement]) -> str:
    result = next(iter(measured.values()), None)
    if result is None or result.limit_tflops is None:
        return ""
    tokens = result.limit_tflops * 1e12 / result.flop_per_token
    return (
        f"limit: {result.limit_tflops:.0f} TFLOP/s, {tokens:,.0f} TPS/GPU at "
        f"{result.flop_per_token / 1e9:.1f} GFLOP a token"
    )


def _show_profile(profile: Mapping[str, Any], console: Console) -> None:
    """Kernels by part, and the communication that was not hidden."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part")
    for header in ("ms", "kernels", "share"):
        table.add_column(header, justify="right")
    total = sum(part["ms"] for part in profile["parts"].values())
    for name, part in profile["parts"].items():
        table.add_row(name, f"{part['ms']:.2f}", f"{part['kernels']:.0f}", f"{part['ms'] / total:.1%}")
    console.print(Text("\nforward and backward of moetrain, rank 0", "bold"))
    console.print(table)
    console.print(
        f"GPU busy {profile['busy_ms']:.1f} of {profile['span_ms']:.1f} ms; communication "
        f"{profile['communication_ms']:.1f} ms, {profile['exposed_communication_ms']:.1f} ms of it beside no other "
        f"kernel; {profile['host_launches']:.0f} launches by the host",
        highlight=False,
    )


def write(path: Path, report: Mapping[str, Any], case: Case, world: int, measured: Mapping[str, Measurement]) -> None:
    """Write `path`.json and `path`.png, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [f"{path}.json"]
    Path(files[0]).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if measured:
        files.append(f"{path}.png")
        draw(Path(files[1]), title(case, world), measured)
    if OURS in measured and measured[OURS].profile:
        files.append(f"{path}.trace.json.gz")
    print("wrote " + ", ".join(files), flush=True)


def draw(path: Path, heading: str, measured: Mapping[str, Measurement]) -> None:
    """Bars of tokens per second and of peak memory, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=10)
    names = list(measured)
    colours = [BLUE if name == OURS else GREY for name in names]
    panels = {
        "tokens per second and GPU": [result.tps_per_gpu for result in measured.values()],
        "peak memory, GiB": [result.peak_gib for result in measured.values()],
    }
    for axes, (label, values) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        bars = axes.bar([name.replace(" ", "\n", 1) for name in names], values, color=colours, width=0.6)
        axes.bar_label(bars, [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values], padding=2)
        axes.set_title(label, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    figure.savefig(path, dpi=150)
