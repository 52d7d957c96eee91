"""Hours of simulated runs in a Prometheus within seconds: what it would have scraped is written as its blocks.

Recorded series and alerts are added by the project's own rules. Backfilling takes recording rules alone, so alerts are
asked for as such, their `for` as a condition on the past.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from monitoring.demo.hardware import dcgm_page, node_page
from monitoring.demo.run import Run
from monitoring.stack import FOLDER, find_program, process, reserved_port, wait_until_ready

EVERY = 15
"""Seconds between two scrapes."""
RULES = ("recording.yml", "alerts.yml")
_RECORDED = re.compile(r"\b(?:run|rank):\w+:\w+|\bALERTS\b")


@contextlib.contextmanager
def prometheus(runs: Sequence[Run], begin: float, seconds: float, folder: Path) -> Iterator[str]:
    """Address of a Prometheus that has watched `runs` from `begin` (Unix time, second 0 of the runs) on.

    Args:
        folder: for its data; must not hold any yet.

    Raises:
        ValueError: Prometheus is not installed; the message has the line that installs it.
    """
    end = begin + seconds // EVERY * EVERY
    samples, data = folder / "samples.txt", folder / "data"
    with samples.open("w", encoding="utf-8") as file:
        for run in runs:
            for at in range(0, int(end - begin) + 1, EVERY):
                run.advance(at)
                _write_scrape(file, run, at, begin + at)
        file.write("# EOF\n")
    _promtool("create-blocks-from", "openmetrics", "--quiet", str(samples), str(data))
    samples.unlink()
    for place, rules in enumerate(_levels(read_rules())):
        path, made = folder / f"rules-{place}.yml", folder / f"made-{place}"
        path.write_text(yaml.safe_dump({"groups": [{"name": f"level-{place}", "rules": rules}]}), encoding="utf-8")
        span = ["--start", f"{begin:.0f}", "--end", f"{end:.0f}", "--eval-interval", f"{EVERY}s"]
        with _serving(folder) as url:
            _promtool("create-blocks-from", "rules", "--url", url, *span, "--output-dir", str(made), str(path))
        for block in made.iterdir():
            shutil.move(block, data / block.name)
    with _serving(folder) as url:
        yield url


def read_rules() -> list[dict[str, Any]]:
    """The project's rules as recording rules."""
    rules = []
    for name in RULES:
        for group in yaml.safe_load((FOLDER / "rules" / name).read_text(encoding="utf-8"))["groups"]:
            rules += [rule if "record" in rule else _as_recording(rule) for rule in group["rules"]]
    return rules


def _as_recording(alert: dict[str, Any]) -> dict[str, Any]:
    """`ALERTS` while the alert fires: its condition held at every evaluation of its `for`."""
    present = f"count without () ({alert['expr']})"
    if "for" in alert:
        number, unit = re.fullmatch(r"(\d+)([smh])", alert["for"]).groups()  # type: ignore[union-attr]
        times = int(number) * {"s": 1, "m": 60, "h": 3600}[unit] // EVERY
        present = f"count_over_time(({present})[{alert['for']}:{EVERY}s]) >= bool {times} > 0"
    labels = {"alertname": alert["alert"], "alertstate": "firing", **alert["labels"]}
    return {"record": "ALERTS", "expr": present, "labels": labels}


def _levels(rules: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rules in the order in which they can be asked: each after all that it reads."""
    left = list(rules)
    while left:
        missing = {rule["record"] for rule in left}
        level = [rule for rule in left if not missing & set(_RECORDED.findall(rule["expr"]))]
        assert level, f"rules read each other: {missing}"
        left = [rule for rule in left if rule not in level]
        yield level


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[str]:
    """A Prometheus with the blocks so far, and nothing to scrape."""
    configuration = folder / "prometheus.yml"
    configuration.write_text("global: {}\n", encoding="utf-8")
    with reserved_port(0) as port, (folder / "prometheus.log").open("ab") as log:
        command = [
            find_program("prometheus"),
            f"--config.file={configuration}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--storage.tsdb.retention.time=10y",
        ]
        url = f"http://127.0.0.1:{port}"
        with process(command, log, {}) as server:
            wait_until_ready("prometheus", server, f"{url}/-/ready", Path(log.name))
            yield url


def _promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", "tsdb", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"promtool tsdb {' '.join(arguments)}: {done.stderr or done.stdout}")


def _write_scrape(file: TextIO, run: Run, at: float, unix: float) -> None:
    """Everything that is scraped of a run's ranks and nodes at one time."""
    shape = run.shape
    if run.discoverable(at):
        for rank in range(shape.ranks):
            node, answers = shape.node(rank), run.answers(rank, at)
            place = f'instance="{node}:{rank % shape.gpus}",job="moetrain",node="{node}",rank="{rank}"'
            labels = f'{place},run="{shape.name}",slurm_job_id="4711"'
            _write_target(file, labels, run.page(rank) if answers else None, unix)
    for node in shape.node_names:
        for job, page in (("dcgm", dcgm_page), ("node", node_page)):
            _write_target(file, f'instance="{node}",job="{job}",node="{node}"', page(run, node, at), unix)


def _write_target(file: TextIO, labels: str, page: bytes | None, unix: float) -> None:
    """One page with its target's labels and its time; None is a target that does not answer."""
    stamp = f" {unix:.3f}\n"
    file.write(f"up{{{labels}}} {int(page is not None)}{stamp}")
    for line in (page or b"").decode().splitlines():
        if line[0] != "#":
            series, _, value = line.rpartition(" ")
            name, brace, rest = series.partition("{")
            file.write(f"{name}{{{labels}{',' + rest if brace else '}'} {value}{stamp}")


def now() -> float:
    """Unix time, at a whole scrape."""
    return time.time() // EVERY * EVERY
