"""The plain reference of the optimizer's kernel, and the path where it does not run: an update by torch's operators.

The same update as `moetrain.kernels.adamw`, in fp32 by torch's fused kernel, but for the random bits of stochastic
rounding: they are other numbers, from torch's generator.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from moetrain.kernels.adamw import Codebook, Slot

BUCKET_ELEMENTS = 2**26
"""Parameters updated together; bounds the fp32 temporaries of bf16 and 8-bit states to 256 MiB each."""
BLOCK = 256
"""Elements that share a scale in an 8-bit state (arXiv 2110.02861), at most; rows that it does not divide use less."""
MIN_BLOCK = 32
"""A smaller block costs more than 1/8 byte an element in scales; such states stay fp32."""
MIN_QUANTISED = 4096
"""Smaller tensors keep fp32 states, as in bitsandbytes."""


class Quantiser:
    """8-bit codes and a scale for each block along the last dimension (arXiv 2110.02861)."""

    def __init__(self, signed: bool, device: torch.device) -> None:
        try:
            from torchao.optim.quant_utils import create_dynamic_map
        except ImportError as error:
            raise ValueError("optim.states=8bit needs torchao: pip install torchao") from error
        self._values = torch.tensor(create_dynamic_map(signed), device=device)
        self._between = (self._values[1:] + self._values[:-1]) / 2

    @cached_property
    def codebook(self) -> Codebook:
        """The codes as the kernel looks them up."""
        end = self._between.new_full((1,), math.inf)
        return Codebook(self._values, torch.cat([self._between, end]), _first_codes(self._between))

    def read(self, codes: Tensor, scale: Tensor) -> Tensor:
        """fp32 values of uint8 `codes` [..., L] with `scale` [..., L / block]."""
        blocks = codes.contiguous().view(*scale.shape, codes.shape[-1] // scale.shape[-1])
        return (self._values[blocks.int()] * scale.unsqueeze(-1)).view(codes.shape)

    def write(self, codes: Tensor, scale: Tensor, value: Tensor) -> None:
        """Quantise fp32 `value` into `codes` and `scale`, each element to the nearest code."""
        blocks = value.reshape(*scale.shape, codes.shape[-1] // scale.shape[-1])
        scale.copy_(blocks.abs().amax(-1).clamp_(min=1e-12))
        nearest = torch.bucketize(blocks / scale.unsqueeze(-1), self._between, out_int32=True)
        codes.copy_(nearest.view(codes.shape))


def _first_codes(between: Tensor) -> Tensor:
    """`Codebook.first`: numbers that agree in their upper 16 bits have one code or two neighbours."""
    upper = torch.arange(2**16, dtype=torch.int64, device=between.device) << 16
    bits = torch.stack([upper, upper | 0xFFFF])
    ends = bits.int().view(torch.float32)  # int() keeps the lower 32 bits
    ends = torch.where(ends.isnan(), ends.flip(0), ends)  # of -infinity to NaN, -infinity
    first, _ = torch.bucketize(ends, between).aminmax(dim=0)
    return first.to(torch.uint8)


def quantised_block(parameter: Tensor) -> int:
    """Elements that share a scale in the 8-bit state of a parameter; 0 where the state stays fp32.

    Decided by the global shape, so alike on all ranks; and blocks lie inside a row, so that any sharding of the other
    dimensions keeps them whole.
    """
    if parameter.ndim < 2 or parameter.numel() < MIN_QUANTISED:
        return 0
    if isinstance(parameter, DTensor) and any(
        getattr(placement, "dim", None) == parameter.ndim - 1 for placement in parameter.placements
    ):
        return 0
    block = math.gcd(parameter.shape[-1], BLOCK)
    return block if block >= MIN_BLOCK else 0


def stochastic_round_(target: Tensor, value: Tensor, random: torch.Generator) -> None:
    """Write fp32 `value` into bf16 `target`, up or down with the probability that makes the mean exact.

    bf16 is the upper half of fp32's bits, so adding 16 random bits and cutting the lower half does it. Infinities stay,
    and NaN: a GPU's is all ones, which a carry would turn into zero.
    """
    bits = value.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=random)
    noise.masked_fill_(value.isnan(), 0)
    target.copy_((bits + noise).bitwise_and_(-(2**16)).view(torch.float32))


def adamw_ref(
    slots: Sequence[Slot],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_factor: Tensor | None,
    quantisers: tuple[Quantiser, Quantiser] | None,
    updates: int,
) -> None:
    """Update parameters and states in place: read everything as fp32, update, write back what was a copy.

    Args:
        updates: of the optimizer; with a parameter's `number` and `shard` the seed of its random bits.
    """
    for bucket in _buckets(slots):
        values = [_plain(slot.parameter if slot.master is None else slot.master) for slot in bucket]
        averages = [_read_averages(slot, quantisers) for slot in bucket]
        grads = [_plain(slot.grad) for slot in bucket]
        adamw(
            values,
            grads if grad_factor is None else [grad * grad_factor for grad in grads],
            [exp_avg for exp_avg, _ in averages],
            [exp_avg_sq for _, exp_avg_sq in averages],
            [],
            [slot.step for slot in bucket],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,  # type: ignore[arg-type]  # torch's own annotation leaves tensors out, its fused kernel takes them
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
        for slot, value, (exp_avg, exp_avg_sq) in zip(bucket, values, averages, strict=True):
            _write(slot, value, exp_avg, exp_avg_sq, quantisers, updates)


def _buckets(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    """Consecutive parameters of about `BUCKET_ELEMENTS` elements together."""
    bucket: list[Slot] = []
    elements = 0
    for slot in slots:
        bucket.append(slot)
        elements += slot.parameter.numel()
        if elements >= BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket


def _read_averages(slot: Slot, quantisers: tuple[Quantiser, Quantiser] | None) -> tuple[Tensor, Tensor]:
    if slot.exp_avg_scale is None or slot.exp_avg_sq_scale is None:
        return _plain(slot.exp_avg), _plain(slot.exp_avg_sq)
    assert quantisers is not None
    return (
        quantisers[0].read(slot.exp_avg, slot.exp_avg_scale),
        quantisers[1].read(slot.exp_avg_sq, slot.exp_avg_sq_scale),
    )


def _write(
    slot: Slot,
    value: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    quantisers: tuple[Quantiser, Quantiser] | None,
    updates: int,
) -> None:
    """Back to where it was read as a copy."""
    # torch's generator for CPUs takes 32 bits of a seed
    seed = zlib.crc32(f"{updates} {slot.number} {slot.shard}".encode())
    random = torch.Generator(slot.parameter.device).manual_seed(seed)
    if slot.master is not None:
        _store(slot.master, value, random)
        slot.parameter.copy_(value)
    else:
        _store(slot.parameter, value, random)
    if slot.exp_avg_scale is not None and slot.exp_avg_sq_scale is not None:
        assert quantisers is not None
        quantisers[0].write(slot.exp_avg, slot.exp_avg_scale, exp_avg)
        quantisers[1].write(slot.exp_avg_sq, slot.exp_avg_sq_scale, exp_avg_sq)
    else:
        _store(slot.exp_avg, exp_avg, random)
        _store(slot.exp_avg_sq, exp_avg_sq, random)


def _plain(tensor: Tensor) -> Tensor:
    """In fp32 and without gaps, as torch's fused kernel takes for granted; itself if it is so."""
    return tensor.float().contiguous()


def _store(target: Tensor, value: Tensor, random: torch.Generator) -> None:
    """What `_plain` read from `target`, updated."""
    if target.dtype == torch.bfloat16:
        stochastic_round_(target, value, random)
    elif target is not value:
        target.copy_(value)
