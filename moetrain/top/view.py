"""A snapshot as a screen of any width, or as one line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moetrain.metrics import bytes_text
from moetrain.report.text import clock, duration, number, share
from moetrain.top.snapshot import Snapshot, warnings

BLOCKS = "".join(chr(0x2581 + i) for i in range(8))
ASCII_BLOCKS = "_.-~=+*#"
EVENTS_SHOWN = 4
LABEL_WIDTH = 13
NARROW = 72
"""Columns below which a curve gets a line of its own."""


def screen(shot: Snapshot, source: str, console: Console) -> Group:
    """The whole view."""
    width = max(console.width, 20)
    blocks = BLOCKS if console.encoding.lower().startswith("utf") else ASCII_BLOCKS
    rows = Table.grid(padding=(0, 1))
    rows.add_column(width=LABEL_WIDTH - 1, style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    room = width - LABEL_WIDTH
    for label, text, curve in _rows(shot):
        line = Text(text)
        if curve:
            space = room if width < NARROW else room - len(text) - 2
            drawn = Text(sparkline(curve, min(space, 60), blocks), "cyan")
            line.append("\n" if width < NARROW else "  ").append_text(drawn)
        rows.add_row(label, line)
    head = Text.assemble(
        (plain(shot.run), "bold"), "  ", (plain(shot.state), "green" if not shot.trouble else "yellow")
    )
    if shot.run != source:
        head.append(f"  {plain(source)}", "dim")
    parts: list[Text | Table] = [head, _progress(shot, width, blocks)]
    parts += [Text(f"! {plain(text)}", "bold yellow") for text in warnings(shot)]
    parts.append(rows)
    parts += [Text(plain(event), "dim") for event in shot.events[-EVENTS_SHOWN:]]
    return Group(*parts)


def line(shot: Snapshot) -> str:
    """One line for a log."""
    if not shot.step:
        return f"{plain(shot.run)}: {plain(shot.state)}"
    of = f"/{shot.total_steps:,}" if shot.total_steps else ""
    parts = [f"step {shot.step:,}{of}", f"loss {_last(shot.losses)}"]
    if math.isfinite(shot.validation_loss):
        parts.append(f"validation {shot.validation_loss:.4f}")
    parts.append(
        f"{number(shot.speed)} tokens/s/GPU" + (f" ({share(shot.of_plan)} of plan)" if _known(shot.of_plan) else "")
    )
    parts.append(f"step {number(shot.step_seconds, 3)} s")
    if _known(shot.memory):
        parts.append(f"memory {_memory(shot)}")
    if _known(shot.balance):
        parts.append(f"balance {shot.balance:.2f}")
    if not shot.ended and _known(shot.left_seconds):
        parts.append(f"left {duration(shot.left_seconds)}")
    if shot.state != "train":
        parts.append(plain(shot.state))
    return "  ".join(parts)


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """The newest values in `width` characters; where values share one, their mean is drawn. A gap is what is not
    finite."""
    if width < 1 or not values:
        return ""
    count = min(width, len(values))
    bounds = [i * len(values) // count for i in range(count + 1)]
    columns = []
    for begin, end in itertools.pairwise(bounds):
        known = [value for value in values[begin:end] if math.isfinite(value)]
        columns.append(sum(known) / len(known) if known else math.nan)
    finite = [value for value in columns if math.isfinite(value)]
    if not finite:
        return " " * count
    low, gap = min(finite), (max(finite) - min(finite)) or 1.0
    top = len(blocks) - 1
    return "".join(" " if math.isnan(value) else blocks[round((value - low) / gap * top)] for value in columns)


def plain(text: str) -> str:
    """Without the control characters by which a name could command the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _rows(shot: Snapshot) -> list[tuple[str, str, Sequence[float]]]:
    """Label, text and curve of each line; a quantity that is not known has none."""
    rows: list[tuple[str, str, Sequence[float]]] = []
    if shot.losses:
        validation = f"  validation {shot.validation_loss:.4f}" if _known(shot.validation_loss) else ""
        rows.append(("loss", _last(shot.losses) + validation, shot.losses))
    elif _known(shot.validation_loss):
        rows.append(("validation", f"{shot.validation_loss:.4f}", ()))
    if _known(shot.speed):
        plan = f"  {share(shot.of_plan)} of plan {number(shot.expected_speed)}" if _known(shot.of_plan) else ""
        rows.append(("tokens/s/GPU", number(shot.speed) + plan, shot.speeds))
    if _known(shot.mfu):
        rows.append(("MFU", share(shot.mfu), ()))
    if _known(shot.step_seconds):
        text = f"{number(shot.step_seconds, 3)} s  grad norm {number(shot.grad_norm, 3)}  lr {shot.lr:.2e}"
        rows.append(("step", text, ()))
    if _known(shot.memory):
        reserved = f"  reserved {bytes_text(shot.memory_reserved)}" if _known(shot.memory_reserved) else ""
        rows.append(("memory", f"{_memory(shot)}, rank {shot.memory_rank}{reserved}", ()))
    if _known(shot.balance):
        layer = f", layer {shot.balance_layer}" if shot.balance_layer else ""
        idle = f"  {shot.idle_experts:.0f} experts idle" if _known(shot.idle_experts) else ""
        rows.append(("balance", f"busiest {shot.balance:.2f} x mean{layer}{idle}", ()))
    if shot.slow_ranks and shot.median_rank_seconds > 0:
        middle = shot.median_rank_seconds
        found = [f"{slow} {100 * (slow.seconds / middle - 1):+.1f} %" for slow in shot.slow_ranks[:3]]
        rows.append(("slow ranks", ", ".join(found) + " against the median", ()))
    if shot.phases:
        order = sorted(shot.phases.items(), key=lambda item: -item[1])
        rows.append(("time", "  ".join(f"{name} {100 * part:.0f} %" for name, part in order if part >= 0.005), ()))
    rows.append(("checkpoint", _checkpoint(shot), ()))
    if shot.ranks > 1:
        up = f", {shot.ranks_up} answer" if shot.ranks_up else ""
        again = f"  restarts {shot.restarts}" if shot.restarts else ""
        rows.append(("ranks", f"{shot.ranks}{up}{again}", ()))
    return [(label, plain(text), curve) for label, text, curve in rows]


def _progress(shot: Snapshot, width: int, blocks: str) -> Text:
    """A bar over the width, and the words that go with it."""
    if not shot.total_steps:
        return Text(f"step {shot.step:,}" if shot.step else "no step yet", "bold")
    words = f"step {shot.step:,} of {shot.total_steps:,}"
    if shot.ended:
        words += f"  last step {clock(shot.last_step_time)} UTC" if _known(shot.last_step_time) else ""
    elif _known(shot.left_seconds):
        words += f"  {duration(shot.left_seconds)} left  last step {duration(max(shot.silence, 0.0))} ago"
    full, empty = (chr(0x2501), chr(0x2500)) if blocks == BLOCKS else ("=", "-")
    done = round(width * min(shot.step / shot.total_steps, 1.0))
    return Text.assemble((words + "\n", "bold"), (full * done, "green"), (empty * (width - done), "dim"))


def _checkpoint(shot: Snapshot) -> str:
    if not _known(shot.checkpoint_time):
        return "none yet"
    return f"step {shot.checkpoint_step:,.0f}, {duration(shot.now - shot.checkpoint_time)} ago"


def _memory(shot: Snapshot) -> str:
    of = f" of {bytes_text(shot.memory_total)} ({share(shot.memory_share)})" if _known(shot.memory_total) else ""
    return bytes_text(shot.memory) + of


def _last(values: Sequence[float]) -> str:
    return "-" if not values else f"{values[-1]:.4f}" if math.isfinite(values[-1]) else "not finite"


def _known(value: float) -> bool:
    return math.isfinite(value)
