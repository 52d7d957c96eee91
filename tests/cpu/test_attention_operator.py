"""The operator of attention: its formulas, its gradients, and what torch expects of it.

No kernel of a GPU runs here: the operator's own reference goes through the same registry, sinks and gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moetrain.kernels import attention as kernel
from moetrain.tape import keep_received
from tests.attention_cases import Problem, check_attention, cumulative, random_leaves, run
from tests.interpreted import run_interpreted

PROBLEMS = {
    "plain": Problem(2, 13, 4, 2, 8, 8),
    "every head its own": Problem(1, 9, 3, 3, 8, 8),
    "smaller values": Problem(2, 7, 4, 2, 16, 8),
    "window": Problem(2, 13, 4, 1, 8, 8, window=5),
    "narrow window": Problem(1, 6, 2, 1, 8, 8, window=2),
    "sinks": Problem(2, 13, 4, 2, 8, 8, sinks=True),
    "documents": Problem(2, 13, 4, 2, 8, 8, documents=(3, 1, 9, 13, 0, 0)),
    "all": Problem(2, 13, 4, 2, 8, 8, window=3, documents=(6, 7, 1, 12, 0), sinks=True),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_formulas_of_the_kernels(name: str) -> None:
    check_attention(PROBLEMS[name], "reference", torch.float64, "cpu", 1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputation_takes_what_was_kept(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention runs once though its layer runs twice, in compiled code too, and the gradients are those of without."""
    calls = []
    reference = kernel._FORWARD["reference"]

    def counted(*args: Any) -> Any:
        calls.append(1)
        return reference(*args)

    monkeypatch.setitem(kernel._FORWARD, "reference", counted)

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        q, k, v = (x @ weight).view(2, 9, 3, 4, 8).unbind(2)
        return kernel.attend(q, k, v, "reference", scale=0.3, keep=True).flatten(2).sin()

    x, weight = torch.randn(2, 9, 32, requires_grad=True), torch.randn(32, 96, requires_grad=True)
    plain = layer(x, weight)
    expected = [plain, *torch.autograd.grad(plain.square().sum(), (x, weight))]
    calls.clear()
    function = torch.compile(layer, backend="aot_eager") if compiled else layer
    out = checkpoint(function, x, weight, use_reentrant=False, context_fn=keep_received)
    found = [out, *torch.autograd.grad(out.square().sum(), (x, weight))]
    assert len(calls) == 1
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_operator_is_what_torch_expects_of_one(name: str) -> None:
    """Its shapes without data, its autograd, and what torch.compile makes of it."""
    problem = PROBLEMS[name]
    leaves = random_leaves(problem, torch.float32, "cpu")
    documents = None if problem.documents is None else cumulative(problem.documents, "cpu")
    tensors = [*(leaf.transpose(1, 2) for leaf in leaves[:3]), leaves[3] if problem.sinks else None, documents]
    torch.library.opcheck(torch.ops.moetrain.attention, (*tensors, 0.3, problem.window, "reference", True))
    compiled = torch.compile(
        lambda *leaves: run(problem, list(leaves), "reference"), fullgraph=True, backend="aot_eager"
    )
    results = []
    for function in (compiled, lambda *leaves: run(problem, list(leaves), "reference")):
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_of_sinks_under_the_interpreter() -> None:
    run_interpreted("-m", "tests.attention_cases")
