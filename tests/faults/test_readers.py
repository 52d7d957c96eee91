"""Readers of the output that go away, as `head` does when it has its lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from tests.runs import records, tiny_run, write_text


def code_without_reader(*words: str) -> tuple[int, str]:
    """Exit code and errors of `moetrain` whose output nobody reads."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, "-m", "moetrain", *words],
        cwd=Path(__file__).parents[2],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=240)
    return process.returncode, errors


def test_a_training_goes_on(tmp_path: Path) -> None:
    write_text(tmp_path)
    raw = tiny_run(tmp_path, train={"steps": 2}, checkpoint={"export": False})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    code, errors = code_without_reader("train", str(tmp_path / "run.yaml"))
    assert code == 0, errors
    assert list(records(tmp_path)) == [1, 2]


def test_other_verbs_end_as_by_the_signal() -> None:
    code, errors = code_without_reader("doctor")
    assert code == 128 + signal.SIGPIPE and not errors
