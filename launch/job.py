"""A run as a Slurm job: its folder and its batch script, which submitit writes and submits.

The step that it starts is `python -m moetrain train CONFIG`, once a GPU; nothing is pickled, and submitit is not needed
on the nodes. What happens around the step is in `job.sh`: the batch script, outside of the container, checks the nodes,
orders the ranks and requeues the job, because a container has no scontrol and a rank knows nothing of the others.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from cluster.site import Site
from containers.spec import ContainerSpec, one_line
from moetrain.config import RunConfig
from moetrain.report import config_yaml

ROOT = Path(__file__).resolve().parents[1]
RANK_EXIT_SECONDS = 60
"""From the first rank's end to the end of those that remain: a dead rank leaves the others waiting for it."""
PREFLIGHT_MINUTES = 4
"""The checks end by themselves in three; a node that is not done by then is unfit."""
RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "PYTHONUNBUFFERED")
HOST_VARIABLES = ("HOME", "LANG", "PATH", "USER")
"""Without a container the ranks get these too; an image has its own."""
REPORT_NODE = (
    'PYTHONPATH=$0 "$@" > "$0/preflight-$SLURM_JOB_ID/$SLURMD_NODENAME.txt" 2>&1; '
    'echo $? > "$0/preflight-$SLURM_JOB_ID/$SLURMD_NODENAME.code"'
)


@dataclass(frozen=True)
class Job:
    """All that a batch script says. `configs` has one entry, or one for each task of an array."""

    name: str
    comment: str
    site: Site
    site_file: Path
    container: ContainerSpec | None
    configs: tuple[RunConfig, ...]
    nodes: int
    spares: int
    ranks_per_node: int
    minutes: int
    parallel: int
    """Tasks of an array that run at a time."""
    folder: Path

    def script(self) -> str:
        """Text of the batch script.

        Raises:
            ValueError: a value in it holds a control character.
        """
        return _Executor(self).text()

    def submit(self) -> submitit.SlurmJob[Any]:
        """Write the folder and submit the batch script.

        Raises:
            ValueError: the shared directory is not on this machine. Or sbatch refuses the job; the message is sbatch's.
                Or two launches met in the same second.
        """
        shared, jobs = Path(self.site.paths.shared), self.folder.parent
        if not shared.is_dir():
            raise ValueError(
                f"paths.shared={shared} of the site file is not on this machine: launch from where the cluster's file "
                "system is mounted, or look at the job with --dry-run (nothing was submitted)"
            )
        executor, first = _Executor(self), not jobs.exists()
        self.write()
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints there what the error says again
                return executor.submit_script()
        except (FailedJobError, FailedSubmissionError) as error:
            shutil.rmtree(self.folder)
            if first:
                with contextlib.suppress(OSError):  # another launch may have its folder there by now
                    jobs.rmdir()
            raise ValueError(f"sbatch refuses the job, which was not submitted:\n{error}") from None

    def write(self) -> None:
        """Make the folder with what the job reads: what is edited later does not change a job that waits."""
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            raise ValueError(f"{self.folder} belongs to another launch of this second; launch again") from None
        many = len(self.configs) > 1
        for number, config in enumerate(self.configs):
            name = f"config-{number}.yaml" if many else "config.yaml"
            (self.folder / name).write_text(config_yaml(config), encoding="utf-8")
        for script in ("job.sh", "rank.sh"):
            shutil.copy(ROOT / "launch" / script, self.folder)
        shutil.copy(self.site_file, self.folder / "site.toml")
        (self.folder / "cluster").mkdir()
        for file in (ROOT / "cluster").glob("*.py"):
            shutil.copy(file, self.folder / "cluster")

    def environment(self) -> dict[str, str]:
        """Variables of every rank that are known now; the others are known to the batch script."""
        threads = str(self.site.slurm.cpus_per_task)
        return {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **self.site.rank_environment()}

    def allowed(self) -> list[str]:
        """Names of all variables that a rank may get, besides those that Slurm sets."""
        names = {*RANK_VARIABLES, *self.environment()}
        return sorted(names | set(self.container.env) if self.container else names | set(HOST_VARIABLES))

    def step_arguments(self) -> list[str]:
        """Arguments of srun for a step on the job's nodes: environment, GPUs and container."""
        slurm = self.site.slurm
        # all GPUs for every rank, which takes its own by LOCAL_RANK; --gpu-bind=none would leave them without any
        gpus = [f"--gpus-per-node={self.ranks_per_node}"] if slurm.request_gpus else []
        arguments = [f"--export={','.join(self.allowed())}", *gpus]
        if self.container is None:
            return arguments
        return [*arguments, *self.container.model_copy(update={"env": tuple(self.allowed())}).pyxis_arguments()]

    def train_arguments(self) -> list[str]:
        """Arguments of srun for the training step. `job.sh` names the hosts of the ranks in their order."""
        ranks = self.nodes * self.ranks_per_node
        return [
            f"--nodes={self.nodes}",
            f"--ntasks={ranks}",
            "--distribution=arbitrary",
            f"--cpus-per-task={self.site.slurm.cpus_per_task}",
            f"--wait={RANK_EXIT_SECONDS}",
            "--kill-on-bad-exit=0",  # ranks that have saved end one after the other, with an exit code
            *self.step_arguments(),
        ]

    def train_command(self) -> str:
        """What each task of the training step runs."""
        return f'bash "$JOB_DIR/rank.sh" {shlex.quote(self.site.paths.python)} -m moetrain train "$CONFIG"'

    def preflight_command(self) -> list[str]:
        """The preflight step: once a node, its verdict in files of the job's folder. Empty for none."""
        if not self.site.slurm.preflight:
            return []
        nodes = self.nodes + self.spares
        step = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
        step += [f"--time={PREFLIGHT_MINUTES}"]
        words = [self.site.paths.python, "-m", "cluster.preflight", "--site", str(self.folder / "site.toml")]
        container = self.container
        sha256 = container.expected_sha256() if container is not None else None
        if container is not None and sha256 is not None and container.image.startswith("/"):
            words += ["--image", f"{container.image}={sha256}"]
            container = container.with_mount(f"{container.image}:{container.image}:ro")
        arguments = replace(self, container=container).step_arguments()
        return ["srun", *step, *arguments, "bash", "-c", REPORT_NODE, str(self.folder), *words]

    def parameters(self) -> dict[str, Any]:
        """The `#SBATCH` lines, as submitit names them."""
        slurm, topology = self.site.slurm, self.site.topology
        additional: dict[str, Any] = {
            "chdir": self.site.paths.shared,
            "export": "NIL",  # nothing of the submitting shell; the ranks get what --export of srun names
            "requeue": True,
        }
        if slurm.reservation:
            additional["reservation"] = slurm.reservation
        if topology.max_switches:
            additional["switches"] = f"{topology.max_switches}@{topology.wait_minutes}"
        return {
            "job_name": self.name,
            "comment": self.comment or None,
            "partition": slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "constraint": slurm.constraint,
            "exclude": ",".join(slurm.exclude) or None,
            "nodes": self.nodes + self.spares,
            "ntasks_per_node": self.ranks_per_node,
            "cpus_per_task": slurm.cpus_per_task,
            "gpus_per_node": self.ranks_per_node if slurm.request_gpus else None,
            "mem": f"{slurm.memory_gb}GB" if slurm.memory_gb else "0",
            "exclusive": True,
            "time": self.minutes,
            "signal_delay_s": slurm.warning_seconds,
            "array_parallelism": self.parallel,
            "stderr_to_stdout": True,
            "wckey": None,
            "additional_parameters": additional,
            "setup": self.setup(),
            "srun_args": self.train_arguments(),
            "teardown": ["finish $?"],
        }

    def setup(self) -> list[str]:
        """Lines of the batch script before the training step."""
        exports = {"PATH": self.site.slurm.path, **self.environment()}
        outputs = [config.output_dir for config in self.configs]
        return [
            *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
            f"JOB_DIR={shlex.quote(str(self.folder))}",
            f"OUTPUT_DIRS=({shlex.join(outputs)})",
            f"NODES={self.nodes} RANKS_PER_NODE={self.ranks_per_node}",
            f"EXCLUDE={shlex.quote(','.join(self.site.slurm.exclude))}",
            f"PREFLIGHT=({shlex.join(self.preflight_command())})",
            'source "$JOB_DIR/job.sh"',
            "begin",
            "place_ranks",
        ]


class _Executor(submitit.SlurmExecutor):
    """submitit's executor for a job whose step is a command in place of a pickled function."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.folder)
        self._command = job.train_command()
        parameters = job.parameters()
        for name, value in parameters.items():
            _refuse_control_characters(name, value)
        _refuse_control_characters("folder", job.folder)
        _refuse_control_characters("command", self._command)
        for name, value in {**parameters, "folder": job.folder}.items():
            _refuse_backslashes(name, value)
        self.update_parameters(**parameters)
        if len(job.configs) > 1:
            self.parameters["map_count"] = len(job.configs)

    @classmethod
    def affinity(cls) -> int:
        return 1  # to write the script takes no Slurm

    def text(self) -> str:
        return self._make_submission_file_text(self._command, "")

    def submit_script(self) -> submitit.SlurmJob[Any]:
        job = self._submit_command(self._command)
        assert isinstance(job, submitit.SlurmJob)
        return job

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        # sbatch takes options from variables too, and they win over those of the script
        unset = [f"--unset={name}" for name in os.environ if name.startswith("SBATCH_")]
        return ["env", *unset, "sbatch", str(submission_file_path)]


def _refuse_backslashes(name: str, value: object) -> None:
    """Raise ValueError where a value of a `#SBATCH` line could leave its quotes: sbatch, unlike a shell, takes a
    backslash for an escape between single quotes too. Lists are lines for bash."""
    values = value.values() if isinstance(value, Mapping) else [] if isinstance(value, list) else [value]
    if any("\\" in str(item) for item in values):
        raise ValueError(f"{name} holds a backslash, which sbatch would take for an escape; take it out")


def _refuse_control_characters(name: str, value: object) -> None:
    """Raise ValueError where a value, or one inside of it, could begin another line or hide in one."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_control_characters(f"{name}.{key}", item)
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            _refuse_control_characters(name, item)
    else:
        try:
            one_line(str(value))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
