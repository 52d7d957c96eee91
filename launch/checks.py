"""What is checked before a job is submitted. Each check returns a line, or raises ValueError with the remedy.

A path on the cluster can be looked at only where it is mounted: on another machine such a check says so.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import PreTrainedModel

from launch.job import HOST_VARIABLES, ROOT, Job
from moetrain.config import CreateConfig, RunConfig
from moetrain.create import check_layout as check_experts
from moetrain.create import load_model_config, meta_model, new_config

STARTUP_SECONDS = 600
"""Time that a job is granted to load its model; a limit that leaves no more is surely a mistake."""
RANK_SCRIPT = ROOT / "launch" / "rank.sh"
CHECKPOINT_BYTES = {"fp32": 12, "master": 14, "bf16_stochastic": 6, "8bit": 4}
"""Bytes of a training checkpoint per parameter, by `optim.states`."""


class Unseen(Exception):
    """The check needs a path that this machine does not have."""


def check_layout(job: Job) -> str:
    """Nodes, experts and replicas divide."""
    parallel = job.configs[0].parallel
    world = job.nodes * job.ranks_per_node
    replica = parallel.ep_size * parallel.dp_replicate_size
    if world % replica:
        valid = [nodes for nodes in range(1, 129) if nodes * job.ranks_per_node % replica == 0]
        sizes = f"ep_size={parallel.ep_size} x dp_replicate_size={parallel.dp_replicate_size}"
        raise ValueError(
            f"{job.nodes} nodes x {job.ranks_per_node} ranks = {world} ranks are not a multiple of {sizes}; valid "
            f"for --nodes: {', '.join(map(str, valid[:6]))}{', ...' if len(valid) > 6 else ''}"
        )
    large, small = max(parallel.ep_size, job.ranks_per_node), min(parallel.ep_size, job.ranks_per_node)
    if large % small:
        raise ValueError(
            f"parallel.ep_size={parallel.ep_size} and {job.ranks_per_node} ranks a node: an expert group must cover "
            "whole nodes, or nodes whole groups, so that one divides the other"
        )
    replicas = parallel.dp_replicate_size
    text = f"{world} ranks: {replicas} replica{'s' * (replicas > 1)} of {world // replicas}, "
    nodes = -(-parallel.ep_size // job.ranks_per_node)
    text += f"an expert group of {parallel.ep_size} on {nodes} node{'s' * (nodes > 1)}"
    below = job.site.topology.nodes_per_switch
    return text + (f", across switches of {below}" if below and nodes > below else "")


def check_time(job: Job, saving: float | None) -> str:
    """The limit leaves time to load, to train and to save; the warning leaves time to save.

    Args:
        saving: seconds of one training checkpoint; None where the model is not known here.
    """
    limit, warning = 60 * job.minutes, job.site.slurm.warning_seconds
    if saving is not None and warning < saving:
        raise ValueError(
            f"one save takes about {saving:.0f} s, and slurm.warning_seconds={warning} of the site file leaves "
            "less between the warning and the end of a job; raise it"
        )
    if limit <= warning + STARTUP_SECONDS:
        raise ValueError(
            f"--time of {job.minutes} minutes is too short: {STARTUP_SECONDS // 60} minutes to load, and "
            f"{warning / 60:.0f} before its end the job is warned to save (slurm.warning_seconds)"
        )
    text = "" if saving is None else f"; a save takes about {saving:.0f} s"
    return f"{job.minutes} minutes, warned {warning} s before the end{text}"


def check_mounts(job: Job) -> str:
    """The ranks see the shared directory, by the name that it has outside."""
    if job.container is None:
        return "no container: ranks run on the nodes"
    shared = Path(job.site.paths.shared)
    for mount in job.container.mounts:
        source, target, *flags = mount.split(":")
        if source == target and (shared == Path(source) or Path(source) in shared.parents):
            if "ro" in "+".join(flags).split("+"):
                raise ValueError(f"container.mounts: {mount} is read-only, and jobs write to paths.shared={shared}")
            return f"container.mounts shows {shared} under its own name"
    raise ValueError(
        f"no entry of container.mounts shows paths.shared={shared} under its own name; add '{shared}:{shared}'"
    )


def check_image(job: Job) -> str:
    """The image exists and has its hash."""
    if job.container is None:
        return "none"
    if job.container.image.startswith("/") and not Path(job.container.image).is_file():
        _unseen_unless_cluster(job)
    return job.container.check_image()


def check_python(job: Job) -> str:
    """The Python of the ranks has moetrain."""
    python = job.site.paths.python
    if job.container is not None:
        raise Unseen(f"{python} is the image's")
    if not Path(python).is_absolute() or not Path(python).exists():
        raise Unseen(f"{python} is looked for on the nodes")
    _unseen_unless_cluster(job)
    here = {name: os.environ[name] for name in HOST_VARIABLES if name in os.environ}
    environment = {**here, "PATH": job.site.slurm.path, **job.environment()}
    command = ["/bin/bash", str(RANK_SCRIPT), python, "-c", ""]
    result = subprocess.run(command, cwd=job.site.paths.shared, env=environment, capture_output=True, text=True)
    if result.returncode:
        said = (result.stdout or result.stderr).strip() or f"it ends with {result.returncode}"
        raise ValueError(f"paths.python={python} of the site file: {said.splitlines()[-1].removeprefix('error: ')}")
    return f"{python} has moetrain"


def check_shared(job: Job) -> str:
    """Jobs can be written to the shared directory."""
    shared = Path(job.site.paths.shared)
    _unseen_unless_cluster(job)
    if not os.access(shared, os.W_OK):
        raise ValueError(f"paths.shared={shared} of the site file cannot be written")
    return str(shared)


def check_secrets(job: Job) -> str:
    """Files of secrets exist and are their owner's alone."""
    if any(not Path(path).exists() for path in job.site.secrets.values()):
        _unseen_unless_cluster(job)
    job.site.check_secrets()
    return f"{len(job.site.secrets)} named by file"


def check_model(job: Job, model: PreTrainedModel | None) -> str:
    """The ranks of an expert group share the model's experts evenly."""
    if model is None:
        raise Unseen(f"model.path={job.configs[0].model.path} is not a directory here")
    check_experts(model, job.nodes * job.ranks_per_node, job.configs[0].parallel)
    return f"{model.config.model_type} of {model.num_parameters() / 1e9:,.1f} billion parameters"


def check_run(job: Job) -> str:
    """What `moetrain train --dry-run` checks of model, data and output, from where the job will run; it prints."""
    from moetrain.dry_run import dry_run

    for config in job.configs:
        with _as_if_on_cluster(job):
            if config.model.create is None and not Path(config.model.path).expanduser().is_dir():
                raise Unseen(f"model.path={config.model.path} is not a directory here; jobs may find or fetch it")
            dry_run(config)
    return "model, data and output as above"


@contextlib.contextmanager
def _as_if_on_cluster(job: Job) -> Iterator[None]:
    shared = Path(job.site.paths.shared)
    if not shared.is_dir():
        raise Unseen(f"{shared} is not on this machine")
    world = str(job.nodes * job.ranks_per_node)
    with contextlib.chdir(shared), mock.patch.dict(os.environ, {"WORLD_SIZE": world}):
        yield


def _unseen_unless_cluster(job: Job) -> None:
    """Raise `Unseen` where the shared directory is not mounted: this machine is not one of the cluster."""
    if not Path(job.site.paths.shared).is_dir():
        raise Unseen(f"{job.site.paths.shared} is not on this machine")


def model_on_meta(config: RunConfig, architecture: Mapping[str, Any]) -> PreTrainedModel:
    """The model without memory for its weights: of the checkpoint, if it is here, else of the run's architecture.

    Raises:
        Unseen: there is neither.
    """
    model, directory = config.model, Path(config.model.path).expanduser()
    if (directory / "config.json").is_file():
        return meta_model(load_model_config(directory, model), model)
    if model.create is not None:
        return meta_model(new_config(model.create, vocab_size=model.create.vocab_size), model)
    if architecture:
        return meta_model(new_config(CreateConfig(config=dict(architecture))), model)
    raise Unseen(f"model.path={model.path} is not a directory here")


def save_seconds(job: Job, model: PreTrainedModel) -> float:
    """Time of one training checkpoint at the rate of the site's storage."""
    config, rate = job.configs[0], job.site.storage.write_gb_per_second * job.nodes
    states = config.optim.states
    if states == "auto":
        states = "fp32" if config.model.dtype == "float32" else "master"
    return int(model.num_parameters()) * CHECKPOINT_BYTES[states] / rate / 1e9
