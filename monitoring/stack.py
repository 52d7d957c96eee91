"""`python -m monitoring.stack`: Prometheus, Alertmanager and, where its program or image is here, Grafana, for runs on
this machine.

All listen on loopback and keep their data in a directory of their own. Discovery files of runs below `--runs` are
found as they come; Ctrl-C ends everything.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from monitoring.scaling import scaled

FOLDER = Path(__file__).parent
PACKAGES = {"prometheus": "prometheus", "prometheus-alertmanager": "prometheus-alertmanager"}
"""Debian's package of each program. Grafana is not in Debian."""
OTHER_NAMES = {"prometheus-alertmanager": "alertmanager"}
"""What a program is called where it does not come from Debian."""
ENGINES = ("docker", "podman")
PORTS = {"prometheus": 9090, "alertmanager": 9093, "grafana": 3000}
READY_SECONDS, END_SECONDS, LOOK_SECONDS = 30.0, 10.0, 1.0
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Options:
    """What `start` needs to know."""

    data: Path
    runs: Path
    """Discovery files are `*/discovery/*.json` below it, and in `discovery`."""
    discovery: tuple[Path, ...] = ()
    ports: Mapping[str, int] = field(default_factory=lambda: dict(PORTS))
    """First ports to try, by name."""
    webhook: str | None = None
    """Where Alertmanager sends everything."""
    speed: float = 1.0
    """How many times shorter all times of rules and routes are."""
    scrape_seconds: float | None = None
    """Instead of what prometheus.yml has."""


@dataclass
class Stack:
    """What runs."""

    processes: dict[str, subprocess.Popen[bytes]]
    urls: dict[str, str]
    options: Options

    def look(self) -> None:
        """Bring the discovery files of all runs to where Prometheus watches."""
        mirror(discovery_files(self.options), self.options.data / "discovery")

    def ended(self) -> str | None:
        """Name of a process that is no more."""
        return next((name for name, process in self.processes.items() if process.poll() is not None), None)


def find_program(name: str) -> str:
    """Path of one of `PACKAGES`.

    Raises:
        ValueError: it is not installed; the message has the line that installs it.
    """
    path = shutil.which(name) or (name in OTHER_NAMES and shutil.which(OTHER_NAMES[name]))
    if not path:
        raise ValueError(
            f"{name} is not installed: sudo apt-get install --no-install-recommends {' '.join(PACKAGES.values())} "
            "(Debian, Ubuntu; where they start as services, sudo systemctl disable --now them)"
        )
    return path


@contextlib.contextmanager
def reserved_port(first: int, taken: Sequence[int] = ()) -> Iterator[int]:
    """The first free port of loopback from `first` on; 0 is any. Inside, nobody is given it who asks for any port; the
    program that it is for may listen on it, since both reuse addresses, as Go's servers do, and this does not listen.
    """
    for port in range(first, first + 100) if first else [0]:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            if (found := int(server.getsockname()[1])) not in taken:
                yield found
                return
    raise ValueError(f"no port from {first} to {first + 99} is free; name another first one")


def discovery_files(options: Options) -> dict[str, Path]:
    """Discovery files by the name they get in one directory; of two with one name the newer."""
    found: dict[str, Path] = {}
    places = {*options.runs.glob("*/discovery"), *options.discovery} - {options.data / "discovery"}
    for path in sorted((path for place in places for path in place.glob("*.json")), key=_changed):
        found[path.name] = path
    return found


def mirror(files: Mapping[str, Path], target: Path) -> None:
    """Make `target` hold these files and no others. One that vanishes meanwhile is as if it had not been there."""
    target.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        with contextlib.suppress(FileNotFoundError):
            content = path.read_bytes()
            if not (target / name).exists() or (target / name).read_bytes() != content:
                temporary = target / f".{name}.new"
                temporary.write_bytes(content)
                os.replace(temporary, target / name)
    for path in target.glob("*.json"):
        if path.name not in files:
            path.unlink()


def write_configuration(options: Options, ports: Mapping[str, int]) -> None:
    """prometheus.yml, the rules and alertmanager.yml, with this machine's places in them."""
    prometheus = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    rules, least = [], 3 * (options.scrape_seconds or 0.0)
    for name in prometheus["rule_files"]:
        path = options.data / Path(name).name
        rules.append(str(path))
        _write_yaml(path, scaled(yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")), options.speed, least))
    prometheus["rule_files"] = rules
    prometheus["alerting"]["alertmanagers"] = [
        {"static_configs": [{"targets": [f"127.0.0.1:{ports['alertmanager']}"]}]}
    ]
    for job in prometheus["scrape_configs"]:
        for place in job.get("file_sd_configs", ()):
            place["files"] = [str(options.data / name) for name in place["files"]]
            place["refresh_interval"] = f"{(options.scrape_seconds or 5) * 1000:.0f}ms"
        if job["job_name"] == "prometheus":
            job["static_configs"] = [{"targets": [f"127.0.0.1:{ports['prometheus']}"]}]
    if options.scrape_seconds is not None:
        every = f"{options.scrape_seconds * 1000:.0f}ms"
        for section in (prometheus["global"], *prometheus["scrape_configs"]):
            for key in section.keys() & {"scrape_interval", "scrape_timeout", "evaluation_interval"}:
                section[key] = every
    _write_yaml(options.data / "prometheus.yml", prometheus)
    alertmanager = scaled(yaml.safe_load((FOLDER / "alertmanager.yml").read_text(encoding="utf-8")), options.speed)
    if options.webhook is not None:
        for receiver in alertmanager["receivers"]:
            receiver["webhook_configs"] = [{"url": options.webhook, "send_resolved": True}]
    _write_yaml(options.data / "alertmanager.yml", alertmanager)


def commands(options: Options, ports: Mapping[str, int]) -> dict[str, list[str]]:
    """Command line of each process, in the order of their start."""
    data, here = options.data, {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    found = {
        "alertmanager": [
            find_program("prometheus-alertmanager"),
            f"--config.file={data / 'alertmanager.yml'}",
            f"--storage.path={data / 'alertmanager'}",
            f"--web.listen-address={here['alertmanager']}",
            f"--web.external-url=http://{here['alertmanager']}",  # what alerts link to
            "--cluster.listen-address=",  # one of its kind needs no gossip, and no port for it
        ],
        "prometheus": [
            find_program("prometheus"),
            f"--config.file={data / 'prometheus.yml'}",
            f"--storage.tsdb.path={data / 'prometheus'}",
            f"--web.listen-address={here['prometheus']}",
            f"--web.external-url=http://{here['prometheus']}",  # what alerts link to
            "--storage.tsdb.retention.time=30d",
            "--storage.tsdb.retention.size=5GB",
            f"--query.lookback-delta={max(1.0, 300 / options.speed):.0f}s",
            f"--rules.alert.resend-delay={max(1.0, 60 / options.speed):.0f}s",
        ],
    }
    grafana = grafana_program() or grafana_container(options, ports)
    return found | ({"grafana": grafana} if grafana else {})


def grafana_program() -> list[str] | None:
    """Grafana as it is installed here."""
    grafana = shutil.which("grafana-server") or shutil.which("grafana")
    if not grafana:
        return None
    server = [grafana] if Path(grafana).name == "grafana-server" else [grafana, "server"]
    home = next((place for place in ("/usr/share/grafana", "/opt/grafana") if Path(place).is_dir()), None)
    return [*server, *([f"--homepath={home}"] if home else [])]


def grafana_container(options: Options, ports: Mapping[str, int]) -> list[str] | None:
    """The image of compose.yml in an engine that has it already; nothing is downloaded. Paths are the same inside."""
    image = yaml.safe_load((FOLDER / "compose.yml").read_text(encoding="utf-8"))["services"]["grafana"]["image"]
    for engine in filter(None, map(shutil.which, ENGINES)):
        looked = subprocess.run([engine, "image", "inspect", image], capture_output=True, stdin=subprocess.DEVNULL)
        if looked.returncode == 0:
            data = options.data / "grafana"
            return [
                *(engine, "run", "--rm", "--network=host", f"--user={os.getuid()}:{os.getgid()}"),
                *(f"--env={name}" for name in grafana_environment(options, ports)),
                *(f"--volume={FOLDER}:{FOLDER}:ro", f"--volume={data}:{data}", image),
            ]
    return None


def grafana_environment(options: Options, ports: Mapping[str, int]) -> dict[str, str]:
    """Grafana on loopback, with the data sources and dashboards of this repository; whoever comes may look."""
    return {
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(ports["grafana"]),
        "GF_PATHS_DATA": str(options.data / "grafana"),
        "GF_PATHS_LOGS": str(options.data / "grafana"),
        "GF_PATHS_PROVISIONING": str(FOLDER / "grafana" / "provisioning"),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "PROMETHEUS_URL": f"http://127.0.0.1:{ports['prometheus']}",
        "ALERTMANAGER_URL": f"http://127.0.0.1:{ports['alertmanager']}",
        "DASHBOARDS": str(FOLDER / "dashboards" / "json"),
    }


@contextlib.contextmanager
def running(options: Options) -> Iterator[Stack]:
    """Everything, ready, until the end of the block.

    Raises:
        ValueError: a program is missing, or one does not start; the message has its last words.
    """
    for name in PACKAGES:
        find_program(name)
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as ends:
        for name in PORTS:
            ports[name] = ends.enter_context(reserved_port(options.ports[name], list(ports.values())))
        (options.data / "grafana").mkdir(parents=True, exist_ok=True)
        write_configuration(options, ports)
        stack = Stack({}, {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}, options)
        stack.look()
        for name, command in commands(options, ports).items():
            log = ends.enter_context((options.data / f"{name}.log").open("wb"))
            stack.processes[name] = ends.enter_context(process(command, log, grafana_environment(options, ports)))
            path = "/api/health" if name == "grafana" else "/-/ready"
            wait_until_ready(name, stack.processes[name], stack.urls[name] + path, Path(log.name))
        for name in PORTS.keys() - stack.processes.keys():
            del stack.urls[name]
        yield stack


@contextlib.contextmanager
def process(command: Sequence[str], log: BinaryIO, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, so that Ctrl-C reaches it through us alone; at the end it is gone, and also
    where we are killed and cannot end it."""
    started = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def _end_with_parent() -> None:
    """In the child: Linux sends SIGTERM when the thread that started it is no more."""
    pr_set_pdeathsig = 1
    _LIBC.prctl(pr_set_pdeathsig, int(signal.SIGTERM))


def wait_until_ready(name: str, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
    raise ValueError(f"{name} did not start; {log} ends with:\n{last}")


def watch(stack: Stack) -> int:
    """Follow the discovery files until a process ends, which is an error, or a signal comes."""
    while (name := stack.ended()) is None:
        stack.look()
        time.sleep(LOOK_SECONDS)
    print(f"error: {name} ended; see {stack.options.data / name}.log", file=sys.stderr)
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m monitoring.stack", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".monitor"), metavar="DIR", help="default: .monitor")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are (default: runs)")
    parser.add_argument(
        "--discovery", type=Path, action="append", default=[], metavar="DIR", help="another one with discovery files"
    )
    parser.add_argument("--webhook", metavar="URL", help="where Alertmanager sends all alerts")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X", help="for a demo of that speed")
    for name, port in PORTS.items():
        parser.add_argument(
            f"--{name}-port", type=int, default=port, metavar="N", help=f"first to try (default: {port})"
        )
    args = parser.parse_args()
    if args.speed <= 0:
        print("error: --speed must be above 0", file=sys.stderr)
        return 2
    ports = {name: vars(args)[f"{name}_port"] for name in PORTS}
    scrape = None if args.speed == 1 else max(0.5, 5 / args.speed)
    data, runs = args.data.absolute(), args.runs.absolute()
    options = Options(data, runs, tuple(args.discovery), ports, args.webhook, args.speed, scrape)
    for number in ENDS:
        signal.signal(number, _interrupt)
    try:
        with running(options) as stack:
            for name, url in stack.urls.items():
                print(f"{name:13} {url}", flush=True)
            if "grafana" not in stack.urls:
                print("grafana       neither its program nor its image is here; see monitoring/compose.yml", flush=True)
            print(f"watching {args.runs}/*/discovery; Ctrl-C ends", flush=True)
            return watch(stack)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _interrupt(*_: Any) -> None:
    """Once: an impatient second Ctrl-C must not leave processes behind."""
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _write_yaml(path: Path, value: Any) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False, width=120), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
