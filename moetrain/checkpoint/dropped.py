"""Weights of a checkpoint that Transformers drops on load (multi-token-prediction layers, mostly), kept for the export.

They stay where they are, in the source files; an export copies their bytes from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from moetrain.checkpoint.format import TensorInfo
from moetrain.checkpoint.source import CheckpointInfo, check_checkpoint


@dataclass(frozen=True)
class Dropped:
    """Tensors of `directory` that the model does not hold.

    Attributes:
        directory: the source checkpoint.
        tensors: the tensors by name.
        stamps: size and modification time (ns) of their files when they were found.
    """

    directory: Path
    tensors: dict[str, TensorInfo]
    stamps: dict[str, tuple[int, int]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def describe(self) -> str:
        """One line for the log."""
        heads = sorted({_family(name) for name in self.tensors})
        return (
            f"{len(self.tensors)} tensors ({self.nbytes / 1e9:.3g} GB: {', '.join(heads)}) are not part of the "
            "Transformers model: they are not trained, and every export writes them back unchanged"
        )

    def check(self) -> None:
        """Raises ValueError when a source file is gone or has changed since it was looked at."""
        for file, stamp in self.stamps.items():
            path = self.directory / file
            if not path.is_file():
                raise ValueError(
                    f"{path} is gone: it holds weights that the export copies ({', '.join(sorted(self.tensors)[:2])}, "
                    "...). Put the source checkpoint back, or export without them"
                )
            if _stamp(path) != stamp:
                raise ValueError(f"{path} has changed since the run began; the export copies weights from it")


def find_dropped(model: PreTrainedModel, info: CheckpointInfo) -> Dropped:
    """The tensors of a checkpoint that no parameter or buffer of `model` is loaded from."""
    state = model.state_dict()
    # Those that loading used know of its quantiser, too; a model that was not loaded has none.
    used: Any = getattr(model, "_weight_conversions", None)
    mapping = get_model_conversion_mapping(model) if used is None else used
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def is_loaded(name: str) -> bool:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed = name
        return renamed in state

    # In the order of the loader: some renamings wait for a key that sorts first.
    names = sorted(info.tensors, key=dot_natural_key)
    return _pick(info, [name for name in names if not is_loaded(name)])


def restore_dropped(directory: str | Path, names: Iterable[str]) -> Dropped:
    """The same tensors, found again by name in their source checkpoint.

    Raises:
        ValueError: the source is gone or damaged, or lacks one of them.
    """
    info = check_checkpoint(directory)
    if missing := sorted(set(names) - info.tensors.keys()):
        raise ValueError(f"{directory} no longer holds {missing[0]}, which the export copies from it")
    return _pick(info, names)


def _pick(info: CheckpointInfo, names: Iterable[str]) -> Dropped:
    tensors = {name: info.tensors[name] for name in names}
    files = sorted({tensor.file for tensor in tensors.values()})
    return Dropped(info.directory, tensors, {file: _stamp(info.directory / file) for file in files})


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _family(name: str) -> str:
    """`model.layers.61.mlp.gate.weight` -> `model.layers.61.*`, `mtp.fc.weight` -> `mtp.*`."""
    numbered = re.match(r".*?\blayers\.\d+(?=\.)", name)
    return f"{numbered[0] if numbered else name.split('.')[0]}.*"
