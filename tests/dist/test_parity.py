"""The parity matrix: every family of Transformers with decorated experts, sharded, against plain eager Transformers.

fp32, tiny random models: loss, logits, every gradient, the gradient norm, clipped gradients, and load -> save.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from moetrain.families import UNSUPPORTED
from tests.families import FAMILIES
from tests.parity import Parity, parity_of_families
from tests.ranks import RankKilled, run_ranks

TOLERANCE = 1e-5
SUPPORTED = [name for name in FAMILIES if name not in UNSUPPORTED]
SOME: list[str] = ["qwen3_moe", "gpt_oss", "nemotron_h+latent", "deepseek_v3", "mixtral"]
LAYOUTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ep2": ({"fsdp_size": 2, "ep_size": 2}, SUPPORTED),
    "ep2_efsdp2": ({"fsdp_size": 4, "ep_size": 2}, SUPPORTED),
    "ep4": ({"fsdp_size": 4, "ep_size": 4}, SOME),
    "ep2_replicas2": ({"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}, SOME),
    "fsdp2": ({"fsdp_size": 2}, SOME),
    "ep2_allgather": ({"fsdp_size": 2, "ep_size": 2, "ep_implementation": "moetrain_allgather"}, SOME),
    "ep2_efsdp2_allgather": ({"fsdp_size": 4, "ep_size": 2, "ep_implementation": "moetrain_allgather"}, SOME),
    "ep4_efsdp2": ({"fsdp_size": 8, "ep_size": 4}, SOME),
}


def world_of(layout: dict[str, Any]) -> int:
    """Ranks of a layout."""
    return int(layout["fsdp_size"]) * int(layout.get("dp_replicate_size", 1))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Parity]]:
    """All families of a layout in one group of processes, run when the first of them is asked for."""
    done: dict[str, dict[str, Parity]] = {}

    def run(name: str) -> dict[str, Parity]:
        if name not in done:
            layout, families = LAYOUTS[name]
            ask = partial(run_ranks, parity_of_families, world_of(layout), families, layout, timeout=1500)
            try:
                done[name] = ask(str(tmp_path_factory.mktemp(name)))[0]
            except RankKilled as error:  # of some thousand groups gloo's thread died once in malloc; ours would again
                warnings.warn(f"{name} is run again: {error}", stacklevel=1)
                done[name] = ask(str(tmp_path_factory.mktemp(name)))[0]
        return done[name]

    return run


CASES = [
    pytest.param(name, family, id=f"{name}-{family}", marks=[pytest.mark.slow] if world_of(layout) > 4 else [])
    for name, (layout, families) in LAYOUTS.items()
    for family in families
]


@pytest.mark.timeout(1500)  # the first of a layout runs all its families
@pytest.mark.parametrize(("layout", "family"), CASES)
def test_parity(matrix: Callable[[str], dict[str, Parity]], layout: str, family: str) -> None:
    result = matrix(layout)[family]
    assert result.error is None, result.error
    assert result.loss < TOLERANCE
    assert result.logits < TOLERANCE
    assert not result.missing_gradients
    assert result.gradients < TOLERANCE, result.worst_gradient
    assert result.norm < TOLERANCE
    assert result.same_keys
    assert result.same_weights
