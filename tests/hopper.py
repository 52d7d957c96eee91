"""Kernels compiled for Hopper where there is no GPU: what the assembler says of them, and their machine code."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 << 10
"""Bytes that a program of an H100 can have."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_for_hopper(source: Any, options: dict[str, Any]) -> Any:
    return triton.compile(source, target=TARGET, options=options)


def machine_code(kernel: Any, folder: Path) -> list[str]:
    """Its instructions, a line each, of a kernel that fits a multiprocessor and keeps its sums in registers."""
    assert kernel.metadata.shared <= SHARED_MEMORY
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(kernel.asm["ptx"])
    told = _run(_TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", cubin).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in told and "serialized" not in told, told
    return _run(_TOOLS / "nvdisasm", cubin).stdout.splitlines()


def _run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result
