"""Prometheus and Alertmanager in tests, and whom they tell."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from monitoring.stack import PACKAGES

missing = [name for name in (*PACKAGES, "promtool", "amtool") if not shutil.which(name)]
needs_prometheus = pytest.mark.skipif(
    bool(missing), reason=f"not installed: {', '.join(missing)}; apt-get install {' '.join(PACKAGES.values())}"
)


@dataclass
class Told:
    """What Alertmanager sent."""

    url: str
    alerts: list[dict[str, Any]] = field(default_factory=list)

    def about(self, of: str) -> list[dict[str, Any]]:
        """Alerts of a run, or of a node of the run's name."""
        return [alert for alert in self.alerts if of in (alert["labels"].get("run"), run_of_node(alert["labels"]))]


def run_of_node(labels: dict[str, str]) -> str:
    return labels.get("node", "").rpartition("-")[0]


@contextmanager
def webhook() -> Iterator[Told]:
    """A server on loopback that writes down what it is told."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.alerts += [{**alert, "at": time.monotonic()} for alert in body["alerts"]]
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told = Told(f"http://127.0.0.1:{server.server_address[1]}/")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    """Samples of an instant query."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return result


def value(prometheus: str, expression: str) -> float | None:
    """The only sample of an instant query; None where there is none."""
    found = query(prometheus, expression)
    assert len(found) < 2, found
    return float(found[0]["value"][1]) if found else None
