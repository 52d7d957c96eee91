"""Passes with static capacities: equal to plain ones, exact after an overflow on any rank at any layer."""

from __future__ import annotations

import math

import pytest

from moetrain.graph import MARGIN, ROUND
from tests.dist.graph_cases import capacities, differences
from tests.ranks import run_ranks


@pytest.mark.parametrize(("ranks", "checkpointing"), [(2, "none"), (2, "selective"), (4, "full")])
def test_overflow_is_run_again_exactly(ranks: int, checkpointing: str) -> None:
    """Two passes a step, changing weights, an overflow forced at each layer in turn on rank 0 alone."""
    for result in run_ranks(differences, ranks, checkpointing, [0, 1]):
        assert (
            sorted(result["runs"][4:8]) == sorted(result["runs"][8:]) == [1, 1, 1, 2] and result["runs"][:4] == [1] * 4
        )
        assert result["loss"] < 1e-5 and result["gradient"] < 2e-5
        assert result["graphs"] == 2, "first and accumulating pass"
        assert result["status"].startswith("captured")


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
