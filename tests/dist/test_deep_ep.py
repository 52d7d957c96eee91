"""The dispatcher `deep_ep` on a fake of both interfaces, against the other dispatchers."""

from __future__ import annotations

import pytest

from tests.dist import deep_ep_cases
from tests.dist.test_dispatch import CASES
from tests.ranks import run_ranks

INTERFACES = ("ElasticBuffer", "Buffer")
LAYOUTS = [
    ("ElasticBuffer", 2, None),
    ("ElasticBuffer", 4, None),
    ("Buffer", 2, None),
    ("Buffer", 4, None),
    ("Buffer", 4, 2),
]
"""Interface, ranks, and ranks of a node: of 4 ranks, two on each of two nodes."""


@pytest.mark.parametrize(("interface", "ranks", "node"), LAYOUTS)
def test_ragged_ranks_equal_the_reference(interface: str, ranks: int, node: int | None) -> None:
    """Any number of tokens on each rank, none included, and the host waits for the number of rows."""
    for differences in run_ranks(deep_ep_cases.exact, ranks, interface, node, CASES):
        assert len(differences) == len(CASES)
        assert not {case: value for case, value in differences.items() if not value < 1e-12}


@pytest.mark.parametrize(("interface", "ranks", "node"), LAYOUTS[1:])
def test_capacities_equal_alltoall(interface: str, ranks: int, node: int | None) -> None:
    """Static shapes: the host never waits, nothing unwritten is read, recomputation sends nothing."""
    results = run_ranks(deep_ep_cases.passes, ranks, interface, node)
    dispatch = ["dispatch without waiting"] if interface == "ElasticBuffer" else ["layout", "dispatch without waiting"]
    for result in results:
        assert result["waited"].keys() == {"collective_wait"} and result["waited"]["collective_wait"] > 0
        for (kind, dtype), difference in result["differences"].items():
            assert difference < (1e-12 if dtype == "torch.float64" else 0.02), (kind, dtype, difference)
        assert result["calls"] == result["calls_recomputed"] == [*dispatch, "combine", "dispatch again", "combine"]
        assert result["freed"] and set(result["freed"]) == {"destroy"} and result["links"] == 0
    needed, used, rows = zip(*(result["cut"] for result in results), strict=True)
    others = [0] * (ranks - 1)  # the first rank gets all rows
    assert needed == (ranks * 9 * 2, *others) and used == (3, *others) and set(rows) == {3}


@pytest.mark.parametrize(("interface", "checkpointing"), [("ElasticBuffer", "selective"), ("Buffer", "none")])
def test_model_is_captured_as_with_other_static_dispatchers(interface: str, checkpointing: str) -> None:
    """A whole model's steps at capacities, one of them too small, beside `alltoall`."""
    for result in run_ranks(deep_ep_cases.captured, 2, interface, checkpointing, [1]):
        assert sorted(result["runs"][4:]) == [1, 1, 1, 2] and result["runs"][:4] == [1] * 4
        assert result["loss"] < 1e-5 and result["gradient"] < 2e-5
        assert result["status"].startswith("captured")
