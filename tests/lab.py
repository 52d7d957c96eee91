"""Jobs on the lab, a real Slurm of 16 nodes on this machine, for tests."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cluster import lab
from cluster.lab import Lab
from launch.job import ROOT, Job
from launch.run import Run
from launch.submit import job_of, parse
from tests.runs import tiny_run

needs_slurm = pytest.mark.skipif(
    bool(lab.missing_programs()), reason=f"Slurm is not installed: {', '.join(lab.missing_programs())}; make lab-deps"
)

FAKE_RANK = """#!/bin/bash
# A rank without torch. What it does is the last part of its output_dir.
[ "$1" != -c ] || exec {python} "$@"
if [ "$2" = cluster.preflight ]; then
    echo "$SLURMD_NODENAME" > "checked-${{SLURM_RESTART_COUNT:-0}}-$SLURM_NODEID"
    [ "$SLURM_NODEID ${{SLURM_RESTART_COUNT:-0}}" != "$(cat unfit 2> /dev/null)" ] || {{
        echo "CRITICAL gpus 7 x H100, expected 8"
        exit 2
    }}
    exec {python} "$@"
fi
out=$(sed -n 's/^output_dir: //p' "$4")
start=${{SLURM_RESTART_COUNT:-0}}
mkdir -p "$out/env"
env > "$out/env/$start-$RANK.tmp"
save() {{ [ "$RANK" != 0 ] || mkdir -p "$out/checkpoints/step-$(printf %08d "$1")"; }}
wait_for_signal() {{
    mv "$out/env/$start-$RANK.tmp" "$out/env/$start-$RANK"
    while :; do sleep 0.05; done
}}
case ${{out##*/}} in
    stops) [ "$start" != 0 ] || {{ trap 'save 5; exit 75' USR2; wait_for_signal; }} ;;
    waits) wait_for_signal ;;
    lingers) trap '' TERM USR2; sleep 600 & wait_for_signal ;;
    forgets) sleep 600 & ;;
    crashes) mv "$out/env/$start-$RANK.tmp" "$out/env/$start-$RANK"; exit 1 ;;
    wrong) [ "$RANK" != 1 ] || exit 2; wait_for_signal ;;
esac
mv "$out/env/$start-$RANK.tmp" "$out/env/$start-$RANK"
"""
"""Its environment is in `output_dir/env/START-RANK` as soon as it listens to signals, or has ended."""


@contextlib.contextmanager
def running_lab(**settings: Any) -> Iterator[Lab]:
    """A lab that Slurm's commands of this process find; nothing of it is left afterwards."""
    root = Path(tempfile.mkdtemp(prefix="lab-"))
    started = lab.up(root / "lab", **settings)
    try:
        with mock.patch.dict(os.environ, started.environment):
            yield started
    except BaseException:
        for log in sorted((root / "lab" / "log").glob("*")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr)
        raise
    finally:
        lab.down(started)
        shutil.rmtree(root)


def write_site(shared: Path, python: str = sys.executable, preflight: bool = False, **slurm: Any) -> Path:
    """A site file for the lab, its shared directory at `shared`."""
    shared.mkdir(parents=True, exist_ok=True)
    settings = {"cpus_per_task": 1, "memory_gb": 4, "warning_seconds": 20, "preflight": preflight, **slurm}
    lines = "\n".join(f"{name} = {_toml(value)}" for name, value in settings.items())
    file = shared / "site.toml"
    file.write_text(
        f'[slurm]\n{lines}\n[paths]\nshared = "{shared}"\npython = "{python}"\n'
        f'[environment]\nPYTHONPATH = "{ROOT}"\nGLOO_SOCKET_IFNAME = "lo"\nNCCL_IB_HCA = "=mlx5_0,mlx5_1"\n'
        "[preflight]\nfree_gb = 0\ndisk_paths = ['/tmp']\n"
    )
    return file


def write_fake_rank(shared: Path) -> str:
    shared.mkdir(parents=True, exist_ok=True)
    file = shared / "rank"
    file.write_text(FAKE_RANK.format(python=sys.executable))
    file.chmod(0o755)
    return str(file)


def fake_job(shared: Path, does: str, *flags: str, minutes: int = 60, **slurm: Any) -> Job:
    """A job of ranks that do as `FAKE_RANK` says; two ranks on each of two nodes unless the flags say otherwise."""
    site = write_site(shared, write_fake_rank(shared), **slurm)
    raw = tiny_run(shared) | {"output_dir": f"runs/{does}"}
    run = Run(name=does, config=raw, nodes=2, gpus_per_node=2)
    job = job_of(run, raw, parse(run, ["--site", str(site), *flags]))
    return replace(job, minutes=minutes)


def show(job_id: str) -> dict[str, str]:
    """Fields of `scontrol show job`."""
    text = subprocess.run(["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(\w+)=(\S+)", text.splitlines()[0]))


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come in {seconds:.0f} s"
        time.sleep(0.05)
    return value


def ended(job_id: str, seconds: float = 180.0) -> dict[str, str]:
    """Fields of a job as soon as it has ended for good."""
    final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def state() -> dict[str, str] | None:
        fields = show(job_id)
        return fields if fields["JobState"] in final else None

    found: dict[str, str] = wait_until(state, f"the end of job {job_id}", seconds)
    return found


def ranks_ready(shared: Path, does: str, count: int, start: int = 0) -> list[dict[str, str]]:
    """Environments of the fake ranks of a job, in the order of ranks, as soon as all are there."""
    folder = shared / "runs" / does / "env"
    files = [folder / f"{start}-{rank}" for rank in range(count)]
    wait_until(lambda: all(file.exists() for file in files), f"{count} ranks of {does}")
    return [read_environment(file) for file in files]


def read_environment(file: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text().splitlines() if re.match(r"[A-Za-z_]\w*=", line))


def log_of(job: Job, job_id: str) -> str:
    """What the batch script and rank 0 wrote."""
    return (job.folder / f"{job_id}_0_log.out").read_text()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return str([str(item) for item in value])
    return f'"{value}"' if isinstance(value, str) else str(value)
