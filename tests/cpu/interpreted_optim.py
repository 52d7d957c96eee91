"""The optimizer's kernels under Triton's interpreter, on CPU tensors. `test_optim.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from moetrain.kernels import adamw as adamw_module
from moetrain.kernels import tensor_list
from moetrain.kernels.adamw import adamw, takes
from moetrain.kernels.tensor_list import vector_length
from moetrain.optim.reference import adamw_ref
from tests import optim_cases as cases
from tests.cpu.interpreted_kernels import interpreter_under_new_numpy

__all__ = ["interpreter_under_new_numpy"]


@pytest.fixture(autouse=True)
def kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No case may pass by the plain path."""

    def refuse(*_: object) -> None:
        raise AssertionError("the kernel should take this")

    monkeypatch.setattr("moetrain.optim.adamw.adamw_ref", refuse)
    monkeypatch.setattr(tensor_list, "sum_of_squares_ref", refuse)


@pytest.mark.parametrize(
    ("states", "dtype"),
    [(states, cases.dtype_for(states)) for states in cases.STATES] + [("8bit", torch.float32)],
)
def test_updates(states: str, dtype: torch.dtype) -> None:
    cases.check_updates(states, dtype, "cpu")


def test_rounding_is_unbiased() -> None:
    cases.check_rounding_is_unbiased("cpu")


def test_random_bits() -> None:
    cases.check_random_bits("cpu")


@pytest.mark.parametrize("states", ["bf16_stochastic", "8bit"])
def test_resume(states: str) -> None:
    cases.check_resume(states, "cpu", ((64, 96), (7,), (3000,), (5, 64)))


def test_clipping() -> None:
    cases.check_clipping("cpu")


def test_sum_of_squares() -> None:
    cases.check_sum_of_squares("cpu")


def test_beta_zero_and_first_steps_near_one() -> None:
    """1 - beta2 is 1e-6 here: in fp32 the correction of the first step would be 5 % off."""
    for betas in ((0.0, 0.999999), (0.999999, 0.0)):
        slots = [cases.bf16_slot(torch.full((3,), value)) for value in (0.25, 2.0)]
        slots = [slot._replace(parameter=torch.ones(3), master=None) for slot in slots]
        cases.update(slots, betas, lr=0.5, eps=1e-8)
        for slot in slots:
            torch.testing.assert_close(slot.parameter, torch.full((3,), 0.5), rtol=1e-2, atol=0)


def test_what_a_rate_on_the_device_does() -> None:
    (parameters, optimizer), (others, expected) = (cases.build("fp32", torch.float32, "cpu") for _ in range(2))
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(cases.LR)
    for each, which in ((parameters, optimizer), (others, expected)):
        cases.set_grads(each, 0)
        which.step()
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_launches_and_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches a group of one kind; tables are made again when, and only when, a tensor moved."""
    launched = []
    monkeypatch.setattr(tensor_list, "_TABLES", {})

    class Counted:
        def __init__(self, kernel: object) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launched.append(grid)
            return self.kernel[grid]

    for name in ("_advance", "_adamw"):
        monkeypatch.setattr(adamw_module, name, Counted(getattr(adamw_module, name)))
    parameters, optimizer = cases.build("master", torch.float32, "cpu", ((64, 64),) * 6)

    def step_and_count() -> int:
        launched.clear()
        optimizer.step()
        assert launched == [(1,), (3,)] * 2
        return len(tensor_list._TABLES)

    for p in parameters:
        p.grad = torch.ones_like(p)
    first = step_and_count()
    assert step_and_count() == first
    parameters[0].grad = parameters[0].grad.clone()
    assert step_and_count() == first + 1
    optimizer.state[parameters[1]]["exp_avg"] = optimizer.state[parameters[1]]["exp_avg"].clone()
    assert step_and_count() == first + 2


@torch.no_grad()
def test_kernel_agrees_with_the_plain_path() -> None:
    """From equal states, for what is not rounded: fp32 and a master."""
    for states in ("fp32", "master"):
        updated = []
        for how in ("kernel", "plain"):
            parameters, optimizer = cases.build(states, cases.dtype_for(states), "cpu")
            cases.set_grads(parameters, 2)
            slots = [optimizer._slot(p) for p in parameters]
            assert all(takes(slot) for slot in slots)
            settings = cases.BETAS, cases.EPS, cases.DECAY, torch.tensor(0.4), None
            if how == "kernel":
                adamw(slots, torch.tensor(cases.LR), *settings)
            else:
                adamw_ref(slots, cases.LR, *settings, 1)
            updated.append(slots)
        for mine, theirs in zip(*updated, strict=True):
            for a, b in zip(mine[:6], theirs[:6], strict=True):
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 2**-7, atol=1e-8)


def test_parameters_with_gaps_go_the_plain_way() -> None:
    slot = cases.bf16_slot(torch.zeros(8, 6))
    assert takes(slot)
    assert not takes(slot._replace(grad=torch.zeros(6, 8).t()))
    assert not takes(slot._replace(parameter=torch.zeros(6, 8).t()))
    assert not takes(slot._replace(exp_avg=torch.zeros(8, 7)[:, :6]))


def test_vector_length() -> None:
    assert vector_length(256 | 48 | 32, 4) == 4
    assert vector_length(256 | 48 | 32, 2) == 8
    assert vector_length(256 | 48 | 8, 2) == 1
