"""The run on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from moetrain.metrics.records import EvalRecord, StepRecord, bytes_text

IMBALANCE_TO_NOTICE = 4.0
"""Busiest expert's load over the mean from which the console marks it."""
_HEADER_EVERY = 40
# Title and width of the console's columns, 76 characters in all: a line fits a terminal of 80.
_COLUMNS = (
    ("step", 7),
    ("loss", 9),
    ("tokens/s", 12),
    ("seconds", 9),
    ("balance", 9),
    ("memory", 11),
    ("lr", 10),
    ("grad", 9),
)


class ConsoleLog:
    """One aligned line a step above a progress bar; plain lines without a bar where the output is no terminal."""

    def __init__(self, console: Console, total_steps: int, start_step: int = 0, log_every: int = 1) -> None:
        self._console = console
        self._log_every = log_every
        self._total_steps = total_steps
        self._lines = 0
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=start_step)
        self._progress.start()

    def step(self, record: StepRecord) -> None:
        self._progress.update(self._task, completed=record.step)
        if record.step % self._log_every and record.step != self._total_steps:
            return
        balance = record.expert_load_max_over_mean
        self._line(
            (f"{record.step}", "bold"),
            (f"{record.loss:.4f}", "bold cyan"),
            (f"{record.tokens_per_second:,.0f}", ""),
            (f"{record.step_seconds:.3f}", ""),
            ("-", "") if balance is None else (f"{balance:.2f}", "red" if balance > IMBALANCE_TO_NOTICE else ""),
            (bytes_text(record.memory_bytes), ""),
            (f"{record.lr:.2e}", "dim"),
            (f"{record.grad_norm:#.3g}", "dim"),
        )

    def eval(self, record: EvalRecord) -> None:
        self._line(
            (f"{record.step}", "bold"),
            (f"{record.loss:.4f}", "bold green"),
            (f"  validation loss, {record.tokens:,} tokens", "green"),
        )

    def close(self) -> None:
        self._progress.stop()

    def _line(self, *cells: tuple[str, str]) -> None:
        """Print cells of (text, style) under their columns."""
        if self._lines % _HEADER_EVERY == 0:
            self._console.print(Text("".join(f"{title:>{width}}" for title, width in _COLUMNS), "dim"), soft_wrap=True)
        self._lines += 1
        padded = (Text(f"{text:>{width}}", style) for (text, style), (_, width) in zip(cells, _COLUMNS, strict=False))
        self._console.print(Text.assemble(*padded), soft_wrap=True)
