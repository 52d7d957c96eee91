"""Attention against its definition in float64, shared by the tests on CPU and GPU."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.kernels.attention import attend, attend_ref, sink_gradient, sink_gradient_ref


class Problem(NamedTuple):
    """Shape of an attention, and what it has besides."""

    rows: int
    length: int
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    documents: tuple[int, ...] | None = None
    """Lengths in the flattened rows; zeros at the end are empty documents."""
    sinks: bool = False


TRITON = {
    "causal": Problem(2, 150, 4, 2, 16, 16),
    "one key head": Problem(1, 130, 6, 1, 32, 32),
    "smaller values": Problem(1, 70, 2, 2, 48, 24),
    "shorter than a block": Problem(3, 5, 2, 1, 8, 8),
    "window": Problem(1, 300, 2, 1, 16, 16, window=37),
    "sinks": Problem(1, 140, 2, 1, 16, 16, sinks=True),
    "documents": Problem(2, 200, 4, 2, 16, 16, documents=(130, 1, 1, 68, 64, 136, 0, 0)),
    "short documents": Problem(1, 129, 2, 1, 16, 16, documents=(2,) * 64 + (1,)),
    "all": Problem(2, 150, 4, 2, 40, 40, window=33, documents=(100, 50, 20, 130), sinks=True),
}
"""Small problems for the Triton kernels: ragged lengths, groups of heads, blocks of no document's edge and of many."""


def cumulative(lengths: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def random_leaves(problem: Problem, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v as Transformers has them, [B, heads, S, D] views of [B, S, heads, D]; the sinks, if any."""
    rows, length, heads, key_heads, head_dim, value_dim = problem[:6]
    shapes = [(heads, head_dim), (key_heads, head_dim), (key_heads, value_dim)]
    leaves = [torch.randn(rows, length, *shape, device=device, dtype=dtype).transpose(1, 2) for shape in shapes]
    if problem.sinks:
        leaves.append(torch.randn(heads, device=device, dtype=dtype))
    return [leaf.requires_grad_() for leaf in leaves]


def run(problem: Problem, leaves: list[Tensor], backend: str | None) -> Tensor:
    """[B, S, H, V] of a backend, or of the definition (None), in the type of the leaves."""
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves[:3])
    options = {
        "scale": 0.9 * problem.head_dim**-0.5,
        "window": problem.window,
        "cu_seqlens": None if problem.documents is None else cumulative(problem.documents, q.device.type),
        "sinks_H": leaves[3] if problem.sinks else None,
    }
    return attend_ref(q, k, v, **options) if backend is None else attend(q, k, v, backend, **options)


def check_attention(problem: Problem, backend: str, dtype: torch.dtype, device: str, tolerance: float) -> None:
    """Output and every gradient of `backend` are within `tolerance`, relative to the largest, of float64."""
    leaves = random_leaves(problem, dtype, device)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = run(problem, leaves, backend), run(problem, exact, None)
    grad = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for name, value, right in zip(("out", "dq", "dk", "dv", "dsinks"), found, wanted, strict=False):
        assert value.dtype == dtype and value.shape == right.shape
        error = (value.double() - right).abs().max().item() / right.abs().max().item()
        assert error <= tolerance, f"{name} is {error:.1e} off"


def check_sink_gradient(device: str, dtype: torch.dtype) -> None:
    """Ragged sizes, an `out` in another layout than `grad`, and the log-sum-exp of documents, [H, T]."""
    rows, length, heads, size = 2, 150, 3, 40
    grad = torch.randn(rows, length, heads, size, device=device, dtype=dtype)
    out = torch.randn(rows, heads, length, size, device=device, dtype=dtype).transpose(1, 2)
    sinks = torch.randn(heads, device=device, dtype=dtype)
    lse = torch.randn(heads, rows * length, device=device).unflatten(1, (rows, length)).transpose(0, 1)
    found = sink_gradient(grad, out, lse, sinks)
    wanted = sink_gradient_ref(grad.double(), out.double(), lse.double(), sinks.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    assert found.dtype == torch.float32


if __name__ == "__main__":  # under Triton's interpreter, which must be switched on before Triton is imported
    from moetrain.kernels._triton import INTERPRETED

    assert INTERPRETED
    torch.manual_seed(0)
    check_sink_gradient("cpu", torch.float32)
    check_sink_gradient("cpu", torch.bfloat16)
