"""Runs as PNG, drawn by matplotlib."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrain.report.curves import FloatArray, envelope, smooth, worst
from moetrain.report.history import History
from moetrain.report.style import LIGHT, SLOTS
from moetrain.report.summary import headline
from moetrain.report.text import loss_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = LIGHT["ink"], LIGHT["muted"], LIGHT["grid"]
BLUE, ORANGE, GREEN, PURPLE = (LIGHT[name] for name in ("c0", "c1", "c2", "c3"))
DASHES = ("-", "--", ":", "-.")
NAME_LENGTH = 60
GIB = 2.0**30
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called $x_
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def draw_run(path: Path, history: History) -> None:
    """Loss on the left over the full height, speed, memory and expert balance on the right."""
    with _figure(path, (12, 6.2), f"{_short(history.name)}: {headline(history)}") as figure:
        grid = figure.add_gridspec(3, 2, width_ratios=(1.55, 1))
        loss = figure.add_subplot(grid[:, 0])
        _draw_loss(loss, history)
        panels = (
            ("tokens a second, all ranks", "tokens_per_second", 1.0, BLUE),
            ("memory of rank 0, GiB", "memory_bytes", GIB, GREEN),
            ("busiest expert's load over the mean, 1 is even", "expert_load_max_over_mean", 1.0, PURPLE),
        )
        for row, (name, column, unit, color) in enumerate(panels):
            axes = figure.add_subplot(grid[row, 1], sharex=loss)
            axes.set_title(name)
            _plot(axes, history, history[column] / unit, color=color)
            _from_zero(axes, [history[column] / unit])
            if column == "expert_load_max_over_mean":
                axes.axhline(1, color=MUTED, linestyle="--", linewidth=1)
            axes.tick_params(labelbottom=row == 2)
        axes.set_xlabel("step")


def draw_balance(path: Path, history: History) -> None:
    """Layers from above, steps from left; no file where the balance by layer was not recorded."""
    if not np.isfinite(history.balance_SL).any():
        return
    from matplotlib.colors import LogNorm

    cells_LB = worst(history.balance_SL, 400)
    top = max(2.0, float(np.nanmax(cells_LB)))
    with _figure(path, (12, 5), f"{_short(history.name)}: busiest expert's load over the mean, 1 is even") as figure:
        axes = figure.add_subplot()
        extent = (float(history.steps_S[0]), float(history.steps_S[-1]) + 1, len(history.layers) - 0.5, -0.5)
        shown = axes.imshow(cells_LB, aspect="auto", norm=LogNorm(1, top), extent=extent, interpolation="nearest")
        axes.grid(False)
        axes.set_xlabel("step")
        axes.set_ylabel("layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(shown, ax=axes, format="{x:g}", label="worst of the steps of a cell")


def draw_comparison(path: Path, histories: Sequence[History], names: Sequence[str]) -> None:
    """Loss, speed, time of a step and balance of several runs over one another."""
    with _figure(path, (12, 7), f"{len(histories)} runs compared") as figure:
        panels: list[tuple[str, list[FloatArray]]] = [
            ("loss, nats a token (smoothed)", [smooth(h["loss"]) for h in histories]),
            ("tokens a second and GPU", [h["tokens_per_second"] / h.ranks for h in histories]),
            ("step time, seconds", [h["step_seconds"] for h in histories]),
            ("busiest expert's load over the mean", [h["expert_load_max_over_mean"] for h in histories]),
        ]
        for number, (title, values) in enumerate(panels):
            axes = figure.add_subplot(2, 2, number + 1)
            axes.set_title(title)
            for i, history in enumerate(histories):
                style = DASHES[i // SLOTS % len(DASHES)]
                color = LIGHT[f"c{i % SLOTS}"]
                _plot(axes, history, values[i], color=color, linestyle=style, label=_short(names[i]))
                if number == 0:
                    axes.plot(history.eval_steps_V, history.eval_losses_V, "o", color=color, markersize=5)
            if number:
                _from_zero(axes, values)
            else:
                axes.legend(frameon=False)
            if number > 1:
                axes.set_xlabel("step")


@contextlib.contextmanager
def _figure(path: Path, size: tuple[float, float], title: str) -> Iterator[Any]:
    """A figure that is saved at the end, on no screen."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # a character that the font lacks, as in the name of a folder, is drawn as a box
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            figure.savefig(path)


def _draw_loss(axes: Axes, history: History) -> None:
    axes.set_title("loss, nats a token")
    axes.set_xlabel("step")
    raw, losses = history["loss"], history.eval_losses_V
    if len(raw) > 20:
        _plot(axes, history, raw, color=BLUE, alpha=0.25, linewidth=0.8)
        _plot(axes, history, smooth(raw), color=BLUE, linewidth=1.8, label="training (smoothed)")
    elif len(raw):
        _plot(axes, history, raw, color=BLUE, linewidth=1.8, label="training")
    if len(losses):
        axes.plot(history.eval_steps_V, losses, "o-", color=ORANGE, linewidth=1.2, markersize=6, label="validation")
        axes.annotate(
            loss_text(losses[-1]), (float(history.eval_steps_V[-1]), losses[-1]), (-4, 9), textcoords="offset points",
            color=ORANGE, fontweight="bold", ha="right",
        )  # fmt: skip
    first = next((x for x in (*losses, *raw) if math.isfinite(x)), 0.0)
    # A run that starts from a trained model is far below a guess, and the line would only flatten its curve.
    if history.vocab_size and first > 0.7 * math.log(history.vocab_size):
        guess = math.log(history.vocab_size)
        axes.axhline(guess, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(
            f"ln({history.vocab_size:,}) = {guess:.2f}, a blind guess", (0.99, guess), (0, 4), color=MUTED, ha="right",
            xycoords=("axes fraction", "data"), textcoords="offset points",
        )  # fmt: skip
        axes.set_ylim(top=max(1.06 * guess, axes.get_ylim()[1]))
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.92))


def _plot(axes: Axes, history: History, values: FloatArray, label: str = "", **style: Any) -> None:
    """One curve with its gaps; a point that stands alone has no line to be seen by."""
    pieces = envelope(history.steps_S.astype(np.float64), values, buckets=1500)
    for number, piece in enumerate(pieces):
        x, y = zip(*piece, strict=True)
        marker = "o" if len(piece) == 1 or len(values) < 5 else ""
        shown = label if number == 0 and label else "_nolegend_"
        axes.plot(x, y, marker=marker, label=shown, **{"linewidth": 1.2} | style)


def _from_zero(axes: Axes, values: Sequence[FloatArray]) -> None:
    top = max((float(v[np.isfinite(v)].max()) for v in values if np.isfinite(v).any()), default=0.0)
    axes.set_ylim(0, 1.15 * top if top > 0 else 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def _short(name: str) -> str:
    plain = "".join(c if c.isprintable() else " " for c in name)
    return plain if len(plain) <= NAME_LENGTH else plain[: NAME_LENGTH - 3] + "..."
