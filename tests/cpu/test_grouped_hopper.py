"""The kernels that no interpreter runs: they compile for Hopper, here, and the tensor cores are fed without detours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="torch came without Triton")
hopper = pytest.importorskip("moetrain.kernels.grouped_hopper", exc_type=ImportError)

from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from moetrain.kernels._triton import INTERPRETED  # noqa: E402
from tests.hopper import compile_for_hopper, machine_code  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def tile(*shape: int) -> str:
    return f"tensordesc<bf16{list(shape)},{hopper.shared_layout(len(shape))}>"


def numbers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


ROWS = {"rows": tile(1, 1, 128, 64), "out": tile(1, 1, 64, 256), "offsets_E": "*i32", "counter": "*i32"}
ROWS |= numbers("experts", "width", "inner")
OUTER = {"left": tile(1, 1, 64, 64), "right": tile(1, 1, 64, 256), "out": tile(1, 64, 256), "offsets_E": "*i32"}
OUTER |= {"counter": "*i32", "scale": "fp32"} | numbers("tiles", "height", "width")


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> Any:
    names = kernel.arg_names
    assert set(signature) | set(constants) == set(names)
    types = {name: signature.get(name, "constexpr") for name in names}
    return compile_for_hopper(GluonASTSource(kernel, types, constants), hopper.OPTIONS)


@pytest.mark.parametrize("by_input", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_rows_by_weights(by_input: bool, shifted: bool, tmp_path: Path) -> None:
    at = {"at": "*i64", "out_at": "*i64"} if shifted else {}
    weight = {"weight": tile(1, 256, 64) if by_input else tile(1, 64, 256)}
    constants = {"BY_INPUT": by_input} | ({} if shifted else {"at": None, "out_at": None})
    check(compiled(hopper._rows_by_weights, ROWS | weight | at, constants), tmp_path)


@pytest.mark.parametrize("shifted", [True, False])
def test_outer_by_experts(shifted: bool, tmp_path: Path) -> None:
    at = {"left_at": "*i64", "right_at": "*i64"} if shifted else {}
    constants = {} if shifted else {"left_at": None, "right_at": None}
    check(compiled(hopper._outer_by_experts, OUTER | at, constants), tmp_path)


def check(kernel: Any, folder: Path) -> None:
    """It computes the places of operands once a warp: a product that waited for them between its four parts took 5 to
    10 % longer."""
    lines = machine_code(kernel, folder)
    products = [number for number, line in enumerate(lines) if "HGMMA" in line]
    assert len(products) == 2 * 4, "of two groups of warps, four steps of 16 each"
    for group in (products[:4], products[4:]):
        between = "\n".join(lines[group[0] : group[-1]])
        assert not re.search(r"\bR2UR\b", between), between
