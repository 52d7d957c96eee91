"""Rows that a backward needs, of all layers in one buffer: each layer's begin where those of the layer before end.

How many rows the routing brings a rank varies by layer and by batch; with a buffer of its own each layer needs room
for the most it may ever get, all layers together for little more than their mean. Where a layer's rows begin is known
on the device alone: kernels take it as a tensor (`at`), and nothing waits.

Shapes: R rows (capacity of a layer), C columns, E experts of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetrain.kernels._triton import jit, next_power_of_2, runs_triton, tl


class Place(NamedTuple):
    """Room for the rows of one call."""

    stack: RowStack
    at: torch.Tensor
    """int64 [1] on the device: row of the stack's buffers at which the call's first row lies."""

    def rows(self, name: str, count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `count` rows of the buffer called `name`; the call's own are `at` rows further on, which the
        kernels add. Every call gets the same memory, as a tensor of its own."""
        return self.stack._rows(name, count, columns, dtype)


class RowStack:
    """Attributes:
    capacity: rows of the buffers before the last call's; None lays nothing out and only counts.
    most: int64 on the device, the largest number of rows before a call of any pass; what is in the rows of a call
        that had more than `capacity` before it is of no use.
    """

    def __init__(self, device: torch.device) -> None:
        self.capacity: int | None = None
        self._slack = 0
        self._used = torch.zeros(1, dtype=torch.int64, device=device)
        self.most = torch.zeros((), dtype=torch.int64, device=device)
        self._buffers: dict[str, torch.Tensor] = {}

    def lay_out(self, capacity: int | None, largest_call: int = 0) -> None:
        """From now on there is room for `capacity` rows and one more call of up to `largest_call`. Frees the buffers
        that there are."""
        self.capacity, self._slack = capacity, largest_call
        self._buffers = {}

    def begin(self) -> None:
        """The next call is the first of a pass: nobody needs the rows of the one before."""
        self._used.zero_()

    def push(self, counts_E: torch.Tensor) -> Place | None:
        """Room for a call's rows above those of the calls before; None where they are only counted.

        Args:
            counts_E: integer rows of each expert, on the device.
        """
        limit = 2**62 if self.capacity is None else self.capacity
        at = _push(counts_E, self._used, self.most, limit)
        return None if self.capacity is None else Place(self, at)

    def _rows(self, name: str, count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        assert self.capacity is not None
        assert count <= self._slack, f"{count} rows in a call, {self._slack} expected at most"
        if name not in self._buffers:
            size = self.capacity + self._slack
            self._buffers[name] = torch.empty(size, columns, dtype=dtype, device=self._used.device)
        buffer = self._buffers[name]
        assert buffer.shape[1] == columns and buffer.dtype == dtype
        # no view: autograd and the checks of in-place writes take calls apart
        return buffer.new_empty(0).set_(buffer.untyped_storage(), 0, (count, columns), (columns, 1))


def rows_at(tensor_RC: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """The rows themselves, of a tensor that stands `at` rows before them. Reads `at` on the host: for references."""
    if at is None:
        return tensor_RC
    start = tensor_RC.storage_offset() + int(at) * tensor_RC.stride(0)
    return tensor_RC.as_strided(tensor_RC.shape, tensor_RC.stride(), start)


def _push(counts_E: torch.Tensor, used: torch.Tensor, most: torch.Tensor, limit: int) -> torch.Tensor:
    if not runs_triton(counts_E):
        at = used.clamp(max=limit)
        most.copy_(torch.maximum(most, used[0]))
        used += counts_E.sum()
        return at
    at = torch.empty_like(used)
    experts = counts_E.numel()
    _push_kernel[(1,)](counts_E, used, most, at, limit, experts, PAD_E=next_power_of_2(experts), num_warps=1)
    return at


@jit
def _push_kernel(counts_E, used, most, at, limit, experts, PAD_E: tl.constexpr):  # type: ignore[no-untyped-def]
    e = tl.arange(0, PAD_E)
    count = tl.sum(tl.load(counts_E + e, mask=e < experts, other=0).to(tl.int64), 0)
    before = tl.load(used)
    tl.store(at, tl.minimum(before, limit))
    tl.store(most, tl.maximum(tl.load(most), before))
    tl.store(used, before + count)
