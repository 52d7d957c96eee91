"""Dispatch and combine, forward and backward, against a plain reference with every expert in one process."""

from __future__ import annotations

import pytest
import torch

from moetrain.moe.dispatch import build_dispatcher
from tests.dist.dispatch_cases import dispatch_differences
from tests.ranks import run_ranks

KINDS = ("uniform", "skewed", "last_rank", "holes", "empty_rank")
CASES = [
    (kind, tokens, top_k, experts) for kind in KINDS for tokens, top_k, experts in ((7, 2, 8), (1, 1, 4), (33, 4, 8))
]


@pytest.mark.parametrize(("name", "ranks"), [("local", 1), ("alltoall", 2), ("alltoall", 4), ("allgather", 2), ("allgather", 4)])
def test_dispatch_equals_reference(name: str, ranks: int) -> None:
    cases = CASES if name in ("local", "alltoall") else [case for case in CASES if case[0] != "empty_rank"]
    for differences in run_ranks(dispatch_differences, ranks, name, cases):
        bad = {case: value for case, value in differences.items() if not value < 1e-12}
        assert not bad


def test_unknown_dispatcher_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="local, alltoall"):
        build_dispatcher("nvlnk", 8, None)


def test_alltoall_in_one_process_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="local"):
        build_dispatcher("alltoall", 8, None)


def test_local_dispatch_does_not_sync() -> None:
    """Shapes do not depend on the routing: the whole round trip runs on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        dispatcher = build_dispatcher("local", 8, None)
        dispatched = dispatcher.dispatch(torch.empty(5, 4), torch.zeros(5, 2, dtype=torch.int64), torch.empty(5, 2))
        assert dispatcher.combine(dispatched.rows_RH, dispatched).shape == (5, 4)
