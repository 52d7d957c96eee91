"""The plan held against what was measured, and the tables of docs/plan.md against both."""

from __future__ import annotations

import re
from math import isclose
from pathlib import Path

import pytest

from moetrain.plan import reality
from moetrain.plan.constants import GIB

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", [r for r in reality.ROWS if r.source != "a run of ours"], ids=lambda row: row.run)
def test_the_plan_is_near_reality(row: reality.Row) -> None:
    """And docs/plan.md says what it is now."""
    gib, ms = row.predict()
    shown = [float(cell) for line in table_lines(row.run) for cell in line.replace(",", "").split("|") if number(cell)]
    if row.measured_gib is not None:
        assert gib == pytest.approx(row.measured_gib, rel=reality.WITHIN)
        assert any(cell == pytest.approx(gib, abs=0.06) for cell in shown), "run moetrain.plan.reality"
    if row.taken_gib is not None:
        taken = row.memory().needed / GIB
        assert taken == pytest.approx(row.taken_gib, rel=reality.WITHIN)
        assert any(cell == pytest.approx(taken, abs=0.06) for cell in shown), "run moetrain.plan.reality"
    if row.measured_ms is not None:
        assert any(cell == pytest.approx(ms, rel=1e-3) for cell in shown), "run moetrain.plan.reality"
        if row.captured:
            assert ms == pytest.approx(row.measured_ms, rel=reality.TIME_WITHIN)


def number(cell: str) -> bool:
    return re.fullmatch(r"\s*[\d.]+\s*", cell) is not None


def test_the_parts_of_a_step_are_near_the_profile() -> None:
    row = next(row for row in reality.ROWS if row.step == reality.LEARNED)
    predicted = reality.predict_profile(row)
    for part, measured in reality.PROFILE.items():
        assert predicted[part] == pytest.approx(measured, rel=0.2), part
        assert any(f"| {predicted[part]:,.1f} |" in line for line in table_lines(part)), "run moetrain.plan.reality"


def test_every_row_and_every_measured_peak_is_in_the_table() -> None:
    assert all(table_lines(row.run) for row in reality.ROWS)
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    measured = re.findall(r'"peak_gib": ([\d.]+)', text) + re.findall(r"([\d.]+) GiB", text)
    for line in re.findall(r"(?:peak memory|taken from the GPU), GiB (.*)$", text, re.MULTILINE):
        measured += line.split()
    held = [gib for row in reality.ROWS for gib in (row.measured_gib, row.taken_gib) if gib is not None]
    held += [*reality.TAKEN_BY_OTHERS, *reality.TAKEN_LESS, *reality.NOT_PLANNED]
    missing = [peak for peak in measured if not any(isclose(float(peak), known, rel_tol=2e-3) for known in held)]
    assert measured and not missing, f"moetrain.plan.reality.ROWS lacks peaks of docs/measured.md: {missing}"


def table_lines(first: str) -> list[str]:
    """Lines of the tables whose first cell is this."""
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    lines = text.partition(reality.BEGIN)[2].partition(reality.END)[0].splitlines()
    return [line for line in lines if line.startswith(f"| {first} |")]


@pytest.mark.parametrize("name", sorted(reality.KEPT_MB))
def test_experts_keep_what_was_measured(name: str) -> None:
    assert reality.kept_by_experts(name) / 1e6 == pytest.approx(reality.KEPT_MB[name], abs=0.6)
