"""The Mamba-2 kernels under Triton's interpreter, on CPU tensors. `test_mamba.py` runs this file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from moetrain.backends import mamba
from moetrain.kernels import mamba2, mamba2_conv, mamba2_norm
from tests import mamba_cases as cases
from tests.families import build
from tests.interpreted import mend_interpreter

INF = float("inf")


@pytest.fixture(autouse=True)
def interpreter_under_new_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    mend_interpreter(monkeypatch)
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("tokens", "taps", "bias", "packed", "dtype"),
    [
        (130, 4, True, True, torch.float32),
        (9, 4, True, False, torch.bfloat16),
        (5, 3, False, True, torch.float32),
        (1, 2, True, False, torch.float16),
    ],
)
def test_convolution(tokens: int, taps: int, bias: bool, packed: bool, dtype: torch.dtype) -> None:
    cases.check_conv(2, tokens, 40, taps, bias, packed, dtype, "cpu")


@pytest.mark.parametrize(("tokens", "groups", "width"), [(37, 3, 20), (1, 1, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(tokens: int, groups: int, width: int, dtype: torch.dtype) -> None:
    cases.check_norm(2, tokens, groups, width, dtype, "cpu")


@pytest.mark.parametrize(
    ("packed", "limit", "dtype"),
    [(False, (0.05, 1.0), torch.float32), (True, (0.0, INF), torch.float32), (True, (0.05, 1.0), torch.float16)],
)
@pytest.mark.parametrize("name", cases.SCANS)
def test_scan(name: str, packed: bool, limit: tuple[float, float], dtype: torch.dtype) -> None:
    """In fp16: the interpreter has no product of bf16."""
    cases.check_scan(cases.SCANS[name], packed, limit, dtype, "cpu")


def test_heads_that_forget_at_once() -> None:
    cases.check_quick_heads(torch.float16, "cpu")


def test_operators_are_registered_right() -> None:
    """Schema, fake shapes and autograd of every operator, as torch.compile and checkpointing rely on them."""
    tensors, _ = cases.scan_case((1, 40, 4, 16, 2, 16), torch.float32, "cpu")
    x, dt, A, B, C, D, dt_bias = (tensor.detach().requires_grad_() for tensor in tensors)
    seq_idx = cases.documents(1, 40, "cpu")
    weight, bias, scale = (torch.randn(*shape, requires_grad=True) for shape in ((32, 4), (32,), (64,)))
    y, gate = x.detach().flatten(2), torch.randn(1, 40, 64, requires_grad=True)
    for op, args in [
        (mamba2._scan_op, (x, dt, A, B, C, D, dt_bias, seq_idx, 0.0, 10.0)),
        (mamba2_conv._conv_op, (B.flatten(2).detach().requires_grad_(), weight, bias, seq_idx)),
        (mamba2_norm._norm_op, (y.requires_grad_(), gate, scale, 2, 1e-5)),
    ]:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", cases.MIXERS)
def test_mixer_is_transformers(model_type: str, padded: bool) -> None:
    """Output and every gradient, in training and evaluation; the original class stays as it was."""
    slow = cases.build_mixer(model_type, "cpu", torch.float32).train(not padded)
    fast = cases.install(copy.deepcopy(slow))
    x, grad = torch.randn(2, 2, 21, 32).unbind()
    mask = torch.ones(2, 21)
    mask[0, :5] = 0
    kwargs = {"attention_mask": mask} if padded else {}
    cases.check_same(cases.mixer_step(fast, x, grad, **kwargs), cases.mixer_step(slow, x, grad, **kwargs), 3e-5)


@pytest.mark.parametrize("model_type", ["nemotron_h", "falcon_h1"])
def test_packed_documents_are_as_alone(model_type: str) -> None:
    slow = cases.build_mixer(model_type, "cpu", torch.float32)
    fast = cases.install(copy.deepcopy(slow))
    x, grad = torch.randn(2, 2, 40, 32).unbind()
    seq_idx = cases.documents(2, 40, "cpu")
    assert mamba.reads_seq_idx(fast, x)
    found = cases.mixer_step(fast, x, grad, seq_idx=seq_idx)

    def alone(x: torch.Tensor) -> torch.Tensor:
        rows = [
            torch.cat([slow(row[ids == i][None])[0] for i in ids.unique()]) for row, ids in zip(x, seq_idx, strict=True)
        ]
        return torch.stack(rows)

    cases.check_same(found, cases.mixer_step(slow, x, grad, forward=alone), 3e-5)


def test_projections_are_called_as_modules() -> None:
    """An adapter on the last projection takes part, which the fused kernel of mamba-ssm leaves out."""

    mixer = cases.install(cases.build_mixer("nemotron_h", "cpu", torch.float32))
    x = torch.randn(1, 9, 32)
    before = mixer(x)
    mixer.out_proj.register_forward_hook(lambda module, args, out: 2 * out)
    assert torch.equal(mixer(x), 2 * before)


def test_compiles_to_our_operators() -> None:
    """In one graph. torch.compile looks names up in the module that a function says it is from."""
    mixer = cases.install(cases.build_mixer("nemotron_h", "cpu", torch.float32))
    x, grad = torch.randn(2, 1, 20, 32).unbind()
    operators: set[str] = set()

    def record(graph: Any, inputs: Any) -> Any:
        operators.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(cases.as_model(mixer), backend=record, fullgraph=True)
    found = cases.mixer_step(mixer, x, grad, forward=compiled)
    assert {"moetrain.causal_conv.default", "moetrain.chunk_scan.default", "moetrain.gated_norm.default"} <= operators
    cases.check_same(found, cases.mixer_step(mixer, x, grad), 1e-6)


@pytest.mark.parametrize("family", ["nemotron_h", "granitemoehybrid"])
def test_whole_model_is_transformers(family: str) -> None:
    model = build(family)
    batch = {"input_ids": torch.randint(3, 100, (2, 19)), "labels": torch.randint(3, 100, (2, 19))}

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    expected = {name: value.clone() for name, value in step().items()}
    assert mamba.use_mamba_kernels(model) is None
    assert all(mixer.reads_seq_idx for mixer in mamba.mamba2_mixers(model))
    cases.check_same(step(), expected, 1e-4)


def test_generation_keeps_transformers_cache() -> None:
    model = build("nemotron_h").eval()
    prompt = torch.randint(3, 100, (1, 7))
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    mamba.use_mamba_kernels(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)
