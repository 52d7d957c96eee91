"""What a cluster is, for those who launch on it: one TOML file, validated. `site.example.toml` shows every table.

Secrets never stand in it: a token is a file, and what a job gets is the file's name.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
    with_config,
)

from cluster.node import Limits
from containers.spec import AbsolutePath, ContainerSpec, Line, VariableName

with_config(ConfigDict(extra="forbid"))(
    Limits
)  # which is a plain dataclass, because preflight.py runs without pydantic

_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|_KEY)S?$")
_HOSTS = re.compile(r"[A-Za-z0-9.-]+(\[[0-9,-]+\])?[A-Za-z0-9.-]*")
_FEATURES = re.compile(r"[A-Za-z0-9][\w.:,&|*()\[\]-]*")
_OF_THE_JOB = re.compile(
    r"(SLURM|SBATCH|SRUN|PYXIS)_\w*|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|"
    r"JOB_DIR|OUTPUT_DIRS?|NODES|RANKS_PER_NODE|EXCLUDE|PREFLIGHT|CONFIG"
)
"""Variables that Slurm, pyxis and the batch script set or read; a site's value would change what the job does."""
_WORD = re.compile(r"[A-Za-z0-9][\w.@+-]*")


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise ValueError(f"{text!r} is not a name of letters, digits and .@+_-")
    return text


def _features(text: str) -> str:
    if not _FEATURES.fullmatch(text):
        raise ValueError(f"{text!r} is no expression of features, such as h100&ib")
    return text


def _hosts(text: str) -> str:
    if not _HOSTS.fullmatch(text):
        raise ValueError(f"{text!r} is not a node name or a range such as h100-[01-04]")
    return text


Word = Annotated[Line, AfterValidator(_word)]
Hosts = Annotated[Line, AfterValidator(_hosts)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


class Slurm(_Table):
    """What jobs ask of the scheduler."""

    partition: Word | None = None
    """None: the cluster's default."""
    account: Word | None = None
    qos: Word | None = None
    reservation: Word | None = None
    constraint: Annotated[Line, AfterValidator(_features)] | None = None
    """Features of nodes, such as `h100&ib`."""
    exclude: tuple[Hosts, ...] = ()
    """Nodes that no job may use, such as `h100-07` or `h100-[01-04]`."""
    gpu: Word = "h100-80gb"
    """What the GPUs are, for `moetrain plan`."""
    request_gpus: bool = True
    """False on a cluster without GPUs: ranks run on CPUs, as many on a node as --gpus-per-node says."""
    cpus_per_task: PositiveInt = 12
    """Cores of a rank; OMP_NUM_THREADS gets as many."""
    memory_gb: NonNegativeInt = 0
    """Memory of a job on each node; 0: all of it."""
    warning_seconds: PositiveInt = 300
    """How long before its end a job is warned; it must then finish a step and save."""
    preflight: bool = True
    """Whether the first step of a job checks every node (`cluster/preflight.py`)."""
    path: Line = "/usr/local/bin:/usr/bin:/bin"
    """PATH of the batch script, which calls scontrol and srun."""


class Paths(_Table):
    shared: AbsolutePath
    """Directory that all nodes see under this name. Jobs run in it: relative paths of a run are below it."""
    python: AbsolutePath | Word = "python"
    """Python of the ranks: in the container, or without one, on the nodes."""


class Topology(_Table):
    nodes_per_switch: PositiveInt | None = None
    """Nodes below one leaf switch; an expert group that is larger crosses the spine."""
    max_switches: PositiveInt | None = None
    """Leaf switches that a job may spread over (`sbatch --switches`)."""
    wait_minutes: PositiveInt = 60
    """How long a job waits for so few."""


class InfiniBand(_Table):
    devices: tuple[Word, ...] = ()
    """Adapters for training traffic, in the order of the GPUs next to them; others (storage) are left alone."""
    gbps: PositiveFloat = 400
    """Rate of each link in Gbit/s."""


class Storage(_Table):
    write_gb_per_second: PositiveFloat = 2
    """What each node writes to `paths.shared` while all do."""


class Site(_Table):
    """A site file."""

    paths: Paths
    slurm: Slurm = Slurm()
    container: ContainerSpec | None = None
    """None: no container; `paths.python` is an environment on the shared file system."""
    environment: dict[VariableName, Line] = {}
    """Variables of every rank. Together with those of the rank itself and `secrets`, this is all that it gets."""
    secrets: dict[VariableName, AbsolutePath] = {}
    """Variables that name a file, such as HF_TOKEN_PATH; the file's content never leaves it."""
    topology: Topology = Topology()
    infiniband: InfiniBand = InfiniBand()
    storage: Storage = Storage()
    preflight: Limits = Limits()

    @model_validator(mode="after")
    def _variables_are_the_sites(self) -> Site:
        for table, name in [("environment", name) for name in self.environment] + [
            ("secrets", n) for n in self.secrets
        ]:
            if _OF_THE_JOB.fullmatch(name):
                raise ValueError(f"{table}.{name} is for Slurm or the job itself to set; take it out")
        for name in self.environment:
            if _SECRET.search(name):
                raise ValueError(
                    f"environment.{name} looks like a secret; put it into a file that only you can read and name the "
                    f"file under [secrets], such as {name}_PATH or {name}_FILE"
                )
        return self

    def rank_environment(self) -> dict[str, str]:
        """Variables of every rank: what InfiniBand's devices imply, then `environment`, then names of `secrets`."""
        devices = self.infiniband.devices
        implied = {
            "NCCL_IB_HCA": "=" + ",".join(devices),  # "=" takes the names as they are, not as prefixes
            "NVSHMEM_HCA_LIST": ",".join(f"{device}:1" for device in devices),
            "EP_NIC_NAME": devices[0] if devices else "",
        }
        return (implied if devices else {}) | dict(self.environment) | dict(self.secrets)

    def check_secrets(self) -> None:
        """Raise ValueError where a secret's file is missing, or others than its owner can read it."""
        for name, path in self.secrets.items():
            file = Path(path)
            if not file.is_file():
                raise ValueError(f"secrets.{name}: there is no file {path}")
            if file.stat().st_mode & 0o077:
                raise ValueError(f"secrets.{name}: others than its owner can read {path}; chmod 600 {path}")


def load_site(path: str | Path) -> Site:
    """Read and validate a site file.

    Raises:
        ValueError: it is missing, no TOML, or has a wrong key or value; one line for each, with the nearest valid key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"no site file at {path}; copy cluster/site.example.toml there, fill it in, or name another with --site"
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"site file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    try:
        return Site.model_validate(raw)
    except ValidationError as error:
        lines = "\n".join(f"{path}: {_explain(item)}" for item in error.errors())
        raise ValueError(lines) from None


def _explain(item: Any) -> str:
    """One line for a pydantic error; an unknown key gets the nearest one that exists there."""
    location = [str(part) for part in item["loc"]]
    name = ".".join(location) or "the file"
    if item["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{name}: {item['msg'].removeprefix('Value error, ')}"
    table = Site.model_fields[location[0]].annotation if len(location) > 1 else Site
    valid = sorted(_keys(table))
    nearest = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
    return f"{name}: unknown key; " + (f"did you mean {nearest[0]!r}?" if nearest else f"valid: {', '.join(valid)}")


def _keys(table: Any) -> set[str]:
    """Keys of a table, given its type: a model, a dataclass, or a model or None."""
    for choice in (table, *getattr(table, "__args__", ())):
        for fields in ("model_fields", "__dataclass_fields__"):
            if hasattr(choice, fields):
                return set(getattr(choice, fields))
    return set()
