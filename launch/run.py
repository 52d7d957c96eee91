"""What a launch is made of: a run as a value, and the configuration that its flags make of it."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from containers.spec import one_line
from moetrain.config import RunConfig, load_config

LOCAL_RANKS = 2
"""Ranks of `--local` without GPUs."""
LOCAL_SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"seq_len": 64, "batch_size": 1, "cache_dir": None},
    "train": {"steps": 4, "grad_accum": 1, "eval_every": 0, "eval_rows": 4, "max_minutes": None, "sample_prompt": None},
    "checkpoint": {"every": 2, "export": False},
    "optim": {"warmup_steps": 0},
}


@dataclass(frozen=True)
class Run:
    """One training run. `config` has the sections of `moetrain.config.RunConfig`."""

    name: str
    config: Mapping[str, Any]
    nodes: int
    gpus_per_node: int = 8
    time: str = "1-00:00:00"
    """Time limit of a job, as sbatch takes it; the run goes on in the next job."""
    comment: str = ""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """Transformers configuration of the checkpoint, to plan with where the checkpoint is not at hand."""
    small: Mapping[str, Any] = field(default_factory=dict)
    """Sizes that replace those of `architecture` in `--local`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise ValueError(f"name {self.name!r} of the run: take letters, digits and ._-")
        for name in ("time", "comment"):
            try:
                one_line(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name} of the run {error}") from None
        if "\\" in self.comment:  # sbatch takes it for an escape, between single quotes too
            raise ValueError("comment of the run holds a backslash; take it out")


@dataclass(frozen=True)
class Sweep:
    """An array of jobs that differ in one value."""

    key: str
    values: tuple[str, ...]
    parallel: int
    """How many of them run at a time."""


def parse_sweep(text: str) -> Sweep:
    """`optim.lr=1e-5,2e-5,5e-5%2`: three jobs, two at a time.

    Raises:
        ValueError: it is of another form.
    """
    found = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)=([^,%]+(?:,[^,%]+)*)(?:%([1-9]\d*))?", text)
    if not found:
        raise ValueError(f"--array {text!r} is not section.key=VALUE,VALUE,... or section.key=VALUE,VALUE,...%PARALLEL")
    values = tuple(found[2].split(","))
    if len(set(values)) < len(values):
        raise ValueError(f"--array {text!r} names a value twice; each job needs one of its own")
    return Sweep(found[1], values, int(found[3] or len(values)))


def parse_minutes(text: str) -> int:
    """Minutes of a time limit in one of sbatch's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; seconds are rounded up.

    Raises:
        ValueError: it is of another form, or no time at all.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise ValueError(f"--time {text!r} is not one of M, M:S, H:M:S, D-H, D-H:M, D-H:M:S")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (60, 1) if days is None and len(numbers) < 3 else (3600, 60, 1)
    seconds = int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))
    if not seconds:
        raise ValueError(f"--time {text!r} is no time at all")
    return -(-seconds // 60)


def configure(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """A validated configuration with dotted overrides applied; raises ValueError as `load_config` does."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(dict(raw), file)
        file.flush()
        return load_config(file.name, list(overrides))


def scaled_down(run: Run, raw: Mapping[str, Any], ranks: int, output_dir: Path | None = None) -> dict[str, Any]:
    """The same run small enough for any machine: the same sections, a tiny model of the same architecture with random
    weights, a few steps of short rows, experts over `ranks` ranks. Data that is not here becomes the source code of
    Python's standard library.

    Args:
        output_dir: by default runs/local/ and the run's name, which is not that of the whole run.
    """
    small: dict[str, Any] = copy.deepcopy(dict(raw))
    output_dir = output_dir or Path("runs") / "local" / run.name
    small["output_dir"] = str(output_dir)
    for section, values in LOCAL_SECTIONS.items():
        small[section] = {**small.get(section, {}), **values}
    small["model"]["path"] = str(output_dir / "start")
    if run.architecture and raw["model"]["path"] == run.config["model"]["path"]:
        small["model"]["create"] = {"vocab_size": 512, "config": {**run.architecture, **run.small, "vocab_size": 512}}
    elif not small["model"].get("create"):
        raise ValueError(
            f"{run.name} has no architecture of {raw['model']['path']} to make a small copy of; set model.create, or "
            "try it without --local"
        )
    small["parallel"] = {"processes": ranks, "ep_size": min(ranks, small.get("parallel", {}).get("ep_size", 1))}
    if any(
        not source["path"].startswith("python:") and not Path(source["path"]).exists() for source in _sources(small)
    ):
        small["data"]["train"], small["data"]["validation"] = [{"path": "python:stdlib"}], None
    return small


def _sources(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*raw["data"]["train"], *(raw["data"].get("validation") or [])]
