"""TransformerEngine where it is installed: attention against float64, a model through its linear layers and norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moetrain.attention import NAMES, select_attention
from moetrain.backends import transformer_engine
from moetrain.data.isolation import isolate_documents
from tests.attention_cases import Problem, cumulative, random_leaves, run
from tests.cpu.test_data_isolation import packed
from tests.gpu.test_attention_gpu import LLAMA, ROWS, TOLERANCE, logits_and_gradients, small

pytestmark = pytest.mark.skipif(transformer_engine.missing() is not None, reason=str(transformer_engine.missing()))

PROBLEMS = {
    "full": Problem(2, 768, 8, 2, 128, 128),
    "window": Problem(2, 768, 8, 2, 64, 64, window=128),
    "documents": Problem(2, 768, 8, 2, 128, 128, documents=(300, 1, 467, 768, 0, 0)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_attention(name: str) -> None:
    problem = PROBLEMS[name]
    leaves = random_leaves(problem, torch.bfloat16, "cuda")
    options: dict[str, Any] = {"scale": 0.9 * problem.head_dim**-0.5, "window": problem.window}
    if problem.documents is not None:
        options["cu_seqlens"] = cumulative(problem.documents, "cuda")
    out = transformer_engine.attend(*(leaf.transpose(1, 2) for leaf in leaves), **options)
    grad = torch.randn_like(out)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = run(problem, exact, None)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for what, value, right in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        error = (value.double() - right).abs().max() / right.abs().max()
        assert error <= TOLERANCE, f"{what} is {error:.1e} off"


def test_model() -> None:
    """As near to float32 as Transformers' own layers; the names of its parameters stay."""
    _, batch = packed(ROWS)
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    exact = logits_and_gradients(isolate_documents(small(LLAMA)), batch)
    errors = []
    for engine in (False, True):
        model = small(LLAMA).bfloat16()
        names = list(model.state_dict())
        if engine:
            select_attention(model, "transformer_engine")
            assert model.config._attn_implementation == NAMES["transformer_engine"]
            assert transformer_engine.use_transformer_engine(model) == {"linear": 14, "norm": 4}
        results = logits_and_gradients(isolate_documents(model, max_documents=4), batch)
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)])
        assert list(model.state_dict()) == names
    for name, own, theirs in zip(["logits", *names], *errors, strict=True):
        assert theirs <= 1.5 * own + 0.01, f"{name}: {theirs:.4f} from float32, Transformers' own {own:.4f}"
