"""The Triton kernels under Triton's interpreter, on CPU tensors. `test_kernels_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from moetrain.kernels import experts, nvlink
from moetrain.kernels.permutation import permute_rows
from moetrain.kernels.routing import route_sort
from tests import kernel_cases as cases
from tests.interpreted import mend_interpreter


@pytest.fixture(autouse=True)
def interpreter_under_new_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    mend_interpreter(monkeypatch)
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", cases.ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "capacity"), [(70, 3, 5, None), (64, 2, 130, 100), (1, 1, 1, 4)]
)
def test_route_sort(kind: str, tokens: int, top_k: int, experts: int, capacity: int | None) -> None:
    cases.check_route_sort(kind, tokens, top_k, experts, capacity, "cpu", first=experts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "top_k", "hidden"), [("elsewhere", 3, 40), ("skewed", 1, 2060), ("none", 2, 16)])
def test_permute(kind: str, top_k: int, hidden: int, dtype: torch.dtype) -> None:
    cases.check_permute(kind, 9, top_k, hidden, dtype, "cpu")


@pytest.mark.parametrize("name", cases.ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, True), (torch.float32, False)])
def test_activation(name: str, dtype: torch.dtype, bias: bool) -> None:
    cases.check_activation(name, 40, 13, bias, dtype, "cpu")


def test_activation_wider_than_a_tile() -> None:
    cases.check_activation("silu", 1100, 6, False, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_biases(dtype: torch.dtype) -> None:
    cases.check_biases(72, dtype, "cpu")


@pytest.mark.parametrize(("rows", "experts", "k"), [(70, 128, 8), (3, 5, 5), (9, 257, 1)])
def test_top_k(rows: int, experts: int, k: int) -> None:
    cases.check_top_k(rows, experts, k, torch.float32, "cpu")


@pytest.mark.parametrize("group", cases.GROUPS)
def test_grouped(group: str) -> None:
    """In fp16: the interpreter has no product of bf16."""
    cases.check_grouped(group, 72, 40, torch.float16, "cpu")


@pytest.mark.parametrize(
    ("name", "kind", "bias", "transposed"),
    [("silu", "elsewhere", False, False), ("gpt_oss", "sparse", True, True)],
)
def test_layer(name: str, kind: str, bias: bool, transposed: bool) -> None:
    cases.check_layer(
        name,
        kind,
        bias,
        transposed,
        torch.float32,
        "cpu",
        lambda leaves, index, weights, act: experts.experts_forward(leaves[0], index, leaves[1], weights, act),
    )


@pytest.mark.parametrize(("name", "bias", "transposed"), [("silu", False, False), ("gpt_oss", True, True)])
def test_row_stack(name: str, bias: bool, transposed: bool) -> None:
    cases.check_row_stack(name, bias, transposed, torch.float16, "cpu")


def test_full_stack() -> None:
    cases.check_full_stack("cpu")


@pytest.mark.parametrize("world", [4, 3])
def test_nvlink_exchange(world: int) -> None:
    """All ranks in turn, each with the addresses of all ranks' buffers: rows, sums and weights there and back."""
    tokens, hidden, top_k, local = 6, 40, 3, 2
    shapes = {"sent": (hidden, torch.float32), "returned": (hidden, torch.float32), "choices": (top_k, torch.int32)}
    shapes |= {"weights": (top_k, torch.float32), "weight_grads": (top_k, torch.float32)}
    poison = {torch.float32: torch.nan, torch.int32: -1}
    buffers = {
        name: [torch.full((world * tokens, width), poison[dtype], dtype=dtype) for _ in range(world)]
        for name, (width, dtype) in shapes.items()
    }
    tables = {name: torch.tensor([buffer.data_ptr() for buffer in all_]) for name, all_ in buffers.items()}
    x = [torch.randn(tokens, hidden) for _ in range(world)]
    index = [torch.rand(tokens, world * local + 1).argsort(1)[:, :top_k].int() for _ in range(world)]
    weights = [torch.rand(tokens, top_k) for _ in range(world)]
    here = [ids < world * local for ids in index]

    for rank in range(world):
        nvlink.push_choices(index[rank], weights[rank], tables["choices"], tables["weights"], rank)
        nvlink.push_tokens(x[rank], index[rank], tables["sent"], rank, local, programs=3)
    for rank in range(world):
        routing = route_sort(buffers["choices"][rank], local, 50, rank * local)
        sent, sent_weights = buffers["sent"][rank], buffers["weights"][rank]
        rows, row_weights = permute_rows(sent, sent_weights, routing.row_TK, 50)
        cases.poison(rows, row_weights, used=int(routing.offsets_E[-1]))
        rows = rows * row_weights[:, None]
        nvlink.push_sums(rows, row_weights, routing.row_TK, tables["returned"], tables["weight_grads"], rank, 5)
    for rank in range(world):
        out, out_weights = nvlink.sum_partials(
            buffers["returned"][rank], buffers["weight_grads"][rank], index[rank], local, world
        )
        expected = weights[rank] * here[rank]
        assert cases.relative_error(out, x[rank] * expected.sum(1, keepdim=True)) < 1e-6
        assert out_weights is not None
        assert torch.equal(out_weights, expected)
