"""`Metrics`: takes one record a step and brings it to the console, metrics.jsonl and Prometheus.

What the training thread pays for is a few additions and a hand-over (docs/metrics.md has the figure). Nothing here can
stop it: the console and the file have a thread of their own, the endpoint another, and what fails is a warning.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich import get_console
from rich.console import Console
from rich.text import Text

from moetrain.config import MetricsConfig
from moetrain.metrics.background import Background
from moetrain.metrics.console import ConsoleLog
from moetrain.metrics.discovery import (
    Target,
    discovery_file,
    node_name,
    reachable_host,
    remove_targets,
    write_targets,
)
from moetrain.metrics.endpoint import Endpoint, exposure
from moetrain.metrics.file import History, RunFile, read_history
from moetrain.metrics.phases import PhaseClock
from moetrain.metrics.records import FILE_NAME, EvalRecord, Expectation, StepRecord
from moetrain.metrics.series import STATES, RecentMost, Series
from moetrain.metrics.sinks import Sinks
from moetrain.metrics.starts import count_start, forget_starts, uncount_start

CLOSE_SECONDS = 10.0
"""How long the end of a run waits for a terminal or a disk that hangs."""
WATCHED_SECONDS = 120.0
"""A rank whose last scrape is not older is watched."""
LAST_WORDS_SECONDS = 20.0
"""How long a watched rank stays when it must stop: longer than the time between two scrapes."""

logger = logging.getLogger(__name__)


class Metrics:
    """Takes one record a step on every rank.

    Rank 0 writes the console and `output_dir/metrics.jsonl`, from the first record on. Each rank serves its own
    Prometheus endpoint if `config.prometheus_port` is set: rank 0's has the values of the whole run, every rank's its
    own times, tokens and memory, so that a sum over ranks means something.

    Args:
        info: what a report may want to know of the run, such as `vocab_size`; JSON values.
        goes_on: with the run that is in `output_dir`, if one is; otherwise this is the first start of a new one.
        console: where rank 0 prints; None is rich's global one, on standard output.

    Raises:
        ValueError: certificate, key or password of the endpoint cannot be used.
    """

    def __init__(
        self,
        config: MetricsConfig,
        output_dir: str | Path,
        rank: int,
        total_steps: int,
        *,
        info: Mapping[str, Any] | None = None,
        goes_on: bool = True,
        console: Console | None = None,
    ) -> None:
        self.run = config.run_name or Path(output_dir).resolve().name
        self.series = Series(whole_run=rank == 0)
        self.info = dict(info or {})
        self._config, self._rank, self._total_steps = config, rank, total_steps
        self._path = Path(output_dir) / FILE_NAME
        self._console = console or get_console()
        self._start_step = 0
        self._history = History()
        self._expectation = Expectation()
        self._checkpoint_every = 0
        self._background: Background | None = None
        self._file: RunFile | None = None
        self._log: ConsoleLog | None = None
        self._peak = RecentMost()
        self._clock = PhaseClock()
        self._recorded = dict(self._clock.seconds)  # phases at the newest record
        self._state = "setup"
        self._discovery: Path | None = None
        self._finished = False
        self._sinks = Sinks(config.sinks, output_dir, config.log_every) if rank == 0 and config.sinks else None
        self.series.set(steps_planned=total_steps, step=0)
        self._publish()
        self.endpoint = self._open_endpoint() if config.prometheus_port is not None else None  # may refuse
        self._starts = count_start(Path(output_dir), time.time(), goes_on) if rank == 0 else None
        if self._starts is not None:
            self._restarts, self._first_start = self._starts.number - 1, self._starts.first
            self.series.set(restarts=self._restarts, start_timestamp_seconds=self._first_start)
            self._publish()

    # --- what is known of the run -------------------------------------------------------------------------------------

    def target(self) -> Target | None:
        """Where this rank's endpoint is reached; None without one."""
        if self.endpoint is None:
            return None
        host = reachable_host(self.endpoint.address)
        return Target(self._rank, node_name(), host, self.endpoint.port, self.endpoint.scheme)

    def announce(self, targets: Sequence[Target | None]) -> None:
        """Tell Prometheus where all ranks are, on rank 0; the file goes when the run ends cleanly."""
        known = [target for target in targets if target is not None]
        if self._rank > 0 or not known:
            return
        path = discovery_file(self._path.parent, self.run, self._config.discovery_dir)
        if write_targets(path, self.run, known):
            self._discovery = path
            self.say(f"Prometheus: {len(known)} endpoints, named in {path}")

    def expect(self, expectation: Expectation) -> None:
        """What the run is held against, before the first step."""
        self._expectation = expectation
        self.series.set(gpu_peak_flops=expectation.peak_flops)
        known = {name: None if math.isnan(value) else value for name, value in asdict(expectation).items()}
        self.info["expected_tokens_per_second_per_gpu"] = known.pop("tokens_per_second_per_gpu")
        self.info |= known
        if self._rank == 0:
            self.series.set(expected_tokens_per_second_per_gpu=expectation.tokens_per_second_per_gpu)

    def describe(
        self, layers: Mapping[str, int], infos: Mapping[str, Mapping[str, Any]], checkpoint_every: int = 0
    ) -> None:
        """What becomes known with the model, before the first record.

        Args:
            layers: the layers with experts, and how many they have.
            infos: labels of `moetrain_<name>_info`; those of the run and its versions are rank 0's to tell.
            checkpoint_every: steps between checkpoints; 0 for none.
        """
        self.series.layers = dict(layers)
        self._checkpoint_every = checkpoint_every
        self.info["layers"] = list(layers)
        for name, labels in infos.items():
            if name == "rank":
                self.series.inform(name, labels)
            elif self._rank == 0:
                self.series.inform(name, labels)
                self.info |= labels
        self._publish()

    def resume(self, step: int) -> None:
        """Continue after `step`, before the first record: later steps in metrics.jsonl are dropped, as they will be
        made again. Without this call a new file is started, and one that holds steps is kept under another name."""
        assert self._file is None
        self._start_step = step
        self.series.set(step=step)
        if self._rank > 0:
            return
        try:
            self._history = read_history(self._path, step)
        except OSError as error:
            logger.warning("%s cannot be read, training goes on: %s", self._path, error.strerror)
        self._restarts = max(self._restarts, self._history.starts, 1)  # a run that was done can go on too
        self._first_start = self._history.first_start or self._first_start
        self.series.set(resumed_step=step, restarts=self._restarts, start_timestamp_seconds=self._first_start)
        self.series.add(productive_seconds=self._history.productive_seconds)
        self._publish()

    # --- what happens -------------------------------------------------------------------------------------------------

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Inside, this rank's time belongs to a phase (`moetrain.metrics.records.PHASES`)."""
        return self._state_and_phase(name) if name in STATES else self._clock.phase(name)

    @contextlib.contextmanager
    def _state_and_phase(self, name: str) -> Iterator[None]:
        """A phase that is long, and shown while it lasts."""
        before, self._state = self._state, name
        self._publish()
        with self._clock.phase(name):
            yield
        self._state = before
        self._publish()

    def move(self, seconds: float, source: str, target: str) -> None:
        """Charge seconds of one phase to another: what was measured inside of it."""
        self._clock.move(seconds, source, target)

    def own_seconds(self) -> float:
        """Own computation of this rank since the start: no waiting, no data, no saving."""
        return self._clock.seconds["forward_backward"] + self._clock.seconds["optimizer"]

    def step(self, record: StepRecord) -> None:
        """Publish a step. Call it on all ranks."""
        self._state, series = "train", self.series
        now, phases = time.time(), self._clock.read()  # of one moment: phases add up to the time between records
        series.add(
            tokens=record.rank_tokens,
            label_tokens=record.rank_label_tokens,
            model_flops=record.rank_tokens * _or_zero(self._expectation.flops_per_token),
            overflow_redos=record.redos,
        )
        series.observe_step(record.step_seconds)
        series.set(step=record.step, last_step_seconds=record.step_seconds, last_step_timestamp_seconds=now)
        if record.memory is not None:
            allocated, reserved, peak, _ = record.memory
            series.memory = (allocated, reserved, self._peak.of(peak, now))
            series.set(gpu_memory_total_bytes=record.memory.total)
        if self._rank == 0:
            series.add(productive_seconds=record.step_seconds)
            series.set(loss=record.loss, learning_rate=record.lr, gradient_norm=record.grad_norm)
            if self._checkpoint_every:
                series.set(checkpoint_interval_seconds=self._checkpoint_every * series.mean_step_seconds)
            series.loads = record.layers
            if record.expert_tokens_LE is not None:
                counts_LE = record.expert_tokens_LE
                series.experts_LE = counts_LE if series.experts_LE is None else series.experts_LE + counts_LE
        series.publish(self._state, phases)
        if self._rank == 0:
            spent = {name: seconds - self._recorded[name] for name, seconds in phases.items()}
            self._recorded = phases
            if record.redos:
                self.event("overflow", record.step, redos=record.redos)
            self._submit(partial(self._write_step, record, spent, now))

    def eval(self, record: EvalRecord) -> None:
        """Publish an evaluation. Call it on all ranks. One that a resumed run repeats is not written twice."""
        if self._rank > 0:
            return
        self.series.set(validation_loss=record.loss)
        self._publish()
        self._submit(partial(self._write_eval, record, time.time()))

    def event(self, name: str, step: int, **details: Any) -> None:
        """Write down something that is no step: `checkpoint`, `restart`, `overflow`, `stop`, ..."""
        if self._rank == 0:
            self._submit(partial(self._write, "event", {"event": name, "step": step, **details}, time.time()))

    @contextlib.contextmanager
    def checkpoint(self, step: int) -> Iterator[None]:
        """Inside, a training checkpoint is written: its phase, its counters, its event."""
        begin = time.perf_counter()
        try:
            with self.phase("checkpoint"):
                yield
        except Exception as error:
            self._checkpoint_done(begin, checkpoint_failures=1)
            self.event("checkpoint_failed", step, error=f"{type(error).__name__}: {error}")
            raise
        seconds = self._checkpoint_done(begin, checkpoint_saves=1)
        if self._rank == 0:
            self.series.set(last_checkpoint_timestamp_seconds=time.time(), last_checkpoint_step=step)
            self._publish()
        self.event("checkpoint", step, seconds=round(seconds, 3))

    @property
    def watched(self) -> bool:
        """Whether Prometheus has asked this rank lately."""
        return self.endpoint is not None and time.monotonic() - self.endpoint.last_scrape < WATCHED_SECONDS

    def nonfinite(self, step: int, loss: float, grad_norm: float, watched: bool) -> None:
        """A step whose numbers are no numbers: the run is about to stop. Where Prometheus watches, it gets the time to
        see why.

        Args:
            watched: any rank is; all wait, since the first that ends takes the others with it.
        """
        self.series.add(nonfinite_steps=1)
        if self._rank == 0:
            self.series.set(loss=loss, gradient_norm=grad_norm)
        self._publish()
        self.event("nonfinite", step, loss=str(loss), grad_norm=str(grad_norm))
        if watched:
            self.say(f"step {step} is not finite; ending in {LAST_WORDS_SECONDS:.0f} s, so that monitoring sees it")
            time.sleep(LAST_WORDS_SECONDS)

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if self._rank > 0:
            return
        say = partial(self._console.print, Text(text), soft_wrap=True)
        if self._background is None:
            say()
        else:
            self._background.submit(say)

    def refuse(self) -> None:
        """The setup has told the user what to mend: this was no start, and nobody is to miss its ranks."""
        if self._starts is not None:
            uncount_start(self._path.parent, self._starts)
        self.finish()

    def finish(self) -> None:
        """The run ends as it should: nobody is to miss its ranks."""
        self._state = "done"
        self._publish()
        self._finished = True

    def done(self, step: int) -> None:
        """All steps are made: the next start is that of another run, or of more steps."""
        self.event("done", step)
        if self._rank == 0:
            forget_starts(self._path.parent)
        self.finish()

    def close(self) -> None:
        """Stop the progress bar, close file and endpoint. Without `finish` before it, the ranks stay in service
        discovery."""
        if self._background is not None:
            self._background.submit(self._close_outputs)
            if not self._background.close(CLOSE_SECONDS):
                logger.warning("not all records reached the terminal and %s", self._path)
            self._background = None
        if self._sinks is not None:
            self._sinks.close()
            self._sinks = None
        if self._finished and self._discovery is not None:
            remove_targets(self._discovery)
            if self._config.discovery_dir is None:
                with contextlib.suppress(OSError):  # somebody has put something else there
                    self._discovery.parent.rmdir()
        if self.endpoint is not None:
            with contextlib.suppress(OSError):  # it was broken already
                self.endpoint.close()
            self.endpoint = None

    # --- on the training thread ---------------------------------------------------------------------------------------

    def _open_endpoint(self) -> Endpoint | None:
        assert self._config.prometheus_port is not None
        local_rank = int(os.environ.get("LOCAL_RANK", self._rank))
        port = self._config.prometheus_port and self._config.prometheus_port + local_rank
        if self._rank == 0 and (warning := exposure(self._config)):
            logger.warning(warning)
        try:
            return Endpoint(self._config, port, self.series.page)
        except OSError as error:
            logger.warning(
                "rank %d cannot serve metrics on %s, and trains without: %s. metrics.prometheus_host must be an "
                "address of this machine", self._rank, self._config.prometheus_host, error.strerror,
            )  # fmt: skip
            return None

    def _publish(self) -> None:
        self.series.publish(self._state, self._clock.read())

    def _checkpoint_done(self, begin: float, **counters: float) -> float:
        seconds = time.perf_counter() - begin
        if self._rank == 0:
            self.series.add(checkpoint_seconds=seconds, **counters)
            self._publish()
        return seconds

    def _submit(self, job: Callable[[], None]) -> None:
        if self._background is None:
            self._background = Background()
        self._background.submit(job)

    # --- on the thread of the records ---------------------------------------------------------------------------------

    def _write_step(self, record: StepRecord, phases: Mapping[str, float], now: float) -> None:
        seconds = {name: round(value, 4) for name, value in phases.items()}
        fields = {**record.fields(), "phase_seconds": seconds}
        self._write("step", fields, now)
        if self._sinks is not None:
            self._sinks.step(fields)
        self._console_log().step(record)

    def _write_eval(self, record: EvalRecord, now: float) -> None:
        if record.step not in self._history.eval_steps:
            self._history.eval_steps.add(record.step)
            self._write("eval", asdict(record), now)
            if self._sinks is not None:
                self._sinks.eval(asdict(record))
        self._console_log().eval(record)

    def _write(self, kind: str, record: Mapping[str, Any], now: float) -> None:
        if self._file is None:
            self._file = RunFile(self._path, self._start_step)
            about = {"run": self.run, "total_steps": self._total_steps, "start_step": self._start_step}
            job = os.environ.get("SLURM_JOB_ID", "")
            about |= {"slurm_job_id": job, "restarts": self._restarts, **self.info}
            self._file.write("run", about, now)
            if self._sinks is not None:
                self._sinks.start(about)
            if self._restarts:
                restarted = {"event": "restart", "step": self._start_step, "restarts": self._restarts}
                self._file.write("event", restarted, now)
        self._file.write(kind, record, now)

    def _console_log(self) -> ConsoleLog:
        if self._log is None:
            self._log = ConsoleLog(self._console, self._total_steps, self._start_step, self._config.log_every)
        return self._log

    def _close_outputs(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._file is not None:
            self._file.close()


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
