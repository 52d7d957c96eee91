"""Nothing in metrics stops or slows training: hostile clients, full disks, terminals that hang, crashes."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import resource
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import moetrain
from moetrain.config import MetricsConfig
from moetrain.metrics import Metrics, recorder
from moetrain.metrics import endpoint as endpoint_module
from moetrain.metrics import file as file_module
from moetrain.metrics.background import Background
from moetrain.metrics.endpoint import Endpoint
from moetrain.metrics.file import RunFile
from tests.cpu.test_metrics import lines, step_record, wait_for
from tests.runs import tiny_run, write_text

ROOT = Path(moetrain.__file__).parents[1]
START, STOP = b"GET /metrics HTTP/1.0\r\n", b"\r\n"
STALLED = 0.5
"""Seconds: a step that takes so long for its record was held up; one costs a ten-thousandth."""


@pytest.fixture
def open_metrics(tmp_path: Path) -> Iterator[Callable[..., Metrics]]:
    """Makes metrics with an endpoint on any port; closes them at the end."""
    opened: list[Metrics] = []

    def start(**config: Any) -> Metrics:
        console = config.pop("console", None) or Console(file=io.StringIO())
        opened.append(Metrics(MetricsConfig(prometheus_port=0, **config), tmp_path, 0, 10_000, console=console))
        return opened[-1]

    yield start
    for metrics in opened:
        metrics.close()


@pytest.fixture
def clients() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    yield opened
    for client in opened:
        client.close()


def connect(metrics: Metrics) -> socket.socket:
    return socket.create_connection(("127.0.0.1", metrics.endpoint.port), timeout=10)


def page(metrics: Metrics) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.endpoint.port}/metrics", timeout=10) as response:
        return response.read().decode()


def train(metrics: Metrics, seconds: float, first: int = 1, least: int = 1) -> list[float]:
    """Records steps for a while, and at least so many; the seconds that each took for its record."""
    costs: list[float] = []
    end, step = time.monotonic() + seconds, first
    while time.monotonic() < end or len(costs) < least:
        time.sleep(0.002)
        begin = time.perf_counter()
        with metrics.phase("forward_backward"):
            pass
        metrics.step(step_record(step))
        costs.append(time.perf_counter() - begin)
        step += 1
    return costs


def test_clients_that_never_finish_their_request(
    open_metrics: Callable[..., Metrics], clients: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "CONNECTIONS_PER_SECOND", 1000.0)
    monkeypatch.setattr(endpoint_module, "REQUEST_SECONDS", 60.0)
    metrics = open_metrics()
    threads = threading.active_count()
    for number in range(3 * endpoint_module.MAX_CONNECTIONS):
        clients.append(connect(metrics))
        clients[-1].sendall((b"", START, START + b"X: y\r\n", b"\x00\xff" * 10)[number % 4])
    assert max(train(metrics, 0.5)) < STALLED
    begin = time.monotonic()
    assert "moetrain_step " in page(metrics), "whoever asks properly is answered"
    assert time.monotonic() - begin < 10
    wait_for(lambda: threading.active_count() <= threads + endpoint_module.MAX_CONNECTIONS + 1)
    closed = 0
    for client in clients[: endpoint_module.MAX_CONNECTIONS]:
        client.settimeout(30)
        closed += client.recv(1) == b""
    assert closed == endpoint_module.MAX_CONNECTIONS, "the oldest made room"


def test_clients_that_are_silent_for_long_are_let_go(
    open_metrics: Callable[..., Metrics], clients: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "REQUEST_SECONDS", 0.2)
    metrics = open_metrics()
    clients.append(connect(metrics))
    clients[0].sendall(START)
    clients[0].settimeout(30)
    assert clients[0].recv(1) == b""


def test_clients_that_are_silent_in_the_handshake(
    tmp_path: Path, clients: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "CONNECTIONS_PER_SECOND", 1000.0)
    monkeypatch.setattr(endpoint_module, "REQUEST_SECONDS", 60.0)
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=x"]
    try:
        subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl makes the certificate")
    endpoint = Endpoint(MetricsConfig(tls_certificate=certificate, tls_key=key), 0, lambda: b"moetrain_step 1\n")
    try:
        for _ in range(2 * endpoint_module.MAX_CONNECTIONS):
            clients.append(socket.create_connection(("127.0.0.1", endpoint.port), timeout=10))
        context = ssl._create_unverified_context()
        url = f"https://127.0.0.1:{endpoint.port}/metrics"
        assert urllib.request.urlopen(url, timeout=30, context=context).read() == b"moetrain_step 1\n"
        clients[0].settimeout(30)
        assert clients[0].recv(1) == b"", "the oldest made room"
    finally:
        endpoint.close()


def test_a_flood_of_requests_costs_a_bounded_share(open_metrics: Callable[..., Metrics], tmp_path: Path) -> None:
    metrics = open_metrics()
    made: list[float] = []
    make = metrics.series.page

    def counted() -> bytes:
        made.append(time.monotonic())
        return make()

    metrics.endpoint._server.page._make = counted
    quiet = statistics.median(train(metrics, 1.0))
    script = f"""
import socket, threading, time
def hammer():
    while True:
        try:
            with socket.create_connection(("127.0.0.1", {metrics.endpoint.port}), timeout=1) as client:
                client.sendall(b"GET /metrics HTTP/1.0\\r\\n\\r\\n")
                client.recv(1)
        except OSError:
            time.sleep(0.001)
for _ in range(8):
    threading.Thread(target=hammer, daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""
    flood = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert flood.stdout.readline() == b"ready\n"
        flooded = train(metrics, 3.0, first=1000)
        assert max(flooded) < STALLED
        assert statistics.median(flooded) < 10 * quiet
        assert made and all(after - before >= endpoint_module.PAGE_SECONDS for before, after in pairwise(made)), "pages"
    finally:
        flood.kill()
        flood.wait()


def test_a_client_that_never_reads_its_answer(
    open_metrics: Callable[..., Metrics], clients: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "REQUEST_SECONDS", 0.3)
    metrics = open_metrics()
    long = b"x" * 50_000_000
    metrics.endpoint._server.page._make = lambda: long
    clients.append(connect(metrics))
    clients[0].sendall(START + STOP)
    assert max(train(metrics, 1.0)) < STALLED
    wait_for(lambda: not metrics.endpoint._server._open)


def test_a_page_that_cannot_be_made(open_metrics: Callable[..., Metrics]) -> None:
    metrics = open_metrics()
    make = metrics.series.page
    metrics.endpoint._server.page._make = lambda: 1 / 0
    with pytest.raises(OSError, match="closed connection"):
        page(metrics)
    assert train(metrics, 0.05)
    metrics.endpoint._server.page._make = make
    assert "moetrain_step " in page(metrics)


def test_a_dead_endpoint(open_metrics: Callable[..., Metrics]) -> None:
    metrics = open_metrics()
    os.close(metrics.endpoint._server.fileno())
    assert max(train(metrics, 0.3)) < STALLED


def test_a_terminal_that_hangs(
    tmp_path: Path,
    open_metrics: Callable[..., Metrics],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(recorder, "CLOSE_SECONDS", 0.3)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        metrics = open_metrics(console=Console(file=pipe, width=80))
        costs = train(metrics, 1.0, least=2**16 // 80 + 100)  # some 80 bytes a step into 64 KiB that nobody reads
        costs += train(metrics, 1.0, first=1 + len(costs))
        assert max(costs) < STALLED
        begin = time.monotonic()
        metrics.close()
        assert time.monotonic() - begin < 3
        assert "not all records reached the terminal" in caplog.text
        os.set_blocking(reader, False)
        while metrics_thread := [t for t in threading.enumerate() if t.name == "moetrain-records"]:
            try:
                os.read(reader, 2**16)
            except BlockingIOError:
                metrics_thread[0].join(0.05)
    os.close(reader)


def test_a_terminal_that_is_gone(open_metrics: Callable[..., Metrics], caplog: pytest.LogCaptureFixture) -> None:
    gone = io.StringIO()
    metrics = open_metrics(console=Console(file=gone))
    gone.close()
    train(metrics, 0.1)
    metrics.close()
    assert caplog.text.count("a record of the run was lost, training goes on") == 1


def test_a_full_disk_leaves_whole_lines_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(file_module, "RETRY_SECONDS", 0.05)
    # the limit holds for every file, and standard output may be a longer one
    monkeypatch.setattr(logging.getLogger("moetrain"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("moetrain"), "propagate", True)
    path, before = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    file = RunFile(path, 0)
    for step in range(1, 4):
        file.write("step", {"step": step, "loss": 1.0}, 0.0)
    size = path.stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))  # half of the next line has room
        for step in range(4, 8):
            file.write("step", {"step": step, "loss": 1.0}, 0.0)
        assert path.stat().st_size == size, "nothing of a line is better than half"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    time.sleep(0.1)
    file.write("step", {"step": 8, "loss": 1.0}, 0.0)
    assert [record["step"] for record in lines(tmp_path)] == list(range(1, 9))
    file.close()
    assert caplog.text.count("cannot be written, training goes on: File too large") == 1
    assert caplog.text.count("is written again") == 1


def test_a_disk_that_stays_full_is_named_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_module, "BACKLOG", 5)

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = RunFile(tmp_path / "metrics.jsonl", 0)
    monkeypatch.setattr(os, "write", no_room)
    for step in range(8):
        file.write("step", {"step": step}, 0.0)
    file.close()
    assert "metrics.jsonl lacks 8 records" in caplog.text and "No space left on device" in caplog.text


def test_a_run_goes_on_without_its_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The directory vanishes before the first record, as a file system does that is unmounted."""
    console = io.StringIO()
    metrics = Metrics(MetricsConfig(), tmp_path / "gone" / "out", 0, 10, console=Console(file=console))
    metrics.resume(3)
    for step in (4, 5):
        metrics.step(step_record(step))
    metrics.close()
    assert "metrics.jsonl cannot be written, training goes on" in caplog.text
    assert [line.split()[0] for line in console.getvalue().splitlines()] == ["step", "4", "5"]


def test_more_records_than_anyone_can_write_are_dropped() -> None:
    go = threading.Event()
    ran: list[int] = []
    background = Background(limit=10)
    background.submit(lambda: go.wait() and None)
    wait_for(lambda: background._jobs.qsize() == 0)
    for number in range(50):
        background.submit(partial(ran.append, number))
    go.set()
    assert not background.close(60.0), "it says that something was dropped"
    assert ran == list(range(10))


def test_a_stop_that_monitoring_should_see_waits_only_where_it_watches(
    open_metrics: Callable[..., Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "LAST_WORDS_SECONDS", 60.0)
    monkeypatch.setattr(endpoint_module, "PAGE_SECONDS", 0.0)
    metrics = open_metrics()
    begin = time.monotonic()
    assert not metrics.watched
    metrics.nonfinite(1, math.nan, 1.0, metrics.watched)
    assert time.monotonic() - begin < 30
    page(metrics)
    assert metrics.watched
    monkeypatch.setattr(recorder, "LAST_WORDS_SECONDS", 1.5)
    begin = time.monotonic()
    stopping = threading.Thread(target=metrics.nonfinite, args=(2, math.nan, 1.0, True))
    stopping.start()
    wait_for(lambda: "moetrain_nonfinite_steps_total 2.0" in page(metrics))
    stopping.join()
    assert time.monotonic() - begin > 1.5


@pytest.mark.timeout(600)
def test_a_crash_stays_in_service_discovery_and_a_clean_end_does_not(tmp_path: Path) -> None:
    write_text(tmp_path)
    raw = tiny_run(tmp_path, metrics={"prometheus_port": 0}, checkpoint={"export": False}, train={"steps": 4000})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "moetrain", "train", str(tmp_path / "run.yaml")]
    discovery = tmp_path / "out" / "discovery"

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def steps() -> list[int]:
        file = tmp_path / "out" / "metrics.jsonl"
        return (
            [record["step"] for record in lines(tmp_path / "out") if record["kind"] == "step"] if file.exists() else []
        )

    process = start()
    try:
        wait_for(lambda: bool(steps()), 120)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (file,) = discovery.iterdir()
        crashed = json.loads(file.read_text())
        process = start()
        wait_for(lambda: json.loads(file.read_text()) != crashed, 120)
        wait_for(lambda: (tmp_path / "out" / "metrics.1.jsonl").exists() and len(steps()) > 2, 120)
        run, restart = lines(tmp_path / "out")[:2]
        assert run["restarts"] == restart["restarts"] == 1, "it has no checkpoint, and is the same run all the same"
        with urllib.request.urlopen(f"http://{json.loads(file.read_text())[0]['targets'][0]}/metrics") as response:
            assert b"\nmoetrain_restarts 1.0\n" in response.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
        assert not discovery.exists()
    finally:
        process.kill()
        process.wait()
