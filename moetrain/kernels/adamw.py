"""AdamW (arXiv 1711.05101) of many tensors in one launch: everything is read once and written once.

A bf16 parameter with bf16 averages moves 14 bytes an element, where torch's fused kernel with its copies to fp32 and
the rounding moves about 100. The plain reference is `moetrain.optim.reference.adamw_ref`.

Shapes: N tensors of a launch; a tile is [2, TILE] elements, whose two halves share random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from moetrain.kernels._triton import cdiv, jit, runs_triton, tl
from moetrain.kernels.tensor_list import (
    CHUNK,
    chunk_length,
    chunk_of,
    chunk_table,
    device_table,
    pointer,
    triton_type,
    vector_length,
)

_TILE = 1024
"""Half of a tile; with 4 warps 8 numbers a thread. Random bits depend on it."""


class Slot(NamedTuple):
    """The local tensors of one parameter in one update, all of one shape but for `step` and the scales."""

    parameter: torch.Tensor
    """fp32 or bf16; bf16 without `master` is rounded stochastically."""
    grad: torch.Tensor
    """fp32 or bf16."""
    exp_avg: torch.Tensor
    """fp32, bf16 (rounded stochastically) or 8-bit codes; `exp_avg_sq` alike."""
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    """Updates done, a scalar in fp32 on the device; counted up by the update."""
    master: torch.Tensor | None
    """fp32 copy of the parameter."""
    exp_avg_scale: torch.Tensor | None
    """fp32 [..., L / block] for codes [..., L], with a block of 32, 64, 128 or 256; `exp_avg_sq_scale` alike."""
    exp_avg_sq_scale: torch.Tensor | None
    number: int
    """Of the parameter; `shard` is that of this part of it: they choose its random bits."""
    shard: int


class Codebook(NamedTuple):
    """What 8-bit codes mean and how a value finds its code."""

    values: torch.Tensor
    """fp32 [256], ascending."""
    between: torch.Tensor
    """fp32 [256]: half-way from each value to the next; infinity after the last."""
    first: torch.Tensor
    """uint8 [65536] by the upper 16 bits of a fp32 number: its code, or the one below it."""


class _Kind(NamedTuple):
    """Tensors that one launch of the kernel takes together."""

    parameter: torch.dtype
    grad: torch.dtype
    averages: torch.dtype
    master: bool
    block: int
    vector: int


def adamw(
    slots: Sequence[Slot],
    lr: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_factor: torch.Tensor | None,
    codebooks: tuple[Codebook, Codebook] | None,
) -> None:
    """Update parameters and states in place, with each tensor for which `takes` holds.

    Two launches and one more for each further combination of types; no host sync, and nothing sent to the device while
    the tensors stay where they are. After one update by the host a CUDA graph may capture it: step counts, `lr` and
    `grad_factor` are on the device.

    Args:
        lr: a scalar on the device.
        grad_factor: a scalar in fp32 on the device that gradients are multiplied by.
        codebooks: of the 8-bit codes of `exp_avg` and `exp_avg_sq`.
    """
    if not slots:
        return
    device = slots[0].parameter.device
    rows = [_row(slot) for slot in slots]
    table = device_table(rows, device)
    coefficients_N4 = torch.empty(len(slots), 4, device=device)
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    _advance[(cdiv(len(slots), 128),)](
        table, lr, coefficients_N4, len(slots), *logs, weight_decay, COLUMNS=len(rows[0]), BLOCK=128, num_warps=4
    )
    sizes_by_kind: dict[_Kind, list[tuple[int, int]]] = {}
    for index, (slot, row) in enumerate(zip(slots, rows, strict=True)):
        if numel := slot.parameter.numel():
            sizes_by_kind.setdefault(_kind(slot, row), []).append((index, numel))
    for kind, sizes in sizes_by_kind.items():
        chunks = chunk_table(sizes, device)
        books = (*codebooks[0], *codebooks[1]) if codebooks and kind.block else (None,) * 6
        _adamw[(len(chunks),)](
            table,
            chunks,
            coefficients_N4,
            grad_factor,
            *books,
            *(betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps),
            PARAMETER=triton_type(kind.parameter),
            GRAD=triton_type(kind.grad),
            AVERAGES=triton_type(kind.averages),
            MASTER=kind.master,
            QUANTISED=kind.block,
            VECTOR=kind.vector,
            COLUMNS=len(rows[0]),
            CHUNK=CHUNK,
            TILE=_TILE,
            num_warps=4,
        )


def takes(slot: Slot) -> bool:
    """Whether the kernel can update this parameter: on a GPU (or under Triton's interpreter), without gaps."""
    tensors = (slot.parameter, slot.grad, slot.exp_avg, slot.exp_avg_sq, slot.master)
    return runs_triton(slot.parameter) and all(tensor.is_contiguous() for tensor in tensors if tensor is not None)


def _row(slot: Slot) -> tuple[int, ...]:
    """A row of the kernel's table: addresses (0 for none), elements, number and shard."""
    numel = slot.parameter.numel()
    assert numel < 2**32, "random numbers are counted in 32 bits"
    return *[0 if tensor is None else tensor.data_ptr() for tensor in slot[:8]], numel, slot.number, slot.shard


def _kind(slot: Slot, row: tuple[int, ...]) -> _Kind:
    parameter, grad, exp_avg, exp_avg_sq, _, master, *_, numel, _, _ = row
    types = slot.parameter.dtype, slot.grad.dtype, slot.exp_avg.dtype
    block = 0 if slot.exp_avg_scale is None else numel // slot.exp_avg_scale.numel()
    vector = vector_length(
        parameter | grad | exp_avg | exp_avg_sq | master | numel, max(dtype.itemsize for dtype in types)
    )
    return _Kind(*types, slot.master is not None, block, vector)


@jit
def _advance(  # type: ignore[no-untyped-def]
    table, lr, coefficients_N4, tensors, log_beta1, log_beta2, weight_decay, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the updates of each tensor, and what the update needs of the count: a row of weight decay's factor, step
    size, the factor on the root of exp_avg_sq, and the count. In fp64: 1 - beta ** step loses 4 digits in fp32."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < tensors
    step_address = tl.load(table + row * COLUMNS + 4, mask=here, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_address, mask=here, other=0.0) + 1.0
    tl.store(step_address, step, mask=here)
    rate = tl.load(lr).to(tl.float64)
    correction1 = 1.0 - tl.exp(step.to(tl.float64) * log_beta1)
    correction2 = 1.0 - tl.exp(step.to(tl.float64) * log_beta2)
    out = coefficients_N4 + 4 * row
    tl.store(out, (1.0 - rate * weight_decay).to(tl.float32), mask=here)
    tl.store(out + 1, (rate / correction1).to(tl.float32), mask=here)
    tl.store(out + 2, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=here)
    tl.store(out + 3, step, mask=here)


@jit
def _adamw(  # type: ignore[no-untyped-def]
    table,
    chunks,
    coefficients_N4,
    grad_factor,
    values1,
    between1,
    first1,
    values2,
    between2,
    first2,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    PARAMETER: tl.constexpr,
    GRAD: tl.constexpr,
    AVERAGES: tl.constexpr,
    MASTER: tl.constexpr,
    QUANTISED: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    row, start = chunk_of(chunks, CHUNK)
    entry = table + row * COLUMNS
    parameter = pointer(entry, PARAMETER, VECTOR) + start
    grads = pointer(entry + 1, GRAD, VECTOR) + start
    averages = pointer(entry + 2, AVERAGES, VECTOR) + start
    squares = pointer(entry + 3, AVERAGES, VECTOR) + start
    source = parameter
    if MASTER:
        source = pointer(entry + 5, tl.float32, VECTOR) + start
    scales1 = averages
    scales2 = squares
    if QUANTISED:
        scales1 = pointer(entry + 6, tl.float32, 1) + start // QUANTISED
        scales2 = pointer(entry + 7, tl.float32, 1) + start // QUANTISED
    length = chunk_length(tl.load(entry + 8), start, VECTOR, CHUNK)

    decay = tl.load(coefficients_N4 + 4 * row)
    step_size = tl.load(coefficients_N4 + 4 * row + 1)
    root_factor = tl.load(coefficients_N4 + 4 * row + 2)
    step = tl.load(coefficients_N4 + 4 * row + 3).to(tl.int32)
    factor = 1.0
    if grad_factor is not None:
        factor = tl.load(grad_factor)
    number = tl.load(entry + 9).to(tl.int32)
    shard = tl.load(entry + 10).to(tl.int32)
    ROUNDED: tl.constexpr = (tl.bfloat16 == PARAMETER) & (not MASTER)

    lane = tl.arange(0, TILE)[:, None]
    half = tl.arange(0, 2)[None, :]
    for offset in range(0, length, 2 * TILE):
        at = offset + lane + half * TILE
        here = at < length
        value = tl.load(source + at, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(grads + at, mask=here, other=0.0).to(tl.float32) * factor
        exp_avg = _read_average(averages, scales1, values1, at, here, QUANTISED)
        exp_avg_sq = _read_average(squares, scales2, values2, at, here, QUANTISED)

        exp_avg = beta1 * exp_avg + rest1 * grad
        exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
        value = decay * value - step_size * exp_avg / (tl.sqrt(exp_avg_sq) * root_factor + eps)

        if ROUNDED:
            pair = ((start + offset) // 2).to(tl.int32) + lane
            noise, noise1, noise2 = _noise(step, pair, number, shard, half)
            _store_rounded(parameter, value, noise, at, here)
        else:
            noise1 = half
            noise2 = half
            tl.store(parameter + at, value.to(PARAMETER), mask=here)
        if MASTER:
            tl.store(source + at, value, mask=here)
        _write_average(averages, scales1, between1, first1, exp_avg, noise1, at, here, offset, length, QUANTISED, TILE)
        _write_average(
            squares, scales2, between2, first2, exp_avg_sq, noise2, at, here, offset, length, QUANTISED, TILE
        )


@jit
def _noise(step, pair, number, shard, half):  # type: ignore[no-untyped-def]
    """Three times 16 random bits for each element of a tile: Philox gives 128 for the two of a pair. Seven of its
    rounds pass the tests of randomness (doi 10.1145/2063384.2063405)."""
    random, random1, random2, _ = tl.philox(step.to(tl.int64), pair, pair * 0, pair * 0 + number, pair * 0 + shard, 7)
    shift = (16 * half).to(tl.uint32)
    return (
        ((random >> shift) & 0xFFFF).to(tl.int32),
        ((random1 >> shift) & 0xFFFF).to(tl.int32),
        ((random2 >> shift) & 0xFFFF).to(tl.int32),
    )


@jit
def _store_rounded(target, value, noise, at, here):  # type: ignore[no-untyped-def]
    """As `stochastic_round_`: bf16 is the upper half of fp32's bits. A NaN of all ones would become a zero."""
    bits = value.to(tl.int32, bitcast=True) + tl.where(value == value, noise, 0)
    tl.store(target + at, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=here)


@jit
def _read_average(average, scales, values, at, here, QUANTISED: tl.constexpr):  # type: ignore[no-untyped-def]
    stored = tl.load(average + at, mask=here, other=0)
    if QUANTISED:
        scale = tl.load(scales + at // QUANTISED, mask=here, other=0.0)
        result = tl.load(values + stored.to(tl.int32)) * scale
    else:
        result = stored.to(tl.float32)
    return result


@jit
def _write_average(  # type: ignore[no-untyped-def]
    average,
    scales,
    between,
    first,
    value,
    noise,
    at,
    here,
    offset,
    length,
    QUANTISED: tl.constexpr,
    TILE: tl.constexpr,
):
    if QUANTISED:
        BLOCKS: tl.constexpr = 2 * TILE // QUANTISED
        blocks = tl.reshape(tl.trans(value), (BLOCKS, QUANTISED))
        # as integers, positive floats have the same order, and NaN is the largest
        top = tl.max(tl.abs(blocks).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
        scale = tl.where(top < 1e-12, 1e-12, top)
        ratio = tl.trans(tl.reshape(blocks * (1.0 / scale)[:, None], (2, TILE)))
        below = tl.load(first + ((ratio.to(tl.int32, bitcast=True) >> 16) & 0xFFFF)).to(tl.int32)
        code = below + (ratio > tl.load(between + below)).to(tl.int32)
        tl.store(average + at, code.to(tl.uint8), mask=here)
        block = offset // QUANTISED + tl.arange(0, BLOCKS)
        tl.store(scales + block, scale, mask=block * QUANTISED < length)
    elif average.dtype.element_ty == tl.bfloat16:
        _store_rounded(average, value, noise, at, here)
    else:
        tl.store(average + at, value, mask=here)
