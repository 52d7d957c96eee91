"""`--local`: a small copy of a run, through submitit's local executor."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit

from launch.job import ROOT
from launch.run import LOCAL_RANKS, Run, configure, scaled_down
from moetrain.guard import check_writable
from moetrain.launcher import USER_ERROR, rank_environment, reserved_port
from moetrain.report import config_yaml

TIMEOUT_MINUTES = 30
POLL_SECONDS = 0.2


def run_local(run: Run, raw: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """Run the small copy, one process a GPU of this machine, or two; shows rank 0's output. Returns the exit code.

    Raises:
        ValueError: the configuration is wrong, or its output directory cannot be written.
    """
    ranks = _gpus() or LOCAL_RANKS
    full = configure(raw, overrides)  # what is wrong with the run itself is wrong with its copy too
    raw = {**raw, "model": {**raw["model"], "path": full.model.path}}
    others = [override for override in overrides if not override.startswith("model.path=")]  # the copy has its own
    wanted = Path(full.output_dir) if any(override.startswith("output_dir=") for override in overrides) else None
    config = configure(scaled_down(run, raw, ranks, wanted), others)
    check_writable(config.output_dir)
    folder = Path(config.output_dir) / "job"
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder.absolute() / "config.yaml"
    config_file.write_text(config_yaml(config), encoding="utf-8")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # the ranks import this file
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(
        tasks_per_node=ranks, gpus_per_node=_gpus(), timeout_min=TIMEOUT_MINUTES, stderr_to_stdout=True
    )
    with reserved_port() as port:
        job = executor.submit(train_rank, str(config_file), ranks, port)
        print(f"{run.name}, a small copy on {ranks} ranks; its folder: {folder}", flush=True)
        _show(job, ranks)
    if telling := [rank for rank in range(ranks) if _told(job.task(rank))]:
        if telling[0] > 0:
            sys.stderr.write(job.task(telling[0]).paths.stdout.read_text(errors="replace"))
        return USER_ERROR
    codes = [_code(job.task(rank)) for rank in range(ranks)]
    for error in (code for code in codes if isinstance(code, Exception)):
        print(error, file=sys.stderr)
        return 1
    return max(code for code in codes if isinstance(code, int))


def train_rank(config_file: str, ranks: int, port: int) -> int:
    """One rank, in a process of submitit's; the exit code of `moetrain train`."""
    from moetrain.cli import main

    rank = submitit.JobEnvironment().global_rank
    os.environ.update(rank_environment(rank, ranks, port))
    return main(["train", config_file])


def _code(task: submitit.Job[int]) -> int | Exception:
    """Exit code of a rank, or the error with which it ended."""
    try:
        return task.result()
    except submitit.core.utils.UncompletedJobError as error:
        return error


def _told(task: submitit.Job[int]) -> bool:
    """Whether a rank has ended by telling the user what to mend."""
    result = task.paths.result_pickle
    return result.exists() and pickle.loads(result.read_bytes()) == ("success", USER_ERROR)


def _show(job: submitit.Job[int], ranks: int) -> None:
    """Copy rank 0's log to this terminal until the job has ended. It ends with the first rank that tells the user what
    to mend: the others would wait for that rank."""
    log = job.task(0).paths.stdout
    shown = 0
    while True:
        done = job.done()
        if not done and any(_told(job.task(rank)) for rank in range(ranks)):
            job.cancel()
        if log.exists():
            text = log.read_bytes()[shown:]
            shown += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        if done:
            return
        time.sleep(POLL_SECONDS)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
