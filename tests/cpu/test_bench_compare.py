"""The systems that are compared: which there are, that they train the same model, cases that are refused."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from moetrain.bench import compare
from moetrain.bench.systems import Case, systems_of
from tests.cpu.test_bench_shapes import TINY


@pytest.mark.parametrize("name", TINY)
def test_both_systems_train_the_same_model(name: str) -> None:
    """The same weights, tokens and loss; nothing of it is worth a time here."""
    case = Case(name, seq_len=64, warmup=3, steps=1)
    native, ours = (compare.measure(system, case) for system in systems_of(case, 1, against=True))
    assert ours.loss == pytest.approx(native.loss, abs=3e-3)
    assert 5.5 < native.loss < 7.0  # ln 512 is 6.24
    assert ours.load_max_over_mean == pytest.approx(native.load_max_over_mean, abs=1.0)
    for result in (native, ours):
        assert result.tps_per_gpu == pytest.approx(64e3 / result.forward_backward_ms)
        with_optimizer = 64e3 / (result.forward_backward_ms + result.optimizer_ms)
        assert result.tps_per_gpu_with_optimizer == pytest.approx(with_optimizer)
        assert result.forward_ms + result.backward_ms == pytest.approx(result.forward_backward_ms)
        assert result.tflops_per_gpu == pytest.approx(result.tps_per_gpu * result.flop_per_token / 1e12)
        assert len(result.step_ms) == 1 and result.step_ms[0] == pytest.approx(result.forward_backward_ms)


@pytest.mark.parametrize(
    ("world", "ep_size", "against", "expected"),
    [
        (8, 8, False, ["moetrain"]),
        (1, 1, True, ["transformers", "moetrain"]),
        (8, 8, True, ["transformers fsdp2", "transformers ep", "moetrain"]),
        (8, 1, True, ["transformers fsdp2", "moetrain"]),
    ],
)
def test_systems_of(world: int, ep_size: int, against: bool, expected: list[str]) -> None:
    assert systems_of(Case("tiny", ep_size=ep_size), world, against) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ep_size": 3}, "ep_size=3 does not divide the 8 ranks"),
        ({"model": "tiny-gpt-oss", "ep_size": 16}, "ep_size=16 does not divide"),
        ({"dispatch": "carrier"}, "unknown dispatch 'carrier'; valid: auto, local, alltoall"),
        ({"warmup": 2}, "--warmup 2 is too short"),
        ({"layers": 9}, "tiny has 2 layers"),
    ],
)
def test_a_case_that_cannot_be_measured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compare.check_case(dataclasses.replace(Case("tiny"), **changes), 8)


def test_largest_ep_size() -> None:
    assert compare.largest_ep_size("qwen3-30b-a3b", 8) == 8
    assert compare.largest_ep_size("gpt-oss-20b", 24) == 8
    assert compare.largest_ep_size("tiny", 1) == 1
