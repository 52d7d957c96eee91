"""Two conversions that Transformers 5.23 gets wrong when it reads a checkpoint into shards.

- A parameter that is stored as several tensors, joined along the sharded dim 0 (Kimi-Linear's convolution from its q,
  k and v parts): each rank is given its share of every piece, where it needs its share of the whole.
  `reread_concatenated` reads such parameters again, each rank only its rows.
- A parameter that is transposed unless it has the right shape already (Qwen3-VL-MoE's experts): the shard is compared
  with the whole, so it is always transposed. `compare_shards` compares it with the shard.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.core_model_loading import (
    Concatenate,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


def compare_shards(weight_mapping: list[Any]) -> None:
    """Replace conditional transpositions in Transformers' conversions by ones that know of shards. Before reading."""
    for entry in weight_mapping:
        if isinstance(entry, WeightConverter):
            entry.operations = [
                _TransposeShard(op.dim0, op.dim1, check_dims=True) if _is_conditional(op) else op
                for op in entry.operations
            ]


def _is_conditional(op: Any) -> bool:
    return isinstance(op, Transpose) and op.check_dims


class _TransposeShard(Transpose):
    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        parameter = kwargs["model"].get_parameter(kwargs["full_layer_name"])
        tensors = next(iter(input_dict.values()))
        shard = tensors[0] if isinstance(tensors, list) else tensors
        if isinstance(parameter, DTensor) and shard.shape == parameter.to_local().shape:
            return {self.get_target_pattern(input_dict, source_patterns, target_patterns): shard}
        return super().convert(input_dict, source_patterns, target_patterns, **kwargs)


@torch.no_grad()
def reread_concatenated(model: nn.Module, files: list[str], weight_mapping: list[Any]) -> None:
    """Read again every parameter that is joined along dim 0 from several tensors and sharded along dim 0.

    Args:
        files: the checkpoint's safetensors files.
        weight_mapping: Transformers' conversions of the model, as loading used them.
    """
    converters = [entry for entry in weight_mapping if isinstance(entry, WeightConverter)]
    if not any(_joins_rows(converter) for converter in converters):
        return
    renamings = [entry for entry in weight_mapping if isinstance(entry, WeightRenaming)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = dict(model.state_dict())

    pieces: dict[str, list[tuple[int, list[Any], str, str]]] = defaultdict(list)
    for file in files:
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
                if pattern is None or name not in state or not _joins_rows(by_pattern[pattern]):
                    continue
                order = by_pattern[pattern].source_patterns.index(pattern)
                pieces[name].append((order, list(dot_natural_key(key)), key, file))
    for name, sources in pieces.items():
        parameter = state[name]
        if isinstance(parameter, DTensor) and len(sources) > 1:
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            rows = _read_rows([(key, file) for _, _, key, file in sorted(sources)], offset[0], shape[0])
            parameter.to_local().copy_(rows)


def _joins_rows(converter: WeightConverter) -> bool:
    return (
        len(converter.operations) == 1
        and isinstance(converter.operations[0], Concatenate)
        and converter.operations[0].dim == 0
    )


def _read_rows(sources: list[tuple[str, str]], start: int, count: int) -> Tensor:
    """Rows `start` to `start + count` of the sources joined along dim 0, reading no other bytes."""
    parts: list[Tensor] = []
    position = 0
    for key, file in sources:
        with safe_open(file, "pt") as handle:
            piece = handle.get_slice(key)
            length = piece.get_shape()[0]
            first, last = max(start - position, 0), min(start + count - position, length)
            if first < last or (not parts and position + length >= start):
                parts.append(piece[first : max(first, last)])
            position += length
    return torch.cat(parts)
