"""Attention in Triton compiles for Hopper, here, to the products of its tensor cores and without spilled registers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="torch came without Triton")

from triton.compiler import ASTSource

from moetrain.kernels import attention_triton as kernels
from moetrain.kernels._triton import INTERPRETED
from tests.hopper import compile_for_hopper, machine_code

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
KERNELS = {
    "forward": (kernels._forward_kernel, kernels._FORWARD),
    "query gradient": (kernels._query_gradient_kernel, kernels._QUERY_GRADIENT),
    "key gradient": (kernels._key_gradient_kernel, kernels._KEY_GRADIENT),
}
TYPES = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "dk_ptr": "*fp32", "dv_ptr": "*fp32", "bounds_ptr": "*i32"}
TYPES |= {"scale": "fp32", "window": "i32"}


@pytest.mark.parametrize("absent", [("window", "sinks_ptr"), ("bounds_ptr",)], ids=["documents", "window"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles(name: str, size: int, absent: tuple[str, ...], tmp_path: Path) -> None:
    kernel, options = KERNELS[name]
    constants: dict[str, Any] = kernels._constants(size, size)
    constants |= {key: value for key, value in options.items() if key.startswith("BLOCK")}
    constants |= {argument: None for argument in absent if argument in kernel.arg_names}
    types = {
        argument: "constexpr"
        if argument in constants
        else TYPES.get(argument, "*bf16" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    whole = [argument for argument, of in types.items() if of[0] == "*" or "stride" in argument or argument == "length"]
    aligned = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in whole}
    settings = {key: value for key, value in options.items() if key.startswith("num")}
    code = machine_code(compile_for_hopper(ASTSource(kernel, types, constants, aligned), settings), tmp_path)
    assert any("HGMMA" in line for line in code), "products by the tensor cores of Hopper"
    assert any("LDGSTS" in line for line in code), "tiles that are copied while others are multiplied"
