"""Files of a report: the page, and pictures for where no page can be shown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moetrain.report.history import History, read_history
from moetrain.report.page import page
from moetrain.report.pictures import draw_balance, draw_comparison, draw_run

PAGE, PICTURE, BALANCE_PICTURE = "report.html", "run.png", "balance.png"
COMPARISON = "comparison.html"


def report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """Write the report of a run, or of several to compare; returns the files.

    Args:
        out: the page; None is `report.html` in the folder of a single run, or `comparison.html` here.

    Raises:
        ValueError: as `write_report`, or `out` does not end in .html.
    """
    if out is not None and Path(out).suffix != ".html":
        raise ValueError(f"--out {out}: the page is HTML, and its name ends in .html")
    several = len(run_dirs) > 1
    page = write_comparison(run_dirs, out or COMPARISON) if several else write_report(run_dirs[0], out)
    pictures = [page.with_suffix(".png")] if several else [page.with_name(n) for n in (PICTURE, BALANCE_PICTURE)]
    return [page, *(picture for picture in pictures if picture.is_file())]


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run and its pictures from what `run_dir` holds so far; returns the page's path.

    Args:
        out: the page; None is `report.html` in `run_dir`. The pictures `run.png` and, for a model whose layers'
            balance was recorded, `balance.png` go beside it.

    Raises:
        ValueError: `run_dir` has no metrics.jsonl, or it holds neither a step nor an evaluation.
    """
    history = read_history(run_dir)
    target = Path(out) if out is not None else Path(run_dir) / PAGE
    draw_run(target.with_name(PICTURE), history)
    draw_balance(target.with_name(BALANCE_PICTURE), history)
    return _write(target, page([history], [history.name]))


def write_comparison(run_dirs: Sequence[str | Path], out: str | Path = COMPARISON) -> Path:
    """Write one page about several runs, and its curves as a picture beside it; returns the page's path.

    Raises:
        ValueError: as `write_report`, for any of the runs.
    """
    histories = [read_history(run_dir) for run_dir in run_dirs]
    names = distinct_names(histories)
    target = Path(out)
    draw_comparison(target.with_suffix(".png"), histories, names)
    return _write(target, page(histories, names))


def distinct_names(histories: Sequence[History]) -> list[str]:
    """The runs' names; where two are the same, with their folders, and a number where those are too."""
    names = [history.name for history in histories]
    found: list[str] = []
    for history, name in zip(histories, names, strict=True):
        told = name if names.count(name) == 1 else f"{name} ({history.folder})"
        number = 2
        while told in found:
            told, number = f"{name} ({history.folder}, {number})", number + 1
        found.append(told)
    return found


def _write(target: Path, text: str) -> Path:
    """Whole or not at all: the page of an earlier report stays until this one is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".html.tmp")
    temporary.write_bytes(text.encode("utf-8"))
    os.replace(temporary, target)
    return target
