"""`moetrain top --prometheus` against a real Prometheus that scrapes two ranks, and against servers that are none."""

from __future__ import annotations

import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from moetrain import cli
from moetrain.config import MetricsConfig
from moetrain.metrics import EvalRecord, Expectation, LayerLoads, Memory, Metrics, StepRecord, recorder
from moetrain.metrics.phases import PhaseClock
from moetrain.top.prometheus import PrometheusSource
from moetrain.top.snapshot import warnings
from monitoring.stack import reserved_port
from tests.cpu.test_metrics import wait_for
from tests.cpu.test_top import read_until, run_in_terminal

RUN = 'a "quoted\\ run'
CONFIG = """
global: {{scrape_interval: 200ms, evaluation_interval: 500ms}}
rule_files: [rules.yml]
scrape_configs:
  - job_name: moetrain
    file_sd_configs: [{{files: ["{discovery}/*.json"], refresh_interval: 500ms}}]
"""
RULES = """
groups:
  - name: test
    rules: [{alert: SomethingIsUp, expr: "max by (run) (moetrain_step) > 1"}]
"""


class Clock:
    """Of the ranks' phases: what they compute takes the same time on a machine that does other things."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def take_steps(ranks: list[Metrics], step: int) -> None:
    """One step of 20 ms on two ranks, the second of which computes longer."""
    for rank, metrics in enumerate(ranks):
        with metrics.phase("forward_backward"):
            CLOCK.now += 0.02 if rank else 0.005
        metrics.step(
            StepRecord(
                step=step, loss=4.0 / step, grad_norm=1.5, lr=1e-3, tokens=100, tokens_per_second=1.0,
                step_seconds=0.02, memory_bytes=2**30, expert_load_max_over_mean=3.0, idle_experts=1,
                layers=LayerLoads([1.5, 3.0], [0.5, 0.0], [0, 1], [0.9, 0.8]), rank_tokens=64,
                memory=Memory(2**30, 2 * 2**30, (3 + rank) * 2**30, 8 * 2**30),
            )
        )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prometheus that watches a run of two ranks, for as long as the tests go."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus to ask")
    folder = tmp_path_factory.mktemp("prometheus")
    config = MetricsConfig(run_name=RUN, prometheus_port=0, discovery_dir=str(folder / "discovery"))
    (folder / "out").mkdir()
    with mock.patch.object(recorder, "PhaseClock", partial(PhaseClock, CLOCK)):
        ranks = [Metrics(config, folder / "out", r, 5000, console=Console(file=io.StringIO())) for r in range(2)]
    ranks[0].announce([metrics.target() for metrics in ranks])
    for metrics in ranks:
        metrics.expect(Expectation(tokens_per_second_per_gpu=1e9, flops_per_token=1e6, peak_flops=1e12))
        metrics.describe({"4": 8, "9": 8}, {}, checkpoint_every=100)
    (folder / "prometheus.yml").write_text(CONFIG.format(discovery=folder / "discovery"))
    (folder / "rules.yml").write_text(RULES)
    stop = threading.Event()

    def train() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            time.sleep(0.025)
            take_steps(ranks, step)
            if step == 20:
                ranks[0].eval(EvalRecord(step=step, loss=2.5, tokens=10))
                with ranks[0].checkpoint(step):
                    pass

    thread = threading.Thread(target=train)
    thread.start()
    try:
        with prometheus_in(folder) as (url, _):
            wait_until_rates_are_known(url)
            yield url
    finally:
        stop.set()
        thread.join()
        for metrics in ranks:
            metrics.close()


@contextmanager
def prometheus_in(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server with the folder's prometheus.yml, its address, and the process, which is gone at the end."""
    with reserved_port(0) as port:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()
            process.wait()


def wait_until_rates_are_known(url: str) -> None:
    query = "/api/v1/query?query=count(rate(moetrain_tokens_total[2m])%20%3E%200)%20%2B%20count(ALERTS)"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url + query, timeout=5) as response:
                if [r["value"][1] for r in json.load(response)["data"]["result"]] == ["3"]:
                    return
        except OSError:
            pass
        time.sleep(0.3)
    pytest.fail("Prometheus never saw the run")


def test_a_run_by_its_name(server: str) -> None:
    source = PrometheusSource(server, RUN)
    shot = source.read()
    assert (shot.state, shot.ended, shot.total_steps, shot.ranks, shot.ranks_up) == ("train", False, 5000, 2, 2)
    assert shot.step > 1 and shot.losses and 0 < shot.losses[-1] <= 4
    assert shot.validation_loss == 2.5 and shot.lr == 1e-3
    # exact although the server has seen seconds of the two minutes that it is asked for
    assert shot.speed == pytest.approx(64 / 0.02, rel=0.01) and shot.of_plan < 0.01
    assert shot.mfu == pytest.approx(64e6 / 0.02 / 1e12, rel=0.01)
    assert shot.speeds and shot.speeds[-1] == pytest.approx(64 / 0.02, rel=0.01)
    assert shot.step_seconds == pytest.approx(0.02, rel=0.01)
    assert shot.left_seconds / (5000 - shot.step) == pytest.approx(0.025, rel=0.3)  # whole steps in a span of seconds
    assert -5 < shot.silence < 60
    assert shot.memory == 4 * 2**30 and shot.memory_rank == "1" and shot.memory_reserved == 2 * 2**30
    assert (shot.balance, shot.balance_layer, shot.idle_experts) == (3.0, "9", 1.0)
    assert shot.slow_ranks[0].rank == "1" and shot.slow_ranks[0].node
    assert shot.slow_ranks[0].seconds > 2 * shot.slow_ranks[1].seconds
    assert sum(shot.phases.values()) == pytest.approx(1) and shot.phases["forward_backward"] > 0.1
    assert shot.checkpoint_step == 20 and shot.checkpoint_interval == pytest.approx(2, rel=0.01)
    assert shot.alerts == ["SomethingIsUp"]
    assert not shot.nonfinite and not shot.checkpoint_failed and shot.redos_share == 0
    assert any("rank 1" in warning for warning in warnings(shot))


def test_by_the_command_line(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", RUN, "--prometheus", server, "--once"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("step ") and "! alerts firing: SomethingIsUp" in printed


def test_a_name_that_the_server_does_not_know(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "other", "--prometheus", server]) == 2
    assert f"it knows {RUN}" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("answer", "words"),
    [((200, b"<html>"), "is no Prometheus"), ((401, b""), "name:password@host"), ((500, b""), "answers 500")],
    ids=["html", "password", "error"],
)
def test_servers_that_cannot_help(answer: tuple[int, bytes], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Authorization"))
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever).start()
        url = f"http://me:p%40ss@127.0.0.1:{web.server_port}/prom"
        assert cli.main(["top", "run", "--prometheus", url]) == 2
        web.shutdown()
    printed = capsys.readouterr().err
    assert words in printed and "p%40ss" not in printed
    assert set(asked) == {"Basic bWU6cEBzcw=="}


def answer_of(query: str, step: int) -> dict[str, Any]:
    """What a server says of a run that is at `step`, to the little of what is asked."""
    known = {"max(moetrain_step{": step, "max(moetrain_steps_planned{": 100, "max(moetrain_loss{": 2.5}
    value = next((number for start, number in known.items() if query.startswith(start)), None)
    if query.startswith("count by (phase)"):
        samples = [{"metric": {"phase": "done" if step > 3 else "train"}, "value": [0, "1"]}]
    else:
        samples = [] if value is None else [{"metric": {}, "value": [0, str(value)], "values": [[0, str(value)]]}]
    return {"status": "success", "data": {"result": samples}}


def test_a_server_that_goes_away_and_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    """It refuses, breaks off amid an answer, or says something else: a warning each, and the last view stays."""
    looks = [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)["query"][0]
            looks[0] += query.startswith("max(moetrain_step{")
            if 2 <= looks[0] < 4:
                self.send_error(503)
                return
            body = json.dumps(answer_of(query, looks[0] if looks[0] < 9 else 99)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if 4 <= looks[0] < 6:
                body = body[: len(body) // 2]
            self.wfile.write(b'{"status": "no"}' + b" " * len(body) if 6 <= looks[0] < 8 else body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.daemon_threads = True
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}"
        assert cli.main(["top", "run", "--prometheus", url, "--interval", "0.05"]) == 0
        web.shutdown()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 1/100") and printed[-1].endswith("done"), printed
    text = "\n".join(printed)
    assert (
        "! run at 127.0.0.1" in text and "answers 503" in text and "breaks off" in text and "is no Prometheus" in text
    )


def test_prometheus_is_killed_while_somebody_watches(tmp_path: Path) -> None:
    """The view in the terminal stays, with a warning, until somebody has seen enough."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus to kill")
    config = MetricsConfig(run_name="watched", prometheus_port=0, discovery_dir=str(tmp_path / "discovery"))
    metrics = Metrics(config, tmp_path, 0, 5000, console=Console(file=io.StringIO()))
    metrics.describe({"0": 8, "1": 8}, {})
    metrics.announce([metrics.target()])
    take_steps([metrics], 41)
    (tmp_path / "prometheus.yml").write_text(
        CONFIG.format(discovery=tmp_path / "discovery").replace("[rules.yml]", "[]")
    )
    try:
        with prometheus_in(tmp_path) as (url, server):
            source = PrometheusSource(url, "watched")
            wait_for(lambda: knows(source, 41), 60)
            viewer, terminal = run_in_terminal("watched", "--prometheus", url, "--interval", "0.2")
            try:
                assert b"step 41 of 5,000" in read_until(terminal, b"step 41 of 5,000")
                server.kill()
                assert b"does not answer" in read_until(terminal, b"does not answer")
                viewer.send_signal(signal.SIGINT)
                after = read_until(terminal, b"never shown")
                assert viewer.wait(60) == 0
                assert b"step 41 of 5,000" in after.rpartition(b"\x1b[?1049l")[2] and b"Traceback" not in after
            finally:
                viewer.kill()
                os.close(terminal)
    finally:
        metrics.close()


def knows(source: PrometheusSource, step: int) -> bool:
    try:
        return source.read().step == step
    except (OSError, ValueError):  # it is on its way
        return False


def test_no_server_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    with reserved_port(0) as port:
        assert cli.main(["top", "run", "--prometheus", f"127.0.0.1:{port}"]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert cli.main(["top", "run", "--prometheus", "ftp://x"]) == 2
    assert "such as http://localhost:9090" in capsys.readouterr().err
