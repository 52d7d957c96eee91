"""Attention in Triton under Triton's interpreter."""

from __future__ import annotations

from tests.interpreted import run_interpreted_tests


def test_attention_under_the_interpreter() -> None:
    run_interpreted_tests("tests/cpu/interpreted_attention.py")
