"""Passes with static capacities: equal to plain ones, exact after an overflow on any rank at any layer."""

from __future__ import annotations

import math

import pytest

from moetrain.graph import GROWTH, MARGIN, ROUND, STACK_MARGIN
from moetrain.moe.dispatch import static
from tests.dist.graph_cases import (
    capacities,
    differences,
    evaluation,
    full_stack,
    kept_without_backward,
    one_rank_waits,
    own_divisor,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize(("ranks", "checkpointing"), [(2, "none"), (2, "selective"), (2, "selective:1"), (4, "full")])
def test_overflow_is_run_again_exactly(ranks: int, checkpointing: str) -> None:
    """Two passes a step, changing weights, an overflow forced at each layer in turn, on the fullest rank."""
    for result in run_ranks(differences, ranks, checkpointing, [0, 1]):
        assert (
            sorted(result["runs"][4:8]) == sorted(result["runs"][8:]) == [1, 1, 1, 2] and result["runs"][:4] == [1] * 4
        )
        assert result["loss"] < 1e-5 and result["gradient"] < 2e-5
        assert result["graphs"] == 2, "first and accumulating pass"
        assert result["status"].startswith("captured")


def test_full_stack_is_run_again_exactly() -> None:
    """The fullest rank's rows decide, and the next buffer has more room."""
    for result in run_ranks(full_stack, 2):
        assert sorted(result["runs"][4:8]) == [1, 1, 1, 2] and sum(result["runs"]) == 13
        assert result["gradient"] < 2e-5
        most = result["sizes"][0][2]
        assert result["sizes"][3][1] == math.ceil(most * STACK_MARGIN / ROUND) * ROUND
        _, after, most = result["sizes"][result["runs"].index(2)]
        assert after == math.ceil(most * STACK_MARGIN * GROWTH / ROUND) * ROUND == result["sizes"][-1][1]
        assert result["left"] == [None, None]


def test_capacities_follow_the_fullest_rank() -> None:
    results = run_ranks(capacities, 2)
    fullest = [0] * len(results[0]["steps"][0][0])
    for step in range(4):
        needed = [max(rank) for rank in zip(*(result["steps"][step][0] for result in results), strict=True)]
        fullest = [max(pair) for pair in zip(fullest, needed, strict=True)]
        if step == 0:
            first = fullest
        expected = [math.ceil(rows * MARGIN / ROUND) * ROUND for rows in first]
        assert all(result["steps"][step][1] == expected for result in results)
    assert all(result["other_shape_left_the_graphs"] for result in results)


def test_evaluation_between_steps_loses_no_rows() -> None:
    """Nor does it make the next step overflow, or leave capacities to whoever has the model afterwards."""
    for result in run_ranks(evaluation, 2):
        assert result["loss"] == pytest.approx(result["wanted"], abs=1e-6)
        assert abs(result["cut"] - result["wanted"]) > 1e-5, "the batch does not tell"
        assert result["kept"] and result["runs"] == 1


def test_one_rank_that_waits_keeps_all_eager() -> None:
    """Ranks that differ would run a step again on some only. Its overflow in that very step is not lost."""
    results = run_ranks(one_rank_waits, 2, timeout=60.0)
    for result in results:
        assert result["runs"] == [1, 2, 1, 1]
        assert result["capacities"] == [None, None] and result["graphs"] == 0
    assert "logging.py:1" in results[0]["status"] and "another rank" in results[1]["status"]


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_a_forward_without_backward_is_freed(checkpointing: str) -> None:
    for kept in run_ranks(kept_without_backward, 2, checkpointing):
        assert not any(kept)


class _Keeps:
    def __init__(self, group: object) -> None:
        self.group = group


def test_a_later_group_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives the names of destroyed groups to new ones."""
    groups = [object(), object()]
    monkeypatch.setattr(static, "_exchanges", {})
    made = []
    for group in (groups[0], groups[0], groups[1]):
        monkeypatch.setattr(static, "resolve_group", lambda name, group=group: group)
        made.append(static._shared(_Keeps, "name"))
    assert made[0] is made[1] and made[0] is not made[2]
    assert made[2].group is groups[1]


def test_a_users_divisor_of_gradients_holds() -> None:
    for ratios in run_ranks(own_divisor, 2):
        assert ratios == pytest.approx([2.0] * 4)
