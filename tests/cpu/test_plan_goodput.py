"""Stops, checkpoints and the share of time that is kept."""

from __future__ import annotations

import pytest

from moetrain.plan.goodput import best_interval, goodput_of, share_kept
from moetrain.plan.layout import Layout
from tests.plan_helpers import two_units


@pytest.mark.parametrize(("write", "hours"), [(60, 400), (600, 50), (900, 3)])
def test_the_interval_is_the_best(write: float, hours: float) -> None:
    mean_time, restart = hours * 3600, 300.0
    best = best_interval(write, mean_time)
    most = max(share_kept(best * factor / 100, write, restart, mean_time) for factor in range(20, 400))
    assert share_kept(best, write, restart, mean_time) == pytest.approx(most, abs=1e-4)
    assert 0 < most < 1


def test_llama_3_would_have_stopped_as_often() -> None:
    goodput = goodput_of(two_units(), Layout(2048, 8), storage_gb_s=1.0, restart_seconds=300)
    assert goodput.stops_per_week * 54 / 7 == pytest.approx(419)
    assert (goodput.checkpoint_bytes, goodput.export_bytes) == (880 + 1760, 880)
    assert goodput.write_seconds == pytest.approx(2640 / 2048e9)
