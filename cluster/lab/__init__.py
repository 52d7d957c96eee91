"""A real Slurm of many nodes on this machine: slurmctld, one slurmd a node, munge; from Debian's packages.

    lab = up(Path(".lab"))            # about a second
    lab.run("srun", "-N16", "hostname")
    kill_node(lab, "h100-03")         # as a node dies: nothing of it is left
    down(lab)                         # no process of the lab is left
    remove(lab)                       # nor a file

Everything it writes is below one directory; several labs may run at once. Nodes have GPUs by name only: files stand for
their devices, and Slurm counts them and sets CUDA_VISIBLE_DEVICES. It needs no root, and jobs run as the user.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
"""Debian's users do not have these on their PATH; the daemons are there."""
START_SECONDS = 30.0
STOP_SECONDS = 5.0
FOLDERS = ("etc", "state", "run", "log", "munge", "dev", "spool")
"""All that is below a lab's directory, beside `lab.json`."""
PORT_RANGE = (17000, 20000)
"""Below those that the kernel gives to clients and those that jobs take for their ranks."""


@dataclass(frozen=True)
class Lab:
    """A cluster that is up, or was."""

    root: str
    nodes: tuple[str, ...]
    gpus: int
    port: int
    """Of slurmctld; the nodes have the ones that follow."""

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with what Slurm's commands need to find the lab."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return own | {"SLURM_CONF": f"{self.root}/etc/slurm.conf", "PATH": f"{os.environ['PATH']}:{SBIN}"}

    def run(self, *command: str, check: bool = True, timeout: float = 60.0) -> str:
        """Standard output of a command on the lab; nothing where it did not end within `timeout` seconds.

        Raises:
            RuntimeError: it failed, or did not end, and `check` is set; the message holds what it wrote.
        """
        try:
            result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            if not check:
                return ""
            raise RuntimeError(f"{' '.join(command)} did not end within {timeout:g} s") from error
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}: {result.stderr or result.stdout}")
        return result.stdout


def missing_programs() -> list[str]:
    """Programs of the lab that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]


def up(root: str | Path, nodes: int = 16, gpus: int = 8, node_timeout: int = 20, extra: Iterable[str] = ()) -> Lab:
    """Start a cluster below `root` and wait until all its nodes are idle.

    Args:
        node_timeout: seconds after which a silent node is down.
        extra: further lines of slurm.conf.

    Raises:
        ValueError: a program is missing, or a lab already runs there.
        RuntimeError: it did not come up; the message names the logs.
    """
    if missing := missing_programs():
        raise ValueError(f"the lab needs {', '.join(missing)}; `make lab-deps` installs them from Debian's packages")
    root = Path(root).absolute()
    if (earlier := find(root)) is not None:
        if daemons(earlier):
            raise ValueError(f"a lab already runs in {root}; stop it with `make lab-down`")
        remove(earlier)  # the jobs of one that was killed would run again
    names = tuple(f"h100-{number:02d}" for number in range(1, nodes + 1))
    lab = Lab(str(root), names, gpus, _free_ports(nodes + 1))
    _write_files(lab, node_timeout, extra)
    try:
        _start(lab)
        _wait(lambda: _idle_nodes(lab) == nodes, START_SECONDS)
    except (RuntimeError, TimeoutError) as error:
        down(lab)
        raise RuntimeError(f"the lab did not come up: {error}; its logs are in {root}/log and {root}/munge") from error
    return lab


def down(lab: Lab) -> None:
    """End every process of the lab's jobs and every daemon."""
    # first the jobs: a step's daemon that finds no slurmctld tries for long to tell it how the step ended
    for end in (signal.SIGTERM, signal.SIGKILL):
        for pid in job_processes(lab):
            _kill(pid, end)
        with contextlib.suppress(TimeoutError):
            _wait(lambda: not job_processes(lab) and not _step_daemons(lab), STOP_SECONDS)
            break
    for end in (signal.SIGTERM, signal.SIGKILL):
        for pid in daemons(lab):
            _kill(pid, end)
        with contextlib.suppress(TimeoutError):
            _wait(lambda: not daemons(lab), STOP_SECONDS)
            break


def remove(lab: Lab) -> None:
    """Take away what a lab that is down has written; what others have put below its directory stays."""
    root = Path(lab.root)
    for folder in FOLDERS:
        shutil.rmtree(root / folder, ignore_errors=True)
    (root / "lab.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        root.rmdir()


def find(root: str | Path) -> Lab | None:
    """The lab below `root`, running or not."""
    file = Path(root).absolute() / "lab.json"
    if not file.is_file():
        return None
    raw = json.loads(file.read_text(encoding="utf-8"))
    return Lab(**raw | {"nodes": tuple(raw["nodes"])})


def daemons(lab: Lab) -> list[int]:
    """Process ids of slurmctld, the slurmds, their step daemons, and munged."""
    ours = (f"{lab.root}/log/", f"{lab.root}/munge/log")
    return [pid for pid in _pids() if _program(pid).startswith(("slurm", "munged")) and _has_open(pid, ours)]


def _step_daemons(lab: Lab) -> list[int]:
    return [pid for pid in daemons(lab) if _program(pid) == "slurmstepd"]


def job_processes(lab: Lab, node: str | None = None) -> list[int]:
    """Process ids of what jobs of the lab have started, on one node or on all."""
    conf = f"SLURM_CONF={lab.root}/etc/slurm.conf"
    where = "SLURMD_NODENAME=" + (node or "")
    found = []
    for pid in _pids():
        environment = _environment(pid)
        if conf in environment and any(entry.startswith("SLURM_JOB_ID=") for entry in environment):
            on_node = any(entry == where if node else entry.startswith(where) for entry in environment)
            if on_node:
                found.append(pid)
    return found


def kill_node(lab: Lab, node: str) -> None:
    """End a node as a power cut does: slurmd, its steps and all their processes at once."""
    log = (f"{lab.root}/log/{node}.log",)
    own_daemons = [pid for pid in daemons(lab) if _has_open(pid, log)]
    for pid in [*own_daemons, *job_processes(lab, node)]:
        _kill(pid, signal.SIGKILL)


def start_node(lab: Lab, node: str) -> None:
    """Start a node's slurmd, again where it has been killed."""
    lab.run("slurmd", "-N", node)


def _write_files(lab: Lab, node_timeout: int, extra: Iterable[str]) -> None:
    root = Path(lab.root)
    for folder in (*FOLDERS, *(f"spool/{node}" for node in lab.nodes)):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for gpu in range(lab.gpus):
        device = root / f"dev/nvidia{gpu}"
        if not device.is_symlink():
            device.symlink_to("/dev/null")  # Slurm wants a device and never opens it; to make one takes root
    key = root / "munge" / "key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
    first, last = lab.nodes[0], lab.nodes[-1]
    half = (len(lab.nodes) + 1) // 2
    values = {
        "root": lab.root,
        "host": socket.gethostname().partition(".")[0],
        "user": getpass.getuser(),
        "port": lab.port,
        "node_ports": f"[{lab.port + 1}-{lab.port + len(lab.nodes)}]",
        "nodes": f"h100-[{first[-2:]}-{last[-2:]}]",
        "gpus": lab.gpus,
        "node_timeout": node_timeout,
        "first_job": lab.port,  # so that jobs of two labs do not choose the same port for their ranks
        "extra": "\n".join(extra),
    }
    template = Path(__file__).with_name("slurm.conf").read_text(encoding="utf-8")
    (root / "etc" / "slurm.conf").write_text(Template(template).substitute(values), encoding="utf-8")
    gres = f"Name=gpu Type=h100 File={lab.root}/dev/nvidia[0-{lab.gpus - 1}]\n"
    (root / "etc" / "gres.conf").write_text(gres, encoding="utf-8")
    leaves = (lab.nodes[:half], lab.nodes[half:])
    switches = [f"SwitchName=leaf{i} Nodes={','.join(nodes)}\n" for i, nodes in enumerate(leaves) if nodes]
    spine = f"SwitchName=spine Switches={','.join(f'leaf{i}' for i in range(len(switches)))}\n"
    (root / "etc" / "topology.conf").write_text("".join(switches) + spine, encoding="utf-8")
    (root / "lab.json").write_text(json.dumps(asdict(lab)) + "\n", encoding="utf-8")


def _start(lab: Lab) -> None:
    munge = f"{lab.root}/munge"
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    # --force: a directory above that the group may write would otherwise be refused
    lab.run("munged", "--force", *(f"--{option}={munge}/{name}" for option, name in files.items()))
    lab.run("slurmctld")
    for node in lab.nodes:
        start_node(lab, node)


def _idle_nodes(lab: Lab) -> int:
    return len(set(lab.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False, timeout=10).split()))


def _free_ports(count: int) -> int:
    """The first of `count` consecutive ports that nobody listens on."""
    low, high = PORT_RANGE
    start = low + os.getpid() * 50 % (high - low)  # labs that start at the same time look in different places
    for offset in range(0, high - low, count):
        first = low + (start - low + offset) % (high - low - count)
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise RuntimeError(f"no {count} consecutive free ports between {low} and {high}")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not there after {seconds:.0f} s")
        time.sleep(0.05)


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]


def _program(pid: int) -> str:
    """Name of a process; empty when it has gone or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    name, _, rest = stat.partition("(")[2].rpartition(")")
    return "" if rest.split()[0] == "Z" else name


def _has_open(pid: int, prefixes: tuple[str, ...]) -> bool:
    """Whether a process has a file open whose path starts with one of `prefixes`."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path).startswith(prefixes):
                    return True
    return False


def _environment(pid: int) -> list[str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return []
    return raw.decode(errors="replace").split("\0")


def _kill(pid: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)
