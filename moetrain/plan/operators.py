"""What one operator of a trace computes and moves.

Matrix products count operations, everything else the bytes it reads and writes: on a GPU nothing else takes time. An
operator of this package runs several kernels, which the meta device does not: they stand here, with the memory that
they use between them.

Shapes: R rows, H hidden, I intermediate, G width of the up projection, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from moetrain.tape import replaying

PARTS = ("cudnn attention", "attention", "dense", "experts", "head", "recurrent", "fp32", "passes")
"""cuDNN's attention, and flash or memory-efficient attention; products of dense layers; of experts; of the head; scans
of recurrent layers; products in fp32, which tensor cores do not take; and passes over memory."""


SCAN_CHUNK = 128
"""Tokens of a chunk in this package's scan."""


@dataclass
class Work:
    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0
    """Kernels that the host issues."""

    def add(self, other: Work) -> None:
        self.flops += other.flops
        self.bytes += other.bytes
        self.launches += other.launches


class Cost(NamedTuple):
    """Of one operator."""

    work: dict[str, Work]
    """By part; empty for a view or an allocation."""
    scratch: int = 0
    """Bytes that it uses and gives back."""
    aside: int = 0
    """Bytes that it keeps until the next one of its kind, where gradients of weights are computed on a second stream
    (`moetrain.kernels.aside`)."""


def cost_of(func: Any, args: Any, kwargs: Any, out: Any, in_head: bool) -> Cost:
    """What an operator costs, from its arguments and its result on the meta device."""
    name = func._schema.name
    if name in _OWN:
        return _OWN[name](*args)
    if func.is_view or name in _FREE:
        return Cost({})
    if "scaled_dot_product" in name:
        # half of the scores are masked, and kernels skip them
        flops = _torch_attention_flops(name, args) / 2
        part = "cudnn attention" if "cudnn" in name else "attention"
        return Cost({part: Work(flops, 0, 1)}, _torch_attention_scratch(name, args))
    if name in _PRODUCTS:
        left = args[_PRODUCTS[name]]
        part = "fp32" if left.dtype == torch.float32 else "head" if in_head else "dense"
        return Cost({part: Work(2 * out.numel() * left.shape[-1], 0, 1)})
    return Cost({"passes": Work(0, sum(nbytes(x) for x in tree_iter((args, kwargs, out))), 1)})


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Any,
    cu_seqlens: Any,
    scale: float,
    window: int | None,
    backend: str,
    keep: bool = False,
) -> Cost:
    """`moetrain::attention`: half of the scores are masked, with a window more. Nothing in a recomputation that takes
    what the forward has kept."""
    if keep and replaying():
        return Cost({})
    rows, length, heads, size = q.shape
    seen = min(window or length, length)
    keys = seen - seen**2 / (2 * length)
    flops = 2 * rows * heads * length * keys * (size + v.shape[-1])
    return Cost({"cudnn attention" if backend == "cudnn" else "attention": Work(flops, 0, 1)})


def _attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Cost:
    """Five products for the forward's two."""
    *_, window, backend = args
    [(part, work)] = _attend(q, k, v, None, None, 1.0, window, backend).work.items()
    return Cost({part: Work(2.5 * work.flops, 0, 2)}, _gradients_scratch(q, k, v, q.shape[2] // k.shape[2]))


def _gradients_scratch(query: Tensor, key: Tensor, value: Tensor, heads: int) -> int:
    """The queries' gradient is summed in fp32, those of keys and values for each of the `heads` that share them."""
    return 4 * query.numel() + (0 if heads == 1 else heads * (key.nbytes + value.nbytes))


def _scan(x_BSHP: Tensor, dt: Tensor, A: Tensor, B_BSGN: Tensor, *_: Any) -> Cost:
    """`moetrain::chunk_scan`, whose chunks of 128 tokens each have a state."""
    states = x_BSHP.nbytes * B_BSGN.shape[-1] // SCAN_CHUNK
    flops = scan_flops(x_BSHP.numel(), B_BSGN.shape[-1], SCAN_CHUNK)
    return Cost({"recurrent": Work(flops, 2 * (x_BSHP.nbytes + 2 * B_BSGN.nbytes + states), 4)}, states)


def _scan_backward(grad: Tensor, x_BSHP: Tensor, dt: Tensor, A: Tensor, B_BSGN: Tensor, *_: Any) -> Cost:
    forward = _scan(x_BSHP, dt, A, B_BSGN)
    work = forward.work["recurrent"]
    return Cost({"recurrent": Work(2.5 * work.flops, 3 * work.bytes, 8)}, 2 * forward.scratch)


def scan_flops(inner: int, state: int, chunk: int) -> int:
    """Products of a chunked scan of `inner` numbers over all tokens: inside a chunk, half of it masked, into its state
    and out of it."""
    return inner * (chunk + 4 * state)


def nbytes(value: Any) -> int:
    """Of a tensor as a kernel reads it: what is expanded is read once."""
    if not isinstance(value, Tensor):
        return 0
    return min(value.numel() * value.itemsize, value.untyped_storage().nbytes())


def _torch_attention_flops(name: str, args: Any) -> int:
    """Of all scores. Torch's own count (`flop_registry`) of 2.11 refuses fewer key heads than query heads."""
    backward = "_backward" in name
    query, key, value = args[1:4] if backward else args[:3]
    size, value_size = query.shape[-1], value.shape[-1]
    columns = 3 * size + 2 * value_size if backward else size + value_size
    return 2 * int(query.shape[:-1].numel()) * int(key.shape[2]) * int(columns)


def _torch_attention_scratch(name: str, args: Any) -> int:
    if not name.endswith("_backward"):
        return 0
    query, key, value = args[1:4]
    return _gradients_scratch(query, key, value, query.shape[1] // key.shape[1])


def _experts(
    x_TH: Tensor,
    weights_TK: Tensor,
    row_TK: Tensor,
    offsets_E: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    *rest: Any,
) -> Cost:
    """`moetrain::experts`: rows gathered, two products, the activation between them, rows summed; where only the
    backward matters, up to the first product."""
    rows, (hidden, inner, width) = row_TK.numel(), _widths(up, down, transposed)
    if not rest[-1]:
        moved = x_TH.itemsize * (rows * hidden + x_TH.numel())
        return Cost({"experts": Work(2 * rows * hidden * width, moved, 3)}, x_TH.itemsize * rows * hidden)
    numbers = rows * (2 * hidden + inner + width) + 2 * x_TH.numel()
    flops = 2 * rows * hidden * (width + inner)
    work = Work(flops, x_TH.itemsize * numbers, 6)
    return Cost({"experts": work}, x_TH.itemsize * rows * (2 * hidden + inner))


def _experts_backward(grad_TH: Tensor, up_RG: Tensor, x_TH: Tensor, *args: Any) -> Cost:
    _, _, _, up, down, _, _, transposed, *_rest = args
    (rows, width), (hidden, inner, _) = up_RG.shape, _widths(up, down, transposed)
    scratch = x_TH.itemsize * rows * (3 * hidden + 2 * inner + width)
    numbers = rows * (4 * hidden + 2 * inner + 2 * width)
    return Cost({"experts": Work(4 * rows * hidden * (width + inner), x_TH.itemsize * numbers, 9)}, scratch)


def _rows(rows_RH: Tensor, weights_R: Tensor, offsets_E: Tensor, up: Tensor, down: Tensor, *args: Any) -> Cost:
    """`moetrain::expert_rows`: two products and the activation between them, or the first of them."""
    rows, (hidden, inner, width) = len(rows_RH), _widths(up, down, args[2])
    if not args[-1]:
        return Cost({"experts": Work(2 * rows * hidden * width, 0, 1)})
    flops = 2 * rows * hidden * (width + inner)
    size = rows_RH.itemsize * rows
    return Cost({"experts": Work(flops, size * (width + inner), 3)}, size * inner)


def _rows_backward(grad_RH: Tensor, up_RG: Tensor, rows_RH: Tensor, weights_R: Tensor, *args: Any) -> Cost:
    _, up, down, _, _, transposed, *_rest = args
    (rows, width), (hidden, inner, _) = up_RG.shape, _widths(up, down, transposed)
    size = rows_RH.itemsize * rows
    work = Work(4 * rows * hidden * (width + inner), size * 2 * (width + inner), 5)
    # rows, their gradients on both sides, the up projection's and the activation
    return Cost({"experts": work}, size * (2 * inner + width), size * (3 * hidden + width + inner))


def _widths(up: Tensor, down: Tensor, transposed: bool) -> tuple[int, int, int]:
    """H, I and G of the experts' weights."""
    hidden, width = (up.shape[1], up.shape[2]) if transposed else (up.shape[2], up.shape[1])
    return hidden, down.shape[1 if transposed else 2], width


def _grouped(rows_RK: Tensor, weight_EKN: Tensor, *_: Any) -> Cost:
    return Cost({"experts": Work(2 * rows_RK.numel() * weight_EKN.shape[2], 0, 1)})


def _outer(left_RM: Tensor, right_RN: Tensor, *_: Any) -> Cost:
    return Cost({"experts": Work(2 * left_RM.numel() * right_RN.shape[1], 0, 1)})


def _kernel(inputs: Any, out: Any, kept: Any, scratch: int, scan: int, dense: int) -> Cost:
    moved = 2 * sum(map(nbytes, inputs)) + scratch
    return Cost({"recurrent": Work(scan, moved, 4), "dense": Work(dense, 0, 1)}, scratch)


def _kernel_backward(grad: Tensor, inputs: Any, kept: Tensor, scratch: int, scan: int, dense: int) -> Cost:
    moved = 3 * sum(map(nbytes, inputs)) + scratch
    return Cost({"recurrent": Work(scan, moved, 8), "dense": Work(dense, 0, 2)}, scratch)


_OWN: dict[str, Callable[..., Cost]] = {
    "moetrain::attention": _attend,
    "moetrain::attention_backward": _attend_backward,
    "moetrain::chunk_scan": _scan,
    "moetrain::chunk_scan_backward": _scan_backward,
    "moetrain::experts": _experts,
    "moetrain::experts_backward": _experts_backward,
    "moetrain::expert_rows": _rows,
    "moetrain::expert_rows_backward": _rows_backward,
    "moetrain::grouped_mm": _grouped,
    "moetrain::grouped_outer": _outer,
    "moetrain_plan::kernel": _kernel,
    "moetrain_plan::kernel_backward": _kernel_backward,
}
"""Operators of several kernels, and what their arguments tell."""

_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
"""Matrix products, and which argument is the left one."""

_FREE = {
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_")
}
