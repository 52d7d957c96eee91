"""Triton, or nothing: CPU installations of torch come without it."""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch, read when it is imported: the kernels then run in Python, on CPU tensors too."""


def jit(function: Any) -> Any:
    """`triton.jit`, or the bare function where there is no Triton: it is then never launched."""
    return function if triton is None else triton.jit(function)


def runs_triton(tensor: torch.Tensor) -> bool:
    """True if a Triton kernel can work on this tensor, on its device and in its dtype."""
    supported = tensor.dtype in (torch.bfloat16, torch.float16, torch.float32) or not tensor.is_floating_point()
    return triton is not None and supported and (tensor.is_cuda or INTERPRETED)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
