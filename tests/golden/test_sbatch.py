"""The batch script of the largest run, line for line. `python -m tests.golden.test_sbatch` writes it anew."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from launch import submit
from launch.job import ROOT
from launch.submit import job_of, parse
from launch.ultra_550b import RUN

GOLDEN = Path(__file__).with_name("ultra_550b.sbatch")


def script() -> str:
    arguments = parse(RUN, ["--nodes", "16", "--spares", "1", "--site", str(ROOT / "cluster" / "site.example.toml")])
    with mock.patch.object(submit.time, "strftime", lambda _: "STAMP"):
        return job_of(RUN, RUN.config, arguments).script() + "\n"


def test_the_batch_script_of_ultra() -> None:
    assert script() == GOLDEN.read_text(encoding="utf-8")


if __name__ == "__main__":
    GOLDEN.write_text(script(), encoding="utf-8")
