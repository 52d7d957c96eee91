"""All simulated targets on one port, told apart by their paths, and the files in which Prometheus finds them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from monitoring.demo.faults import active
from monitoring.demo.hardware import dcgm_page, node_page
from monitoring.demo.run import Run

TICK_SECONDS = 0.05


class Demo:
    """Serves runs until `close`.

    Args:
        discovery: directory for the discovery files; they are removed at the end.
    """

    def __init__(self, runs: Sequence[Run], discovery: str | Path, port: int = 0) -> None:
        self.runs = {run.shape.name: run for run in runs}
        self._discovery = Path(discovery)
        self._begin = time.monotonic()
        self._stop = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self.answer))
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._server.serve_forever, self._tick)
        ]
        self._discovery.mkdir(parents=True, exist_ok=True)
        self._found: dict[Path, bool] = {}
        self._write_discovery()
        for thread in self._threads:
            thread.start()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._begin

    def answer(self, path: str) -> bytes | None:
        """The page of a target; None for one that is down or not there."""
        kind, _, rest = path.strip("/").partition("/")
        name, _, place = rest.partition("/")
        run, seconds = self.runs.get(name), self.seconds
        if run is None:
            return None
        if kind == "rank" and place.isdecimal() and int(place) < run.shape.ranks:
            return run.page(int(place)) if run.answers(int(place), seconds) else None
        if kind not in ("dcgm", "node") or place not in run.shape.node_names:
            return None
        trouble = active(run.faults, seconds)
        hit = place == run.shape.node(run.victim)
        if hit and ("node-loss" in trouble or ("exporter-down" in trouble and kind == "dcgm")):
            return None
        return (dcgm_page if kind == "dcgm" else node_page)(run, place, seconds)

    def close(self) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()
        for path in self._found:
            path.unlink(missing_ok=True)

    def _tick(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            for run in self.runs.values():
                run.advance(self.seconds)
            self._write_discovery()

    def _write_discovery(self) -> None:
        for name, run in self.runs.items():
            path = self._discovery / f"moetrain-{name}.json"
            wanted = run.discoverable(self.seconds)
            if wanted and not self._found.get(path):
                write_targets(path, rank_targets(run, self.port))
                for kind in ("dcgm", "node"):
                    hardware = path.with_name(f"{kind}-{name}.json")
                    write_targets(hardware, hardware_targets(run, kind, self.port))
                    self._found[hardware] = True
            elif not wanted:
                path.unlink(missing_ok=True)
            self._found[path] = wanted


def rank_targets(run: Run, port: int) -> list[dict[str, Any]]:
    """The groups of `file_sd_configs`, with the labels that the launcher gives to real ranks."""
    shape = run.shape
    return [
        {
            "targets": [f"127.0.0.1:{port}"],
            "labels": {
                "__metrics_path__": f"/rank/{shape.name}/{rank}",
                "run": shape.name,
                "slurm_job_id": "4711",
                "node": shape.node(rank),
                "rank": str(rank),
            },
        }
        for rank in range(shape.ranks)
    ]


def hardware_targets(run: Run, kind: str, port: int) -> list[dict[str, Any]]:
    """The groups of one kind of exporter: dcgm, node."""
    name = run.shape.name
    return [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"__metrics_path__": f"/{kind}/{name}/{node}", "node": node}}
        for node in run.shape.node_names
    ]


def write_targets(path: Path, groups: Sequence[dict[str, Any]]) -> None:
    """Whole or not at all: Prometheus watches the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(groups, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _handler(answer: Callable[[str], bytes | None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            page = answer(self.path)
            self.send_response(503 if page is None else 200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.send_header("Content-Length", str(len(page or b"")))
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, format: str, *args: Any) -> None:
            """A request every few seconds is no news."""

    return Handler
