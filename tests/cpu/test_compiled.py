"""What compilation changes in a layer's graph: routers' `topk`, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moetrain.compiled import _OwnTopK

OWN, TORCHS = torch.ops.moetrain.top_k.default, torch.ops.aten.topk.default


def targets(shape: tuple[int, ...], device: str, dtype: torch.dtype, arguments: dict[str, Any]) -> list[Any]:
    """Operators of a graph with one `topk`, after the pass; its results are used."""

    def function(scores: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.topk(scores, **arguments)
        return values * 2, indices + 1

    with FakeTensorMode():
        graph = make_fx(function)(torch.empty(shape, device=device, dtype=dtype))
        _OwnTopK()(graph.graph)
        graph.recompile()
        graph(torch.empty(shape, device=device, dtype=dtype))
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("arguments", [{"k": 8}, {"k": 2, "dim": -1, "sorted": False}, {"k": 1, "dim": 2}])
def test_a_router_takes_the_kernel_for_short_rows(arguments: dict[str, Any]) -> None:
    found = targets((2, 30, 128), "cuda", torch.bfloat16, arguments)
    assert OWN in found and TORCHS not in found


@pytest.mark.parametrize(
    ("shape", "device", "dtype", "arguments"),
    [
        ((30, 128), "cpu", torch.float32, {"k": 8}),
        ((30, 2048), "cuda", torch.float32, {"k": 8}),
        ((30, 128), "cuda", torch.float32, {"k": 64}),
        ((30, 128), "cuda", torch.float64, {"k": 8}),
        ((30, 128), "cuda", torch.float32, {"k": 8, "largest": False}),
        ((30, 128), "cuda", torch.float32, {"k": 8, "dim": 0}),
    ],
)
def test_others_stay(shape: tuple[int, ...], device: str, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    found = targets(shape, device, dtype, arguments)
    assert TORCHS in found and OWN not in found
