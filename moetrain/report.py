"""A run as one picture (`run.png`) and one page (`report.html`), and its configuration as documented YAML."""

from __future__ import annotations

import base64
import html
import json
import math
import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel

from moetrain.config import RunConfig
from moetrain.metrics import FILE_NAME, bytes_text, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIG_FILE = "config.yaml"
"""In the output directory: the whole configuration of the run, defaults included."""
INK, MUTED, GRID = "#24292f", "#8c959f", "#e7eaee"
BLUE, ORANGE, GREEN, PURPLE = "#2f6fde", "#e8590c", "#2b8a3e", "#7048e8"

Record = dict[str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write `run.png` and `report.html` from what `run_dir` holds so far; returns the page's path.

    Raises:
        ValueError: `run_dir` has no metrics.jsonl, or it holds neither a step nor an evaluation.
    """
    run_dir = Path(run_dir)
    metrics = run_dir / FILE_NAME
    if not metrics.is_file():
        raise ValueError(f"no {FILE_NAME} in {run_dir}: name the output_dir of a run")
    records = read_records(metrics)
    steps, evals = _by_step(records, "step"), _by_step(records, "eval")
    if not steps and not evals:
        raise ValueError(f"{metrics} holds no step yet")
    about: Record = next((record for record in reversed(records) if record["kind"] == "run"), {})
    vocab_size = about.get("vocab_size") or _vocab_size(run_dir)
    rows = _summary(steps, evals, about, vocab_size)
    title = str(about.get("run") or run_dir.resolve().name)
    picture = run_dir / "run.png"
    _draw(picture, title, steps, evals, vocab_size)
    page = run_dir / "report.html"
    config = run_dir / CONFIG_FILE
    config_text = config.read_text(encoding="utf-8") if config.is_file() else ""
    page.write_text(_page(title, rows, picture.read_bytes(), config_text), encoding="utf-8")
    return page


def config_yaml(config: RunConfig, docs: bool = True) -> str:
    """The whole configuration as YAML that `load_config` reads back, each key under its documentation."""
    return "\n".join(_section_lines(config, docs)) + "\n"


def _section_lines(section: BaseModel, docs: bool) -> Iterator[str]:
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if docs and field.description:
            yield from textwrap.wrap(field.description, 100, initial_indent="# ", subsequent_indent="# ")
        if isinstance(value, BaseModel):
            yield f"{name}:"
            yield from (f"  {line}" for line in _section_lines(value, docs))
        else:
            yield from yaml.safe_dump({name: plain[name]}, sort_keys=False, width=120).splitlines()


def _by_step(records: list[Record], kind: str) -> list[Record]:
    """Records of a kind in the order of steps; the last one wins where a step is there twice."""
    found = {record["step"]: record for record in records if record["kind"] == kind}
    return [found[step] for step in sorted(found)]


def _vocab_size(run_dir: Path) -> int | None:
    """From the exported model's configuration, where there is one."""
    config = run_dir / "model" / "config.json"
    if not config.is_file():
        return None
    raw = json.loads(config.read_text(encoding="utf-8"))
    size = raw.get("vocab_size") or raw.get("text_config", {}).get("vocab_size")
    return int(size) if size else None


def _summary(steps: list[Record], evals: list[Record], about: Record, vocab_size: int | None) -> list[tuple[str, str]]:
    """Rows of the page's table. Speed and time of a step are medians: the first step compiles and warms up."""
    rows = []
    if steps:
        total = about.get("total_steps")
        tokens = sum(record["tokens"] for record in steps)
        rows += [
            ("steps", f"{steps[-1]['step']:,}" + (f" of {total:,}" if total else "")),
            ("label tokens", f"{tokens:,}"),
            ("training loss", f"{_text(steps[0]['loss'])} at first, {_text(steps[-1]['loss'])} at last"),
            ("speed", f"{statistics.median(record['tokens_per_second'] for record in steps):,.0f} tokens/s (median)"),
            ("step time", f"{statistics.median(record['step_seconds'] for record in steps):.3f} s (median)"),
            ("time in steps", _duration(sum(record["step_seconds"] for record in steps))),
            ("memory, rank 0", bytes_text(max(record["memory_bytes"] for record in steps)) + " at its peak"),
        ]
        balance = [x for record in steps if (x := record.get("expert_load_max_over_mean")) is not None]
        if balance:
            rows.append(("expert load", f"busiest over mean {statistics.median(balance):.2f} (median of the steps)"))
    if evals:
        first, last = evals[0]["loss"], evals[-1]["loss"]
        change = f", {last - first:+.3f} nats" if len(evals) > 1 and None not in (first, last) else ""
        rows.append(("validation loss", f"{_text(first)} at first, {_text(last)} at last{change}"))
    if vocab_size:
        rows.append(
            ("ln(vocabulary)", f"{math.log(vocab_size):.3f} for {vocab_size:,} entries: the loss of a blind guess")
        )
    return rows


def _draw(path: Path, title: str, steps: list[Record], evals: list[Record], vocab_size: int | None) -> None:
    """Loss on the left over the full height, speed, memory and expert balance on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 10,
        "text.color": INK,
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
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12, 6.2), dpi=150, layout="constrained")
        grid = figure.add_gridspec(3, 2, width_ratios=(1.55, 1))
        figure.suptitle(f"{title}: {_headline(steps, evals)}", x=0.01, ha="left", fontsize=13, fontweight="bold")
        loss = figure.add_subplot(grid[:, 0])
        _draw_loss(loss, steps, evals, vocab_size)
        panels = (
            ("tokens a second, all ranks", "tokens_per_second", 1.0, BLUE),
            ("memory of rank 0, GiB", "memory_bytes", 2.0**30, GREEN),
            ("busiest expert's load over the mean, 1 is even", "expert_load_max_over_mean", 1.0, PURPLE),
        )
        for row, (name, key, unit, color) in enumerate(panels):
            axes = figure.add_subplot(grid[row, 1], sharex=loss)
            axes.set_title(name)
            values = _series(steps, key, unit)
            axes.plot([record["step"] for record in steps], values, color=color, linewidth=1.2, marker=_marker(values))
            top = max((value for value in values if math.isfinite(value)), default=0.0)
            axes.set_ylim(0, 1.15 * top if top > 0 else 1.0)
            if key == "expert_load_max_over_mean":
                axes.axhline(1, color=MUTED, linestyle="--", linewidth=1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
            axes.tick_params(labelbottom=row == 2)
        axes.set_xlabel("step")
        figure.savefig(path)
        plt.close(figure)


def _draw_loss(axes: Axes, steps: list[Record], evals: list[Record], vocab_size: int | None) -> None:
    axes.set_title("loss, nats a token")
    axes.set_xlabel("step")
    x, raw = [record["step"] for record in steps], _series(steps, "loss")
    if len(raw) > 20:
        axes.plot(x, raw, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(x, _smooth(raw), color=BLUE, linewidth=1.8, label="training (smoothed)")
    elif raw:
        axes.plot(x, raw, color=BLUE, linewidth=1.8, marker=_marker(raw), label="training")
    if evals:
        where, losses = [record["step"] for record in evals], _series(evals, "loss")
        axes.plot(where, losses, "o-", color=ORANGE, linewidth=1.2, markersize=6, label="validation")
        axes.annotate(
            _text(losses[-1]), (where[-1], losses[-1]), (-4, 9), textcoords="offset points", color=ORANGE,
            fontweight="bold", ha="right",
        )  # fmt: skip
    first = next((x for x in (*_series(evals, "loss"), *raw) if math.isfinite(x)), 0.0)
    # A run that starts from a trained model is far below a guess, and the line would only flatten its curve.
    if vocab_size and first > 0.7 * math.log(vocab_size):
        guess = math.log(vocab_size)
        axes.axhline(guess, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(
            f"ln({vocab_size:,}) = {guess:.2f}, a blind guess", (0.99, guess), (0, 4), color=MUTED, ha="right",
            xycoords=("axes fraction", "data"), textcoords="offset points",
        )  # fmt: skip
        axes.set_ylim(top=max(1.06 * guess, axes.get_ylim()[1]))
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.92))


def _series(records: list[Record], key: str, unit: float = 1.0) -> list[float]:
    """Values of a key, NaN where a record has none."""
    return [math.nan if record.get(key) is None else record[key] / unit for record in records]


def _smooth(values: list[float]) -> list[float]:
    """Mean over a centred window of a twenty-fifth of the run; values that are no numbers are passed over. It never
    looks back further at the start than ahead, and so does not lag behind a loss that falls."""
    reach = max(2, len(values) // 50)
    smoothed = []
    for i in range(len(values)):
        near = min(reach, i)
        window = [value for value in values[i - near : i + near + 1] if math.isfinite(value)]
        smoothed.append(statistics.fmean(window) if window else math.nan)
    return smoothed


def _marker(values: list[float]) -> str:
    """A lone point has no line to be seen by."""
    return "o" if len(values) < 5 else ""


def _headline(steps: list[Record], evals: list[Record]) -> str:
    if len(evals) > 1 and None not in (evals[0]["loss"], evals[-1]["loss"]):
        change = f"validation loss {evals[0]['loss']:.2f} to {evals[-1]['loss']:.2f}"
    elif steps:
        change = f"training loss {_text(steps[-1]['loss'])}"
    else:
        change = f"validation loss {_text(evals[-1]['loss'])}"
    if not steps:
        return change
    return f"{change} in {steps[-1]['step']:,} steps, {_duration(sum(record['step_seconds'] for record in steps))}"


def _text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def _duration(seconds: float) -> str:
    """`48 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _page(title: str, rows: list[tuple[str, str]], picture: bytes, config: str) -> str:
    """One HTML file that needs nothing beside itself."""
    table = "\n".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
    settings = f"<h2>Configuration</h2>\n<pre>{html.escape(config)}</pre>" if config else ""
    image = base64.b64encode(picture).decode("ascii")
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
  img {{ width: 100%; }}
  th {{ text-align: left; font-weight: normal; color: #57606a; padding: .15rem 2rem .15rem 0; }}
  td {{ font-variant-numeric: tabular-nums; }}
  pre {{ background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: 13px; }}
</style>
<h1>{html.escape(title)}</h1>
<img alt="loss, speed, memory and expert balance over the steps" src="data:image/png;base64,{image}">
<h2>Summary</h2>
<table>
{table}
</table>
{settings}
</html>
"""
