"""The page: one HTML file that loads nothing, runs no script, and can be read without a mouse."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from moetrain.report.charts import Chart, Line, draw, heatmap, shares
from moetrain.report.curves import smooth
from moetrain.report.history import History
from moetrain.report.markup import details, escape, pre, section, slug, table
from moetrain.report.settings import differences
from moetrain.report.style import CSS
from moetrain.report.summary import events, headline, restarts, summary, tiles
from moetrain.report.text import duration, number, share

GIB = 2.0**30
SMOOTH_FROM = 20
"""Steps from which the loss is drawn smoothed, over its raw values."""
VERSIONS = ("moetrain", "torch", "transformers", "cuda", "triton")
SHOWN_ELSEWHERE = {*VERSIONS, "kind", "time", "run", "total_steps", "start_step", "layers", "vocab_size"}
SLOW_RANKS_SHOWN = 10
FEW_ROWS = 12
"""More are folded away."""


def page(histories: Sequence[History], names: Sequence[str]) -> str:
    """The page of one run, or of several to compare.

    Args:
        names: one a run, no two the same.
    """
    several = len(histories) > 1
    title = f"{len(histories)} runs compared" if several else names[0]
    parts = [
        section("Summary", _tiles(histories, several), _summary(histories, names)),
        section("Differences in configuration", _differences(histories, names)) if several else "",
        section("Curves", _grid([draw(chart) for chart in curves(histories, names)])),
        section("Time", *[_time_of(h, _of(names, i, several), i) for i, h in enumerate(histories)]),
        section("Expert balance", *[_balance(h, _of(names, i, several), i) for i, h in enumerate(histories)]),
        section("Memory", _grid([draw(chart) for chart in memory(histories, names)])),
        section("Events", *[_events(h, _of(names, i, several)) for i, h in enumerate(histories)]),
        section("Environment", _facts("Versions", histories, names), _facts("The run and its data", histories, names)),
        section("Configuration", *[_config(h, _of(names, i, several)) for i, h in enumerate(histories)]),
    ]
    return _shell(title, "" if several else headline(histories[0]), parts)


def curves(histories: Sequence[History], names: Sequence[str]) -> list[Chart]:
    """Loss, gradient norm, learning rate, speed and time of a step, balance."""
    again = restarts(histories[0]) if len(histories) == 1 else []
    guess = _blind_guess(histories)

    def chart(title: str, unit: str, column: str, per_rank: bool = False, **more: Any) -> Chart:
        label = names if len(histories) > 1 else [title]
        lines = [
            Line(label[i], h.steps_S, h[column] / (h.ranks if per_rank else 1), i) for i, h in enumerate(histories)
        ]
        return Chart(title, unit, lines, restarts=again, **more)

    plans = [(plan, "plan") for plan in sorted({h.expected_tps for h in histories if h.expected_tps > 0})]
    return [
        Chart("Loss", "nats a token", _loss_lines(histories, names), levels=guess, restarts=again, wide=True),
        chart("Gradient norm", "before clipping", "grad_norm"),
        chart("Learning rate", "", "lr", zero=True),
        chart("Speed", "tokens/s per GPU", "tokens_per_second", per_rank=True, zero=True, levels=plans),
        chart("Step time", "seconds", "step_seconds", zero=True),
        chart(
            "Busiest expert", "load over the mean, worst layer", "expert_load_max_over_mean", zero=True,
            levels=[(1.0, "even")],
        ),
        chart("Idle experts", "without a token, all layers", "idle_experts", zero=True),
    ]  # fmt: skip


def memory(histories: Sequence[History], names: Sequence[str]) -> list[Chart]:
    """Memory of rank 0 against what its GPU has."""
    totals = {float(h["memory_total_bytes"][-1]) / GIB for h in histories if len(h.steps_S)}
    levels = [(total, f"capacity {number(total)}") for total in sorted(t for t in totals if math.isfinite(t))]
    if len(histories) > 1:
        lines = [Line(names[i], h.steps_S, h["memory_bytes"] / GIB, i) for i, h in enumerate(histories)]
    else:
        h = histories[0]
        lines = [Line("peak allocated", h.steps_S, h["memory_bytes"] / GIB, 0)]
        if np.isfinite(h["memory_reserved_bytes"]).any():
            lines.append(Line("reserved", h.steps_S, h["memory_reserved_bytes"] / GIB, 1))
    return [Chart("Memory of rank 0", "GiB", lines, zero=True, levels=levels, wide=True)]


def _loss_lines(histories: Sequence[History], names: Sequence[str]) -> list[Line]:
    lines = []
    for i, h in enumerate(histories):
        name = f"{names[i]}, " if len(histories) > 1 else ""
        long = len(h.steps_S) > SMOOTH_FROM
        validation = 1 if len(histories) == 1 else i
        if len(h.steps_S):
            lines.append(Line(f"{name}training", h.steps_S, h["loss"], i, "faint" if long else "line"))
        if long:
            smoothed = np.where(np.isfinite(h["loss"]), smooth(h["loss"]), np.nan)
            lines.append(Line(f"{name}smoothed", h.steps_S, smoothed, i, spoken=False))
        if len(h.eval_steps_V):
            lines.append(Line(f"{name}validation", h.eval_steps_V, h.eval_losses_V, validation, "dots"))
    return lines


def _blind_guess(histories: Sequence[History]) -> list[tuple[float, str]]:
    """ln(vocabulary), where a run begins near it: one that starts from a trained model is far below, and the line
    would only flatten its curve."""
    size = histories[0].vocab_size
    if size is None or len(histories) > 1:
        return []
    losses = np.concatenate([histories[0].eval_losses_V, histories[0]["loss"]])
    known = losses[np.isfinite(losses)]
    guess = math.log(size)
    return [(guess, f"ln({size:,}), a blind guess")] if len(known) and known[0] > 0.7 * guess else []


def _tiles(histories: Sequence[History], several: bool) -> str:
    if several:
        return ""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(remark)}</dd></div>"
        for name, value, remark in tiles(histories[0])
    )
    return f'<dl class="tiles">{cells}</dl>'


def _summary(histories: Sequence[History], names: Sequence[str]) -> str:
    columns = [summary(history) for history in histories]
    keys = dict.fromkeys(key for column in columns for key in column)
    head = ("", *names) if len(histories) > 1 else ()
    rows = [(key, *(column.get(key, "-") for column in columns)) for key in keys]
    return table(head, rows, "Summary")


def _differences(histories: Sequence[History], names: Sequence[str]) -> str:
    rows = [(key, *values) for key, values in differences([history.config for history in histories])]
    if not rows:
        return "<p>The configurations say the same.</p>"
    return table(("key", *names), rows, "What the configurations do not have in common")


def _time_of(history: History, name: str, number_of_run: int) -> str:
    title = f"Phases of the time{name}"
    figure = shares(title, f"phases-{number_of_run}", history.steps_S, history.phases)
    if not figure:
        return ""
    totals = {phase: float(seconds.sum()) for phase, seconds in history.phases.items()}
    whole, steps = max(sum(totals.values()), 1e-12), len(history.steps_S)
    rows = [
        (phase, share(seconds / whole), duration(seconds), f"{number(seconds / steps)} s")
        for phase, seconds in totals.items()
    ]
    slow = [
        (f"rank {rank}", f"{times:,} of {steps:,}", f"+{share(lead)}")
        for rank, times, lead in history.slow_ranks[:SLOW_RANKS_SHOWN]
    ]
    caption = f"Slowest rank by own computation{name}"
    heads = ("rank", "steps in which it was the slowest", "mean lead over the median rank")
    return (
        figure
        + table(("phase", "share", "in all", "a step"), rows, title)
        + (table(heads, slow, caption, label=True) if slow else "")
    )


def _balance(history: History, name: str, number_of_run: int) -> str:
    return heatmap(
        f"Busiest expert by layer{name}",
        f"balance-{number_of_run}",
        "load over the mean; 1 is even; the worst of the steps of a cell",
        history.steps_S,
        history.layers,
        history.balance_SL,
    )


def _events(history: History, name: str) -> str:
    rows = events(history)
    return table(("time, UTC", "step", "what"), rows, f"Events{name}", label=bool(name)) if rows else ""


def _facts(caption: str, histories: Sequence[History], names: Sequence[str]) -> str:
    """What the run records say of versions, or all that has no other place on the page."""
    abouts = [history.about for history in histories]
    if caption == "Versions":
        chosen = [{name: about[name] for name in VERSIONS if about.get(name)} for about in abouts]
    else:
        chosen = [{key: value for key, value in about.items() if key not in SHOWN_ELSEWHERE} for about in abouts]
    columns = [dict(_leaves(about)) for about in chosen]
    rows = [(name, *(c.get(name, "-") for c in columns)) for name in dict.fromkeys(n for c in columns for n in c)]
    if not rows:
        return ""
    listed = table(("", *names) if len(histories) > 1 else (), rows, caption, label=True)
    return listed if len(rows) < FEW_ROWS else details(f"{caption}, {len(rows)} rows", listed)


def _leaves(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{name} {key}".strip())]
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return [leaf for i, inner in enumerate(value) for leaf in _leaves(inner, f"{name} {i}")]
    return [(name.replace("_", " "), _plain(value))]


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else json.dumps(value, default=str)


def _config(history: History, name: str) -> str:
    return (
        details(f"config.yaml{name}", pre(history.config, f"Configuration{name}"), not name) if history.config else ""
    )


def _of(names: Sequence[str], i: int, several: bool) -> str:
    return f" of {names[i]}" if several else ""


def _grid(figures: list[str]) -> str:
    inside = "\n".join(figure for figure in figures if figure)
    return f'<div class="grid">\n{inside}\n</div>' if inside else ""


def _shell(title: str, headline: str, sections: list[str]) -> str:
    shown = [text for text in sections if text]
    heads = [text.partition("</h2>")[0].rpartition(">")[2] for text in shown]
    contents = "".join(f'<li><a href="#{slug(head)}">{head}</a></li>' for head in heads)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    body = "\n".join(shown)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#summary">Skip to the summary</a>
<header>
<h1>{escape(title)}</h1>
<p class="muted">{escape(headline)}</p>
</header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
{body}
</main>
<footer class="muted"><p>Written by moetrain on {made}. A curve of more steps than it has places shows the lowest and
the highest of the steps that share one; tables give their means as well. Times are in UTC.</p></footer>
</body>
</html>
"""
