"""Attention in Triton under its interpreter, on CPU tensors. `test_attention_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from moetrain.kernels.attention_triton import document_bounds, document_bounds_ref
from tests.attention_cases import TRITON, check_attention, cumulative
from tests.interpreted import mend_interpreter


@pytest.fixture(autouse=True)
def interpreter_under_new_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    mend_interpreter(monkeypatch)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", TRITON)
def test_attention(name: str) -> None:
    check_attention(TRITON[name], "triton", torch.float32, "cpu", 2e-6)


def test_attention_of_sixteen_bits() -> None:
    check_attention(TRITON["all"], "triton", torch.float16, "cpu", 3e-3)  # the interpreter has no product of bfloat16


@pytest.mark.parametrize("lengths", [(9,), (1,) * 9, (4, 5), (3, 6, 0, 0), (0, 0, 2, 0, 1, 6), (1, 3, 5)])
def test_bounds_of_documents(lengths: tuple[int, ...]) -> None:
    rows = 2
    cu_seqlens = cumulative(lengths * rows, "cpu")
    found = document_bounds(cu_seqlens, rows, sum(lengths))
    torch.testing.assert_close(found, document_bounds_ref(cu_seqlens, rows, sum(lengths)))
    begins = [sum(lengths[:n]) for n, length in enumerate(lengths) for _ in range(length)]
    ends = [sum(lengths[: n + 1]) for n, length in enumerate(lengths) for _ in range(length)]
    assert found.tolist() == [[begins] * rows, [ends] * rows]
