"""One record a step -> console, metrics.jsonl, Prometheus.

metrics.jsonl holds one JSON object a line with a `kind`: `run` when a process starts writing (what is known of the
run), `step` (`StepRecord`) and `eval` (`EvalRecord`). Each step is in the file once, however often the run resumed.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from moetrain.config import MetricsConfig

FILE_NAME = "metrics.jsonl"
STEP_SECONDS_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60, 300)
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


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, over all ranks except where it says rank."""

    step: int
    """Counts from 1."""
    loss: float
    """Mean over the label tokens of the step, in nats."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    tokens: int
    """Label tokens of the step, all ranks."""
    tokens_per_second: float
    """All ranks."""
    step_seconds: float
    memory_bytes: int
    """This rank: peak allocated on a GPU, resident set on a CPU."""
    expert_load_max_over_mean: float | None = None
    """Busiest expert's tokens over the mean, worst layer; 1 is perfect. None for a dense model."""
    idle_experts: int | None = None
    """Experts without a token in this step, summed over layers."""
    load_entropy: float | None = None
    """Entropy of the load over experts as a share of its maximum, worst layer; 1 is perfect."""


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation."""

    step: int
    """Optimizer steps done; 0 is before training."""
    loss: float
    """Mean over the validation tokens, in nats."""
    tokens: int
    """Label tokens, all ranks."""


class Metrics:
    """Takes one record a step on every rank.

    Rank 0 writes the console and `output_dir/metrics.jsonl`, from the first record on. Each rank serves its own
    Prometheus endpoint if `config.prometheus_port` is set; rank 0's has the values of the whole run, every rank's its
    own times and memory, so that a sum over ranks means something.

    Args:
        run: name in the Prometheus labels; None takes the last part of `output_dir`.
        info: what a report may want to know of the run, such as `vocab_size`; JSON values.
        console: where rank 0 prints; None is rich's global one, on standard output.

    Raises:
        ValueError: the Prometheus port is in use.
    """

    def __init__(
        self,
        config: MetricsConfig,
        output_dir: str | Path,
        rank: int,
        total_steps: int,
        *,
        run: str | None = None,
        info: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ) -> None:
        self._config = config
        self._path = Path(output_dir) / FILE_NAME
        self._run = run or self._path.resolve().parent.name
        self._total_steps = total_steps
        self._info = info or {}
        self._console = console or get_console()
        self._start_step = 0
        self._eval_steps: set[int] = set()
        self._file: TextIO | None = None
        self._log: ConsoleLog | None = None
        self._writes = rank == 0
        self.prometheus = Prometheus(config, self._run, rank) if config.prometheus_port is not None else None
        if self.prometheus is not None:
            self.say(f"Prometheus endpoint at http://{config.prometheus_host}:{self.prometheus.port}/metrics")

    def resume(self, step: int) -> None:
        """Continue after `step`, before the first record: later steps in metrics.jsonl are dropped, as they will be
        made again. Without this call a new file is started, and one that holds steps is kept under another name."""
        assert self._file is None
        self._start_step = step

    def step(self, record: StepRecord) -> None:
        """Publish a step. Call it on all ranks."""
        if self.prometheus is not None:
            self.prometheus.step(record)
        if self._writes:
            self._write("step", asdict(record))
            self._console_log().step(record)

    def eval(self, record: EvalRecord) -> None:
        """Publish an evaluation. Call it on all ranks. One that a resumed run repeats is not written twice."""
        if self.prometheus is not None:
            self.prometheus.eval(record)
        if self._writes:
            self._write("eval", asdict(record))
            self._console_log().eval(record)

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if self._writes:
            self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Stop the progress bar, close file and endpoint."""
        if self._log is not None:
            self._log.close()
        if self._file is not None:
            self._file.close()
        if self.prometheus is not None:
            self.prometheus.close()

    def _console_log(self) -> ConsoleLog:
        if self._log is None:
            self._log = ConsoleLog(self._console, self._total_steps, self._start_step, self._config.log_every)
        return self._log

    def _write(self, kind: str, record: Mapping[str, Any]) -> None:
        if self._file is None:
            self._eval_steps = _continue_file(self._path, self._start_step)
            self._file = self._path.open("a", encoding="utf-8")
            about = {"run": self._run, "total_steps": self._total_steps, "start_step": self._start_step}
            self._write("run", {**about, **self._info})
        if kind == "eval":
            if record["step"] in self._eval_steps:
                return
            self._eval_steps.add(record["step"])
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **finite}, allow_nan=False) + "\n")
        self._file.flush()


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


class Prometheus:
    """The endpoint of one rank. Names follow prometheus.io: base units, `_total` for counters, ratios from 0 to 1."""

    def __init__(self, config: MetricsConfig, run: str, rank: int) -> None:
        assert config.prometheus_port is not None
        disable_created_metrics()  # a `_created` series beside each counter tells nobody anything
        registry = CollectorRegistry()
        names, labels = ("run", "rank"), (run, str(rank))

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"moetrain_{name}", text, names, registry=registry).labels(*labels)

        self._step_seconds = Histogram(
            "moetrain_step_duration_seconds",
            "Duration of steps",
            names,
            buckets=STEP_SECONDS_BUCKETS,
            registry=registry,
        ).labels(*labels)
        self._memory = gauge("memory_bytes", "Peak allocated on the GPU, or resident set")
        self._last_step = gauge("last_step_timestamp_seconds", "Unix time at the end of the newest step")
        self._whole_run = rank == 0
        if self._whole_run:
            self._tokens = Counter("moetrain_tokens", "Label tokens trained on", names, registry=registry).labels(
                *labels
            )
            self._step = gauge("step", "Optimizer steps done")
            self._loss = gauge("loss", "Training loss of the newest step, nats a token")
            self._validation_loss = gauge("validation_loss", "Loss of the newest evaluation, nats a token")
            self._lr = gauge("learning_rate", "Learning rate of the newest step")
            self._grad_norm = gauge("gradient_norm", "Global gradient norm before clipping")
            self._balance = gauge("expert_load_max_over_mean", "Busiest expert over the mean, worst layer")
            self._idle = gauge("idle_experts", "Experts without a token in the newest step")
            self._entropy = gauge("expert_load_entropy_ratio", "Entropy of the load over its maximum, worst layer")
        port = config.prometheus_port + rank if config.prometheus_port else 0
        try:
            self._server, self._thread = start_http_server(port, config.prometheus_host, registry)
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"rank {rank} cannot serve Prometheus metrics on {config.prometheus_host} port {port}: {error}. Set "
                "metrics.prometheus_port to the first of as many free ports as there are ranks, or to 0 for any free "
                "ones, or leave it out"
            ) from error
        self.address, self.port = str(self._server.server_address[0]), self._server.server_port

    def step(self, record: StepRecord) -> None:
        self._step_seconds.observe(record.step_seconds)
        self._memory.set(record.memory_bytes)
        self._last_step.set_to_current_time()
        if not self._whole_run:
            return
        self._tokens.inc(record.tokens)
        self._step.set(record.step)
        self._loss.set(record.loss)
        self._lr.set(record.lr)
        self._grad_norm.set(record.grad_norm)
        for series, value in (
            (self._balance, record.expert_load_max_over_mean),
            (self._idle, record.idle_experts),
            (self._entropy, record.load_entropy),
        ):
            series.set(math.nan if value is None else value)

    def eval(self, record: EvalRecord) -> None:
        if self._whole_run:
            self._validation_loss.set(record.loss)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in file order. A torn line, which a killed process may leave, is skipped."""
    records = []
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records


def bytes_text(count: float) -> str:
    """`812 MiB`, `39.7 GiB`."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def _continue_file(path: Path, start_step: int) -> set[int]:
    """Make the file ready to append to after `start_step`; returns the steps whose evaluation it holds."""
    if not path.exists():
        return set()
    if start_step == 0:
        if any(record["kind"] == "step" for record in read_records(path)):
            os.replace(path, _unused_name(path))
        else:
            path.unlink()
        return set()
    kept = [record for record in read_records(path) if record.get("step", 0) <= start_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)
    return {record["step"] for record in kept if record["kind"] == "eval"}


def _unused_name(path: Path) -> Path:
    """`metrics.1.jsonl`, or the next number that is free."""
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate
