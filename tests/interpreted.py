"""Kernels under Triton's interpreter, in a process of their own: it must be on before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run_interpreted(*arguments: str) -> None:
    """Run Python with these arguments; its output is in the error if it fails."""
    pytest.importorskip("triton", reason="Triton is not installed")
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def run_interpreted_tests(file: str) -> None:
    """All tests of a file."""
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", file)


def mend_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy 2.4 no longer turns an array of one element into an int, which Triton 3.6 does for loop bounds."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
