"""A run's scalars for TensorBoard and Weights & Biases, through their own libraries.

Each sink has a thread and a bounded queue. Training hands over and goes on: a sink that is slow loses records, one
that fails is left out with a warning, and one that hangs is not waited for at the end.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from moetrain.metrics.background import Background

BACKLOG = 1000
"""Records that may wait for a sink; those beyond are lost, and counted."""
CLOSE_SECONDS = 20.0
"""How long the end of a run waits for what is still to be written or sent, all sinks together."""
INIT_SECONDS = 30.0
"""How long Weights & Biases may take to answer at first; the end of the process waits for it too."""
WANDB_ID_FILE = "wandb-run-id"
"""In the output directory: the run that a start that goes on from a checkpoint continues."""
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One destination. All calls come from one thread of its own."""

    def start(self, about: Mapping[str, Any]) -> None:
        """Before the first scalars, with what is known of the run (`run` record of metrics.jsonl)."""

    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def check_sinks(names: Sequence[str]) -> None:
    """Raises ValueError where the library of one is missing, or Weights & Biases has nobody to log in as."""
    for name in names:
        package = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"metrics.sinks names {name}, and the package {package} is not installed: pip install "
                f"'moetrain[{name}]', or take {name} out of metrics.sinks"
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online" and not _wandb_key():
        raise ValueError(
            "metrics.sinks names wandb, and there is no key to log in with: run `wandb login` or set WANDB_API_KEY, or "
            "set WANDB_MODE=offline to keep the run in its folder (`wandb sync` sends it later)"
        )


class Sinks:
    """Hands records to the sinks of a run; no call waits, and none raises.

    Args:
        names: of `metrics.sinks`.
        every: steps between those that are handed on.

    Raises:
        ValueError: as `check_sinks`.
    """

    def __init__(self, names: Sequence[str], output_dir: str | Path, every: int = 1) -> None:
        check_sinks(names)
        makers: dict[str, Callable[[Path], Sink]] = {"tensorboard": TensorBoard, "wandb": WandB}
        self._queues = [_Queue(name, makers[name](Path(output_dir))) for name in names]
        self._every = every

    def start(self, about: Mapping[str, Any]) -> None:
        """What is known of the run, before its first record."""
        for queue in self._queues:
            queue.start(about)

    def step(self, record: Mapping[str, Any]) -> None:
        """A `step` record of metrics.jsonl."""
        if record["step"] % self._every == 0:
            self._log(step_scalars(record), record["step"])

    def eval(self, record: Mapping[str, Any]) -> None:
        """An `eval` record of metrics.jsonl."""
        self._log({"validation/loss": record["loss"]}, record["step"])

    def close(self) -> None:
        """Have everything written that was handed over, but wait no longer than `CLOSE_SECONDS`."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for queue in self._queues:
            queue.close(max(deadline - time.monotonic(), 0.1))

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        for queue in self._queues:
            queue.log(scalars, step)


class _Queue:
    """A sink behind its thread."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink = name, sink
        self._background = Background(BACKLOG)
        self._failed = threading.Event()

    def start(self, about: Mapping[str, Any]) -> None:
        self._submit(partial(self._sink.start, about))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._submit(partial(self._sink.log, scalars, step))

    def close(self, seconds: float) -> None:
        self._submit(self._sink.close)
        begin = time.monotonic()
        if not self._background.close(seconds):
            waited = f" after {seconds:.0f} s" if time.monotonic() - begin >= seconds else ""
            logger.warning("%s lacks records%s: %d were lost", self._name, waited, self._background.dropped)

    def _submit(self, call: Callable[[], None]) -> None:
        if not self._failed.is_set():
            self._background.submit(partial(self._guarded, call))

    def _guarded(self, call: Callable[[], None]) -> None:
        """On the thread. A library may raise anything, and what it raises once it raises at every step."""
        if self._failed.is_set():
            return
        try:
            call()
        except Exception as error:
            self._failed.set()
            logger.warning("%s is left out from here on: %s: %s", self._name, type(error).__name__, error)


class TensorBoard:
    """Event files in `output_dir/tensorboard`: `tensorboard --logdir` reads them as the run goes."""

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir / "tensorboard"

    def start(self, about: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a start repeats after a checkpoint is hidden of the start before it
        purge = about["start_step"] + 1 if about["start_step"] else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=10)
        text = json.dumps(about, indent=2, default=str)
        self._writer.add_text("run", "\n".join(f"    {line}" for line in text.splitlines()), about["start_step"])

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in `output_dir/wandb`. Its environment variables count: WANDB_MODE, WANDB_PROJECT,
    WANDB_ENTITY, ..."""

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir

    def start(self, about: Mapping[str, Any]) -> None:
        import wandb

        # its own capture of the terminal would stand in the way of the console, and its probes beside the training
        settings = wandb.Settings(
            console="off", x_disable_stats=True, disable_git=True, silent=True, init_timeout=INIT_SECONDS
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "moetrain"),
            name=str(about["run"]),
            id=self._run_id(goes_on=bool(about["start_step"])),
            resume="allow",
            dir=str(self._folder),
            config=dict(about),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()

    def _run_id(self, goes_on: bool) -> str:
        file = self._folder / WANDB_ID_FILE
        if not (goes_on and file.is_file()):
            file.write_text(secrets.token_hex(4), encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()


def step_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a `step` record by name: `train/loss`, `phase_seconds/optimizer`, `busiest_expert/<layer>`, ..."""
    found = {f"train/{name}": value for name, value in record.items() if name != "step" and _is_number(value)}
    for name, seconds in (record.get("phase_seconds") or {}).items():
        found[f"phase_seconds/{name}"] = seconds
    for layer, load in enumerate((record.get("layers") or {}).get("max_over_mean", ())):
        found[f"busiest_expert/{layer}"] = load
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    """NaN and infinity are numbers: both libraries show them as such."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wandb_key() -> bool:
    """Whether its library finds somebody to log in as, by WANDB_API_KEY or an earlier `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
