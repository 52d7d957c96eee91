"""A training checkpoint becomes a Hugging Face checkpoint, in one process, without a GPU and one tensor at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from moetrain.checkpoint.dropped import restore_dropped
from moetrain.checkpoint.export import MAX_SHARD_BYTES, export
from moetrain.checkpoint.format import TORCH_DTYPES
from moetrain.checkpoint.manifest import Progress, read_manifest, verify_files
from moetrain.checkpoint.plan import RowRange, apply_conversion_record
from moetrain.checkpoint.state import MODEL_FILES, find_latest, read_state, why_incomplete
from moetrain.checkpoint.storage import StoredTensor, read_index, read_tensor


class StoredWeights:
    """The model's tensors in a training checkpoint."""

    def __init__(self, directory: Path, order: list[str]) -> None:
        stored = {n.removeprefix("model."): t for n, t in read_index(directory).items() if n.startswith("model.")}
        self._directory = directory
        self._tensors: dict[str, StoredTensor] = {name: stored[name] for name in order if name in stored}
        assert len(self._tensors) == len(stored), f"unknown tensors {sorted(stored.keys() - self._tensors.keys())[:3]}"

    def meta(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")
            for name, tensor in self._tensors.items()
        }

    def rows(self, name: str) -> RowRange | None:
        shape = self._tensors[name].shape
        return (0, shape[0]) if shape else None

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return read_tensor(self._directory, self._tensors[name], (start, stop))

    def read(self, name: str, keep: bool) -> torch.Tensor | None:
        return read_tensor(self._directory, self._tensors[name]) if keep else None


def export_run(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    source: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write the model of a training checkpoint as `save_hf` would have written it during the run.

    Args:
        checkpoint: a directory that `save_state` wrote.
        source: where the run's source checkpoint is now, if it has moved; it is needed only for weights that
            Transformers does not load.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, its model has code of its own, the source is needed and
            gone, or `out_dir` holds files and no model.
        OSError: the disk is full or not writable.
    """
    if reason := why_incomplete(Path(checkpoint).absolute()):
        raise ValueError(_remedy(Path(checkpoint), reason))
    _check_no_other_files(Path(out_dir))
    checkpoint = Path(checkpoint).absolute()
    verify_files(checkpoint, read_manifest(checkpoint))
    state = read_state(checkpoint)
    model = _meta_model(checkpoint / MODEL_FILES)
    apply_conversion_record(model, state["conversions"])
    dropped = None
    if state["dropped"] is not None and state["dropped"][1]:
        directory, names = state["dropped"]
        dropped = restore_dropped(source or directory, names)

    def copy_model_files(directory: Path) -> None:
        shutil.copytree(checkpoint / MODEL_FILES, directory, dirs_exist_ok=True)

    weights = StoredWeights(checkpoint, list(model.state_dict()))
    export(model, weights, out_dir, copy_model_files, dropped, max_shard_bytes, progress)


def _remedy(path: Path, reason: str) -> str:
    """What to do about a path that is no complete training checkpoint: often it is a run's directory."""
    if not path.exists():
        return f"{path} does not exist"
    for root in (path, path / "checkpoints"):
        if newest := find_latest(root):
            return f"{path} is not a training checkpoint; did you mean {root / newest.name}?"
    return f"{reason}; export another one"


def _check_no_other_files(out_dir: Path) -> None:
    """Raise ValueError for a directory with files that was never a model's: an export would mix with them."""
    if not out_dir.is_dir() or (out_dir / "config.json").exists():
        return
    if names := sorted(path.name for path in out_dir.iterdir()):
        raise ValueError(
            f"{out_dir} holds files that are no model's ({names[0]}); export to a new directory, such as "
            f"{out_dir / 'model'}"
        )


def _meta_model(directory: Path) -> PreTrainedModel:
    """The model's structure without memory for its weights."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    (name,) = config.architectures
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"{directory} is of {name}, which Transformers does not have; export from within the run")
    with torch.device("meta"):
        model = model_class(config)
    assert isinstance(model, PreTrainedModel)
    return model
