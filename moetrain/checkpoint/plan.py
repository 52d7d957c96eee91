"""What an export writes, decided before any tensor moves and the same on every rank.

Transformers loads several tensors of a checkpoint into one parameter (all experts of a layer, say) and its
`revert_weight_conversion` undoes that. Here its conversion is run once on meta tensors, which gives every name, shape
and dtype of the export, and groups of tensors that must be converted together. Most groups are one tensor. A group is

- renamed: one tensor that is only renamed;
- by row: stacked experts of which each row becomes tensors of its own, so a rank converts the rows it holds;
- whole: anything else, converted by one rank from complete tensors.

Every tensor is written by one rank, every file by one rank: a file is then a plain stream that is hashed on its way,
and no file system is asked to merge the writes of several nodes.

Shape legend: E rows of a stacked parameter (experts), T tensors that one row becomes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    ConversionOps,
    Interleave,
    PrefixChange,
    SplitModulelist,
    Transpose,
    WeightConverter,
    WeightTransform,
    apply_converters,
    revert_weight_conversion,
)

from moetrain.checkpoint.dropped import Dropped
from moetrain.checkpoint.format import DTYPE_BITS, TensorInfo, TensorSpec, spec_of

RowRange = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Tensors of the model that are converted together, and the tensors they become, in order.

    `by_row`: outputs are [T, E] flattened, row e of the input becomes outputs [t, e].
    """

    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    renamed: bool = False
    by_row: bool = False


@dataclass(frozen=True)
class Piece:
    """Tensors that `owner` writes one after the other.

    Attributes:
        outputs: in file order; of a by-row group those of row `rows[0]` first.
        group: what they are made of, with `rows` of it for a by-row group whose rows stay where they are.
        copy: the range of a source file instead, of a tensor that the model does not hold.
    """

    owner: int
    outputs: tuple[TensorSpec, ...]
    group: Group | None = None
    rows: RowRange | None = None
    copy: TensorInfo | None = None

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class PlannedFile:
    name: str
    owner: int
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Plan:
    """Pieces in the order in which all ranks go through them, and the files that this makes."""

    pieces: tuple[Piece, ...]
    files: tuple[PlannedFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def saved_names(model: PreTrainedModel) -> list[str]:
    """Names in the state dict that a checkpoint holds: of tied parameters one, as `save_pretrained` does."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    skipped = {target for target, kept in tied.items() if parameters.get(target) is parameters.get(kept)}
    skipped |= set(model._keys_to_ignore_on_save or ())
    return [name for name in model.state_dict() if name not in skipped]


def group_conversions(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> list[Group]:
    """Groups of the model's tensors, given as meta tensors of full shape, in their order.

    Raises:
        ValueError: a dtype that safetensors lacks, or a conversion that cannot be undone group by group.
    """
    exported = revert_weight_conversion(model, dict(tensors))
    renamed = {id(tensor): name for name, tensor in exported.items()}
    converters = _reversed_converters(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    members: dict[str, list[str]] = {}
    used: dict[str, WeightConverter] = {}
    for name in tensors:
        key, pattern = apply_converters(name, converters)
        if pattern is not None:
            members.setdefault(key, []).append(name)
            used[key] = by_pattern[pattern]
    groups = {names[0]: _converted_group(model, tensors, names, used[key]) for key, names in members.items()}
    for name, tensor in tensors.items():
        if id(tensor) in renamed:
            groups[name] = Group((name,), (spec_of(renamed[id(tensor)], tensor),), renamed=True)
    ordered = [groups[name] for name in tensors if name in groups]
    planned = {output.name: output.shape for group in ordered for output in group.outputs}
    if planned != {name: tuple(tensor.shape) for name, tensor in exported.items()}:
        odd = sorted(planned.keys() ^ exported.keys())[:3]
        raise ValueError(f"{type(model).__name__}: its weights cannot be converted back piece by piece ({odd})")
    return ordered


@contextmanager
def plain_conversions(model: PreTrainedModel) -> Iterator[None]:
    """While the body runs, the model's conversions are those of an unquantised checkpoint.

    A model that was loaded from quantised weights holds plain ones. Transformers 5.23 would undo the quantiser's part
    of the conversion, too: it cannot for FP8 experts, and for MXFP4 it gives plain tensors names that no model loads.
    """
    used: Any = getattr(model, "_weight_conversions", None)
    if used is not None:
        model._weight_conversions = _without_quantiser(model, used)  # type: ignore[assignment]
    try:
        yield
    finally:
        if used is not None:
            model._weight_conversions = used


def conversion_record(model: PreTrainedModel) -> list[str] | None:
    """The conversions that loading used, as text; None for a model that was not loaded from a checkpoint."""
    used: Any = getattr(model, "_weight_conversions", None)
    return None if used is None else [repr(conversion) for conversion in _without_quantiser(model, used)]


def apply_conversion_record(model: PreTrainedModel, record: list[str] | None) -> None:
    """Make an export of `model` name its tensors as the model that the record was made of would."""
    if record is None:
        return
    known = {repr(conversion): conversion for conversion in get_model_conversion_mapping(model)}
    if unknown := [text for text in record if text not in known]:
        raise ValueError(f"{type(model).__name__}: this version of Transformers lacks the conversion {unknown[0]}")
    model._weight_conversions = [known[text] for text in record]  # type: ignore[assignment]


def build_plan(
    groups: Iterable[Group],
    rows_of_ranks: list[Mapping[str, RowRange]],
    dropped: Dropped | None,
    max_shard_bytes: int,
) -> Plan:
    """Give every tensor an owner and a file.

    Args:
        rows_of_ranks: for each rank the rows [start, stop) of dimension 0 that it holds of each tensor; a tensor that
            a rank holds otherwise is missing there.
        max_shard_bytes: a file grows no longer than this, unless by one tensor that is.
    """
    loads = [0] * len(rows_of_ranks)
    pieces: list[Piece] = []
    taken: set[str] = set()
    for group in groups:
        taken.update(output.name for output in group.outputs)
        pieces += _pieces_of(group, rows_of_ranks, loads)
    for name, info in (dropped.tensors if dropped is not None else {}).items():
        if name not in taken:
            spec = TensorSpec(name, info.dtype, info.shape)
            pieces.append(Piece(_take(loads, range(len(loads)), spec.nbytes), (spec,), copy=info))
    pieces.sort(key=_width, reverse=True)  # stable; wide items first keeps every tensor aligned in its file
    return Plan(tuple(pieces), tuple(_layout(pieces, len(loads), max_shard_bytes)))


def _without_quantiser(model: PreTrainedModel, used: list[WeightTransform]) -> list[WeightTransform]:
    """The conversions of loading, those of a quantiser replaced by the model's own for the same parameters, if any."""
    if not any(_is_of_quantiser(entry) for entry in used):
        return used
    own = get_model_conversion_mapping(model)
    by_target = {_target(entry): entry for entry in own}
    known = {repr(entry) for entry in own}
    replaced = [by_target.get(_target(entry)) if _is_of_quantiser(entry) else entry for entry in used]
    return [entry for entry in replaced if entry is not None and repr(entry) in known]  # its renamings go, too


def _is_of_quantiser(entry: WeightTransform) -> bool:
    return isinstance(entry, WeightConverter) and any(
        type(op).__module__ != ConversionOps.__module__ for op in entry.operations
    )


def _target(entry: WeightTransform) -> tuple[Any, ...]:
    return type(entry), entry.scope_prefix, *entry._original_target_patterns


def _reversed_converters(model: PreTrainedModel) -> list[WeightConverter]:
    """The converters that `revert_weight_conversion` uses."""
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is None:
        known = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in known if not isinstance(entry, PrefixChange)]
    transforms: list[WeightTransform] = [conversion.reverse_transform() for conversion in reversed(conversions)]
    return [transform for transform in transforms if isinstance(transform, WeightConverter)]


def _converted_group(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], names: list[str], converter: WeightConverter
) -> Group:
    outputs = revert_weight_conversion(model, {name: tensors[name] for name in names})
    specs = tuple(spec_of(name, tensor) for name, tensor in outputs.items())
    by_row = len(names) == 1 and _splits_rows(converter) and len(specs) % tensors[names[0]].shape[0] == 0
    return Group(tuple(names), specs, by_row=by_row)


def _splits_rows(converter: WeightConverter) -> bool:
    """Whether the conversion ends by taking dimension 0 apart and touches only other dimensions before."""
    *before, last = converter.operations
    return (
        isinstance(last, SplitModulelist)
        and last.dim == 0
        and all(
            (isinstance(op, Chunk | Interleave) and op.dim > 0)
            or (isinstance(op, Transpose) and min(op.dim0, op.dim1) > 0 and not op.check_dims)
            for op in before
        )
    )


def _pieces_of(group: Group, rows_of_ranks: list[Mapping[str, RowRange]], loads: list[int]) -> list[Piece]:
    holders = _row_holders(group, rows_of_ranks) if group.by_row else None
    if holders is None:
        size = sum(output.nbytes for output in group.outputs)
        return [Piece(_take(loads, range(len(loads)), size), group.outputs, group)]
    rows = max(stop for _, stop in holders)
    pieces = []
    for (start, stop), ranks in sorted(holders.items()):
        outputs = tuple(output for e in range(start, stop) for output in group.outputs[e::rows])
        owner = _take(loads, ranks, sum(output.nbytes for output in outputs))
        pieces.append(Piece(owner, outputs, group, (start, stop)))
    return pieces


def _row_holders(group: Group, rows_of_ranks: list[Mapping[str, RowRange]]) -> dict[RowRange, list[int]] | None:
    """Which ranks hold which rows; several hold the same under replication. None if some rank holds no plain rows."""
    (name,) = group.inputs
    holders: dict[RowRange, list[int]] = {}
    for owner, rows in enumerate(rows_of_ranks):
        if name not in rows:
            return None
        if rows[name][0] < rows[name][1]:
            holders.setdefault(rows[name], []).append(owner)
    ends = [0] + [stop for _, stop in sorted(holders)]
    assert [start for start, _ in sorted(holders)] == ends[:-1], f"{name}: ranks hold overlapping or missing rows"
    return holders


def _take(loads: list[int], ranks: Iterable[int], size: int) -> int:
    """The rank with the least to write so far takes `size` bytes more."""
    owner = min(ranks, key=lambda r: loads[r])
    loads[owner] += size
    return owner


def _width(piece: Piece) -> int:
    widths = {DTYPE_BITS[output.dtype] for output in piece.outputs}
    assert len(widths) == 1, f"{piece.outputs[0].name} and its siblings differ in item size"
    return widths.pop()


def _layout(pieces: list[Piece], ranks: int, max_shard_bytes: int) -> Iterable[PlannedFile]:
    shards: list[tuple[int, list[TensorSpec]]] = []
    for owner in range(ranks):
        size = max_shard_bytes + 1
        for output in (output for piece in pieces if piece.owner == owner for output in piece.outputs):
            if size + output.nbytes > max_shard_bytes:
                shards.append((owner, []))
                size = 0
            shards[-1][1].append(output)
            size += output.nbytes
    for number, (owner, outputs) in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        yield PlannedFile(name, owner, tuple(outputs))
