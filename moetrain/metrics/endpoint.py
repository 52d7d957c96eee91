"""The HTTP endpoint of one rank: `/metrics`, on a thread of its own.

It shares Python's lock with training, so it bounds what clients can make it do: connections are taken at a limited
pace, a page is made at most once a second, few connections are open at a time, and the oldest makes room.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import ipaddress
import logging
import socket
import socketserver
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from moetrain.config import MetricsConfig

CONNECTIONS_PER_SECOND = 20.0
MAX_CONNECTIONS = 16
"""Open at a time. A scrape is over in milliseconds; what stays is broken or hostile."""
REQUEST_SECONDS = 5.0
"""Silence after which a connection is closed."""
PAGE_SECONDS = 1.0
"""Age up to which a page is given out again."""
PORTS_TRIED = 32
"""From the wanted one on; then any that is free."""

logger = logging.getLogger(__name__)


class Endpoint:
    """Serves pages from its construction to `close`.

    Args:
        page: makes the text of `/metrics`; called on a thread of the endpoint.
        port: the next ones are tried where it is taken; 0 is any.

    Raises:
        ValueError: certificate, key or password cannot be used; the message names the setting.
        OSError: the host has no such address.
    """

    def __init__(self, config: MetricsConfig, port: int, page: Callable[[], bytes]) -> None:
        self._server = _bind(config.prometheus_host, port)
        self._server.page = _Aged(page)
        try:
            self._server.context = tls_context(config)
            self._server.authorization = _authorization(config)
        except ValueError:
            self._server.server_close()
            raise
        self.address = str(self._server.server_address[0])
        self.port: int = self._server.server_address[1]
        self.scheme = "https" if self._server.context else "http"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="moetrain-metrics", daemon=True
        )
        self._thread.start()

    @property
    def last_scrape(self) -> float:
        """`time.monotonic()` at which the newest page was ready to be sent; minus infinity for none."""
        return self._server.last_page

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._thread.join()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def exposure(config: MetricsConfig) -> str | None:
    """What a reader of the log should know about who can read the metrics; None where all is well."""
    if is_loopback(config.prometheus_host) or config.tls_client_ca:
        return None
    if not config.username:
        return (
            f"metrics.prometheus_host={config.prometheus_host} lets everyone who reaches this machine read the "
            "metrics; set metrics.username and metrics.password_file, or metrics.tls_client_ca"
        )
    if not config.tls_certificate:
        return "metrics.username without metrics.tls_certificate: the password crosses the network in the clear"
    return None


def check_endpoint(config: MetricsConfig) -> None:
    """Raises ValueError, with the setting, where certificate, key or password of an endpoint cannot be used."""
    if config.prometheus_port is not None:
        tls_context(config)
        _authorization(config)


def tls_context(config: MetricsConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises ValueError, with the setting, for files that cannot be used."""
    if not config.tls_certificate:
        return None
    assert config.tls_key is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _readable("tls_certificate", config.tls_certificate)
    _readable("tls_key", config.tls_key)
    try:
        # an answer to the question for a password: without one, OpenSSL asks on the terminal and waits
        context.load_cert_chain(config.tls_certificate, config.tls_key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ValueError(
            f"metrics.tls_certificate={config.tls_certificate} and metrics.tls_key={config.tls_key} are no pair in PEM "
            f"format without a passphrase: {error}"
        ) from error
    if config.tls_client_ca:
        _readable("tls_client_ca", config.tls_client_ca)
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            raise ValueError(f"metrics.tls_client_ca={config.tls_client_ca} holds no certificate: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _authorization(config: MetricsConfig) -> bytes | None:
    """The header that a request must bring; None where none is asked for."""
    if not config.username:
        return None
    assert config.password_file is not None
    password = _readable("password_file", config.password_file).decode("utf-8", errors="replace").strip("\r\n")
    if not password:
        raise ValueError(f"metrics.password_file={config.password_file} is empty; write the password into it")
    return b"Basic " + base64.b64encode(f"{config.username}:{password}".encode())


def _readable(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"metrics.{name}={path} cannot be read: {error.strerror}") from error


def _bind(host: str, port: int) -> _Server:
    """A server on the wanted port, on one of the next, or on any."""
    family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    wanted = [number for number in range(port, port + PORTS_TRIED) if number < 65536] if port else []
    for number in (*wanted, 0):
        try:
            return _Server(family, (str(address[0]), number))
        except OSError as error:
            refused = error
    raise refused


class _Aged:
    """A page that is made again when it is asked for and older than `PAGE_SECONDS`."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._lock = threading.Lock()  # of the endpoint's threads alone
        self._made = -PAGE_SECONDS
        self._page = b""

    def __call__(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._made >= PAGE_SECONDS:
                self._page, self._made = self._make(), time.monotonic()
            return self._page


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True  # a run that starts again gets its port although old connections are not forgotten yet
    request_queue_size = 64
    page: Callable[[], bytes]
    context: ssl.SSLContext | None = None
    authorization: bytes | None = None
    last_page = float("-inf")

    def __init__(self, family: int, address: tuple[str, int]) -> None:
        self.address_family = family
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._next_accept = 0.0
        super().__init__(address, _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        time.sleep(max(0.0, self._next_accept - time.monotonic()))
        self._next_accept = time.monotonic() + 1 / CONNECTIONS_PER_SECOND
        connection, client = super().get_request()
        connection.settimeout(REQUEST_SECONDS)
        return connection, client

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[id(request)] = request
            oldest = self._open.popitem(last=False)[1] if len(self._open) > MAX_CONNECTIONS else None
        if oldest is not None:
            _hang_up(oldest)
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """On the connection's own thread: a client that is silent in the handshake holds up nobody."""
        if self.context is None:
            _Handler(request, client_address, self)
            return
        with self._lock:  # whoever hangs up meanwhile would do so to a socket that has lost its connection
            if id(request) not in self._open:
                return  # it has made room before it was begun with
            secured = self.context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            self._open[id(request)] = secured
        with secured:
            secured.do_handshake()
            _Handler(secured, client_address, self)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(id(request), None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a client of the metrics endpoint went away", exc_info=True)

    def close_connections(self) -> None:
        with self._lock:
            left = list(self._open.values())
        for connection in left:
            _hang_up(connection)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "moetrain", ""

    def do_GET(self) -> None:
        wanted = self.server.authorization
        given = self.headers.get("Authorization", "").encode("utf-8", errors="replace")
        if wanted is not None and not hmac.compare_digest(given, wanted):
            self._answer(401, b"user name or password is wrong\n", {"WWW-Authenticate": 'Basic realm="moetrain"'})
        elif self.path.partition("?")[0] != "/metrics":
            self._answer(404, b"the metrics are at /metrics\n", {})
        else:
            page = self.server.page()
            # before it is sent, so that whoever has read a page finds the rank watched
            self.server.last_page = time.monotonic()
            self._answer(200, page, {"Content-Type": CONTENT_TYPE_LATEST})

    def _answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (
            {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body))} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A request every few seconds is no news."""


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it had gone already
        connection.shutdown(socket.SHUT_RDWR)
