"""Training checkpoints: everything that a run needs to go on as if it had not stopped, on this or another layout.

`<root>/step-00000100/` holds

    rank-00000.safetensors ...   tensors of model and optimizer, each rank its shards
    tensors.json                 which part of which tensor is where
    state.json                   step, schedule, optimizer settings, and of each rank random states and data position
    model/                       configuration and tokenizer, for `moetrain export`
    SHA256SUMS                   of all the above; a directory without it is not complete

There is no pickle in it. The directory appears under its name when everything is on the disk.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from moetrain.checkpoint.agree import gather, rank, share, together, world_size
from moetrain.checkpoint.commit import INCOMPLETE, REPLACED, clear_leftovers, publish, remove, staged
from moetrain.checkpoint.dropped import Dropped
from moetrain.checkpoint.export import finish_small_files, holds_one_block, save_model_files
from moetrain.checkpoint.format import DTYPE_NAMES, read_header
from moetrain.checkpoint.manifest import MANIFEST, Progress, read_manifest, verify_files, write_manifest
from moetrain.checkpoint.plan import conversion_record, saved_names
from moetrain.checkpoint.rng import rng_state, set_rng_state
from moetrain.checkpoint.storage import TENSOR_INDEX, TensorReader, TensorWriter, read_index

STATE_FILE = "state.json"
MODEL_FILES = "model"
FORMAT = 1

ABANDONED = ".abandoned"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds beside tensors.

    Attributes:
        step: optimizer steps done.
        data_state: position of this rank's data loader; of rank 0's where the number of ranks has changed.
        extra: what the caller gave to `save_state`.
        resharded: the checkpoint is of another number of ranks. Its random states are not restored then.
    """

    step: int
    data_state: Any
    extra: Any
    resharded: bool


def save_state(
    root: str | Path,
    step: int,
    *,
    model: PreTrainedModel,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    data_state: Any = None,
    tokenizer: Any = None,
    dropped: Dropped | None = None,
    extra: Any = None,
) -> Path:
    """Write `<root>/step-<step>`; collective. Returns its path once it is complete and on the disk.

    Args:
        data_state, extra: JSON values; the data state may differ from rank to rank.
        tokenizer: anything with `save_pretrained`, for an export from the checkpoint alone.
        dropped: weights that such an export will copy from the source checkpoint.

    Raises:
        ValueError: a state is no JSON value, or a tensor's layout cannot be stored. Every rank raises.
        OSError: the disk is full or not writable. Earlier checkpoints are untouched. Every rank raises.
    """
    target = Path(root).absolute() / f"step-{step:08d}"
    with together():
        local = _json_value("data_state", {"rng": rng_state(), "data": data_state})
        state = {
            "format": FORMAT,
            "step": step,
            "world_size": world_size(),
            "optimizer": _optimizer_settings(model, optimizer),
            "scheduler": None if scheduler is None else _json_value("scheduler", scheduler.state_dict()),
            "conversions": conversion_record(model),
            "dropped": None if dropped is None else [str(dropped.directory.absolute()), list(dropped.tensors)],
            "extra": _json_value("extra", extra),
        }
        tensors = _tensors(model, optimizer)
    with staged(target, sum(tensor.nbytes for tensor in tensors.values())) as staging:
        writer = TensorWriter(staging, rank())
        with _dcp_errors(f"cannot write {staging}"):
            save(tensors, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False), **_single())
        state["ranks"], digests_of_ranks = gather(local), gather(writer.digests)
        with together():
            if rank() == 0:
                (staging / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
                (staging / MODEL_FILES).mkdir()
                save_model_files(model, staging / MODEL_FILES, tokenizer)
                digests = {name: digest for part in digests_of_ranks for name, digest in part.items()}
                write_manifest(staging, digests | finish_small_files(staging, digests))
                if reason := why_incomplete(staging):
                    raise OSError(f"{reason}: all nodes must share this directory")
                publish(staging, target)
    return target


def load_state(
    path: str | Path,
    *,
    model: PreTrainedModel,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> TrainState:
    """Restore what `save_state` wrote, in place; collective. The layout may be another than it was saved on.

    Args:
        verify: compare the SHA-256 of every file first; each rank reads its share of them.
        progress: called during that with the bytes done and to do.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or is of another model or optimizer; the message names
            file or tensor. Every rank raises.
    """
    path = Path(path).absolute()
    with together():
        if reason := why_incomplete(path) if rank() == 0 else None:
            raise ValueError(f"{reason}; resume from another checkpoint")
    if verify:
        verify_files(path, read_manifest(path), progress)
    with together():
        state = read_state(path)
        stored = read_index(path)
        if not optimizer.state and any(name.startswith("optimizer.") for name in stored):
            get_optimizer_state_dict(model, optimizer)  # torch's optimizers make their state at the first step
        tensors = _tensors(model, optimizer)
        _check_same(path, tensors, stored)
        _restore_settings(model, optimizer, state["optimizer"])
    with _dcp_errors(f"cannot read {path}"):
        load(tensors, storage_reader=TensorReader(path), planner=DefaultLoadPlanner(False), **_single())
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    resharded = state["world_size"] != world_size()
    local = state["ranks"][0 if resharded else rank()]
    if not resharded:
        set_rng_state(local["rng"])
    return TrainState(state["step"], local["data"], state["extra"], resharded)


def read_state(path: Path) -> dict[str, Any]:
    """The parsed `state.json` of a checkpoint. Raises ValueError when it is damaged or of an unknown format."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / STATE_FILE} is missing or corrupt: {error}") from None
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} has format {state.get('format')}; this version reads format {FORMAT}")
    assert isinstance(state, dict)
    return state


def find_latest(root: str | Path) -> Path | None:
    """The newest complete checkpoint, None without one; collective. Damaged ones are passed over and logged."""
    root = Path(root).absolute()
    return share(next(_complete(root), None) if rank() == 0 else None)


def prune(root: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and what dead writers left; collective.

    Raises:
        ValueError: keep is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the newest checkpoint; the least is 1")
    root = Path(root).absolute()
    with together():
        if rank() == 0:
            for path in list(_complete(root))[keep:]:
                remove(path)
            for path in root.glob("step-*"):
                if path.suffix in (INCOMPLETE, REPLACED):
                    clear_leftovers(path.with_suffix(""))


def set_aside(root: str | Path, after: int) -> list[Path]:
    """Rename the checkpoints of later steps, which the run that now begins there does not continue: it would be pruned
    before them, and a restart would take them for its own. Collective.

    Returns:
        Their new paths, `step-00000009.abandoned`; nothing looks at them again.
    """
    aside: list[Path] = []
    with together():
        if rank() == 0:
            for path in _named(Path(root).absolute()):
                if _step(path) > after:
                    aside.append(_unused(path.with_name(path.name + ABANDONED)))
                    os.rename(path, aside[-1])
    return list(share(aside))


def why_incomplete(path: Path) -> str | None:
    """What is missing of a checkpoint, judged without reading tensors; None for a complete one."""
    if not (path / MANIFEST).is_file():
        return f"{path} is not a complete training checkpoint (no {MANIFEST})"
    try:
        names = read_manifest(path)
        if missing := {TENSOR_INDEX, STATE_FILE} - names.keys():
            return f"{path / MANIFEST} does not name {min(missing)}"
        for name in names:
            if not (path / name).is_file():
                return f"{path / name} is missing"
            if name.endswith(".safetensors"):
                read_header(path / name)
    except ValueError as error:
        return str(error)
    return None


def _complete(root: Path) -> Iterator[Path]:
    """Complete checkpoints, the newest first."""
    for path in sorted(_named(root), key=_step, reverse=True):
        if reason := why_incomplete(path):
            logger.warning("passing over a damaged checkpoint: %s", reason)
        else:
            yield path


def _named(root: Path) -> list[Path]:
    """What has the name of a checkpoint, complete or not."""
    return [path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]


def _step(path: Path) -> int:
    return int(path.name[5:])


def _unused(path: Path) -> Path:
    """The path, or the first of it with a number that nothing has."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(other for other in itertools.chain([path], others) if not other.exists())


def _tensors(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The live tensors of model and optimizer by their name in a checkpoint.

    Raises:
        ValueError: a rank's part of a tensor is not one block of it, as under tensor parallelism of fused layers.
    """
    state = model.state_dict()
    tensors = {f"model.{name}": state[name] for name in saved_names(model)}
    for name, parameter in _named_parameters(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and not holds_one_block(tensor):
            raise ValueError(f"{name} is sharded as {tensor.placements}, which training checkpoints do not support")
    return tensors


def _named_parameters(model: PreTrainedModel, optimizer: Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(id(parameter) in names for parameter in parameters), "the optimizer holds parameters of another model"
    return [(names[id(parameter)], parameter) for parameter in parameters]


def _optimizer_settings(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer keeps beside tensors: the settings of each group, and numbers in the state of parameters."""
    named = _named_parameters(model, optimizer)
    names = {id(parameter): name for name, parameter in named}
    groups = []
    for group in optimizer.param_groups:
        settings = {key: _number(value) for key, value in group.items() if key != "params"}
        groups.append({"names": [names[id(parameter)] for parameter in group["params"]], "settings": settings})
    state = {}
    for name, parameter in named:
        values = optimizer.state.get(parameter, {})
        state[name] = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
    settings = _json_value("optimizer settings", {"groups": groups, "state": state})
    assert isinstance(settings, dict)
    return settings


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _restore_settings(model: PreTrainedModel, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    named = _named_parameters(model, optimizer)
    names = {id(parameter): name for name, parameter in named}
    by_names = {tuple(group["names"]): group["settings"] for group in saved["groups"]}
    for group in optimizer.param_groups:
        members = tuple(names[id(parameter)] for parameter in group["params"])
        if members not in by_names:
            raise ValueError(
                "the optimizer groups its parameters otherwise than the checkpoint's; resume with its optim settings"
            )
        for key, value in by_names[members].items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    for name, parameter in named:
        if saved["state"].get(name):
            optimizer.state[parameter].update(saved["state"][name])


def _check_same(path: Path, tensors: Mapping[str, torch.Tensor], stored: Mapping[str, Any]) -> None:
    if lacking := sorted(tensors.keys() - stored.keys()):
        raise ValueError(f"{path} lacks {len(lacking)} tensor(s) of this model and optimizer: {', '.join(lacking[:3])}")
    if surplus := sorted(stored.keys() - tensors.keys()):
        raise ValueError(f"{path} holds {len(surplus)} tensor(s) that this run has not: {', '.join(surplus[:3])}")
    for name, tensor in tensors.items():
        here, there = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)), (stored[name].dtype, stored[name].shape)
        if here != there:
            raise ValueError(f"{path}: {name} is {there[0]} {list(there[1])} there and {here[0]} {list(here[1])} here")


def _json_value(what: str, value: Any) -> Any:
    """`value` if JSON gives it back as it is but for tuples. Raises ValueError otherwise."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"{what} is no JSON value: {error}") from None


def _single() -> dict[str, bool]:
    return {} if dist.is_initialized() else {"no_dist": True}


@contextmanager
def _dcp_errors(what: str) -> Iterator[None]:
    """DCP's collective exception as the first failing rank's ValueError or OSError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failed, (cause, _) = next(iter(error.failures.items()))
        kind = next((k for k in (ValueError, OSError) if isinstance(cause, k)), RuntimeError)
        raise kind(f"{what}: rank {failed}: {cause}") from error
