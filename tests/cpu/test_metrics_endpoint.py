"""Who may read the metrics: TLS, passwords, client certificates, and what wrong files are called."""

from __future__ import annotations

import base64
import contextlib
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moetrain.config import MetricsConfig
from moetrain.metrics.endpoint import Endpoint

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
PAGE = b"moetrain_step 7\n"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority `ca`, and certificates that it signed: `server` for 127.0.0.1, `client`; `stranger` is its own."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2")
    for name in ("ca", "stranger"):
        openssl("req", "-x509", *new, "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl("req", *new[:4], "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san", "-days", "2")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *sign)
    openssl("pkey", "-in", "server.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key")
    return folder


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    """Starts an endpoint; stops it at the end."""
    started: list[Endpoint] = []

    def start(**sections: Any) -> Endpoint:
        started.append(Endpoint(MetricsConfig(**sections), 0, lambda: PAGE))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.close()


def read(endpoint: Endpoint, context: ssl.SSLContext | None = None, login: str | None = None) -> bytes:
    request = urllib.request.Request(f"{endpoint.scheme}://127.0.0.1:{endpoint.port}/metrics")
    if login is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    with urllib.request.urlopen(request, timeout=10, context=context) as response:
        return response.read()


def trusting(folder: Path, client: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if client is not None:
        context.load_cert_chain(folder / f"{client}.pem", folder / f"{client}.key")
    return context


@pytest.mark.parametrize("text", ["s3cret", "s3cret\n", "s3cret\r\n"])
def test_password(tmp_path: Path, serve: Callable[..., Endpoint], text: str) -> None:
    (tmp_path / "password").write_text(text)
    endpoint = serve(username="prom", password_file=str(tmp_path / "password"))
    assert read(endpoint, login="prom:s3cret") == PAGE
    for wrong in (None, "prom:", "prom:s3cre", "prom:s3cret ", "other:s3cret", "prom:s3cret\n", "\xe9:\xe9"):
        with pytest.raises(urllib.error.HTTPError, match="401") as caught:
            read(endpoint, login=wrong)
        assert caught.value.headers["WWW-Authenticate"].startswith("Basic ")


@needs_openssl
def test_tls(certificates: Path, serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(tls_certificate=str(certificates / "server.pem"), tls_key=str(certificates / "server.key"))
    assert endpoint.scheme == "https"
    assert read(endpoint, trusting(certificates)) == PAGE
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        read(endpoint, ssl.create_default_context())
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) as plain:
        plain.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"moetrain" not in plain.recv(1000)
    old = trusting(certificates)
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(urllib.error.URLError):
        read(endpoint, old)
    assert read(endpoint, trusting(certificates)) == PAGE, "it goes on serving"


@needs_openssl
def test_mutual_tls_and_a_password(certificates: Path, tmp_path: Path, serve: Callable[..., Endpoint]) -> None:
    (tmp_path / "password").write_text("s3cret")
    endpoint = serve(
        tls_certificate=str(certificates / "server.pem"),
        tls_key=str(certificates / "server.key"),
        tls_client_ca=str(certificates / "ca.pem"),
        username="prom",
        password_file=str(tmp_path / "password"),
    )
    assert read(endpoint, trusting(certificates, "client"), "prom:s3cret") == PAGE
    with pytest.raises(urllib.error.HTTPError, match="401"):
        read(endpoint, trusting(certificates, "client"))
    for client in (None, "stranger"):
        with pytest.raises((urllib.error.URLError, OSError)):
            read(endpoint, trusting(certificates, client), "prom:s3cret")


@needs_openssl
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tls_certificate": "none.pem"}, "metrics.tls_certificate=none.pem cannot be read: No such file"),
        ({"tls_key": "none.key"}, "metrics.tls_key=none.key cannot be read: No such file"),
        ({"tls_key": "client.key"}, "metrics.tls_key=client.key are no pair in PEM format"),
        ({"tls_key": "locked.key"}, "metrics.tls_key=locked.key are no pair in PEM format without a passphrase"),
        ({"tls_certificate": "server.key"}, "metrics.tls_certificate=server.key and "),
        ({"tls_client_ca": "none.pem"}, "metrics.tls_client_ca=none.pem cannot be read"),
        ({"tls_client_ca": "server.key"}, "metrics.tls_client_ca=server.key holds no certificate"),
        ({"username": "u", "password_file": "none"}, "metrics.password_file=none cannot be read"),
        ({"username": "u", "password_file": "empty"}, "metrics.password_file=empty is empty"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    certificates: Path, serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch, sections: Any, message: str
) -> None:
    monkeypatch.chdir(certificates)
    Path("empty").write_text("\n")
    good = {"tls_certificate": "server.pem", "tls_key": "server.key"}
    with pytest.raises(ValueError) as caught:
        serve(**(good | sections))
    assert message in str(caught.value)
