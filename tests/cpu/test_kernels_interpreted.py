"""The Triton kernels of the experts under Triton's interpreter."""

from __future__ import annotations

from tests.interpreted import run_interpreted_tests


def test_kernels_under_the_interpreter() -> None:
    run_interpreted_tests("tests/cpu/interpreted_kernels.py")
