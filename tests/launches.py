"""A run, a site and a job without Slurm, for tests."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.job import Job
from launch.run import Run
from launch.submit import job_of, parse

MODEL = {"path": "start", "create": {"config": {"model_type": "qwen3_moe", "num_experts": 8}}}
CONFIG = {
    "output_dir": "runs/test",
    "model": MODEL,
    "data": {"train": [{"path": "python:stdlib"}]},
    "train": {"steps": 3},
}
RUN = Run(name="test", config=CONFIG, nodes=2)
QUOTED = ["$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "', "a b", "#", "*", "!x", "~"]
"""What a shell, or sbatch's own parser, could take for more than text."""


def write_site(shared: Path, *tables: str, paths: str = "", slurm: str = "") -> Path:
    file = shared.parent / "site.toml"
    text = f'[paths]\nshared = "{shared}"\n{paths}\n[slurm]\npreflight = false\n{slurm}\n'
    file.write_text(text + "\n".join(tables), encoding="utf-8")
    return file


def make_job(site: Path, *flags: str, run: Run = RUN) -> Job:
    return job_of(run, run.config, parse(run, ["--site", str(site), *flags]))


def python_without_moetrain(folder: Path) -> Path:
    """A Python that has its standard library alone."""
    file = folder / "bare-python"
    file.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec {sys.executable} -S "$@"\n')
    file.chmod(0o755)
    return file


def container(image: Path, *more: str, mounts: str | None = None) -> str:
    mounts = mounts or f"{image.parent}:{image.parent}"
    return "\n".join(["[container]", f'image = "{image}"', f'mounts = ["{mounts}"]', *more])
