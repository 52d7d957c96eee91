"""The optimizer's kernels on a GPU: numbers, random bits, host syncs, memory, CUDA graphs.

Also clean under the checkers:
    compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_optim_gpu.py -k "test_updates or clipping"
    compute-sanitizer --tool racecheck python -m pytest tests/gpu/test_optim_gpu.py -k "test_updates or clipping"
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from moetrain.kernels import select_backend
from moetrain.kernels.tensor_list import sum_of_squares, sum_of_squares_ref
from moetrain.optim import AdamW, clip_factor, grad_norm
from moetrain.optim.reference import adamw_ref
from tests import optim_cases as cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = ((3, 40, 64), (7,), (16385,), (2, 3, 8192), (0, 8), (5, 1280))


@contextmanager
def no_syncs() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No case may pass by the plain path."""

    def refuse(*_: object) -> None:
        raise AssertionError("the kernel should take this")

    monkeypatch.setattr("moetrain.optim.adamw.adamw_ref", refuse)
    monkeypatch.setattr("moetrain.kernels.tensor_list.sum_of_squares_ref", refuse)


def test_the_kernel_is_chosen() -> None:
    assert select_backend("adamw", torch.device("cuda"), torch.bfloat16) == ("triton", {})


@pytest.mark.parametrize(
    ("states", "dtype"), [(states, cases.dtype_for(states)) for states in cases.STATES] + [("8bit", torch.float32)]
)
def test_updates(states: str, dtype: torch.dtype) -> None:
    cases.check_updates(states, dtype, "cuda")


def test_rounding_is_unbiased() -> None:
    cases.check_rounding_is_unbiased("cuda")


def test_random_bits() -> None:
    cases.check_random_bits("cuda")


@pytest.mark.parametrize("states", cases.STATES)
def test_resume(states: str) -> None:
    cases.check_resume(states, "cuda")


def test_clipping() -> None:
    cases.check_clipping("cuda")


def test_sum_of_squares() -> None:
    cases.check_sum_of_squares("cuda")


def test_sum_of_squares_of_large_tensors() -> None:
    tensors = [torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in (50_000_000, 3_000_001, 5)]
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    torch.testing.assert_close(sum_of_squares(tensors), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum_of_squares_ref(tensors), exact, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("states", ["fp32", "master"])
def test_many_updates_stay_with_the_plain_path(states: str) -> None:
    (parameters, optimizer), (others, expected) = (
        cases.build(states, cases.dtype_for(states), "cuda", SHAPES) for _ in range(2)
    )
    for seed in range(50):
        cases.set_grads(parameters, seed)
        cases.set_grads(others, seed)
        factor = torch.tensor(1.0 / (1 + seed), device="cuda")
        optimizer.step(grad_factor=factor)
        for group in expected.param_groups:
            slots = [expected._slot(p) for p in group["params"] if p.grad is not None]
            adamw_ref(slots, cases.LR, cases.BETAS, cases.EPS, group["weight_decay"], factor, None, seed)
    for p, q in zip(parameters, others, strict=True):
        mine, theirs = (state.get("master", x) for state, x in ((optimizer.state[p], p), (expected.state[q], q)))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("states", cases.STATES)
def test_no_host_sync_and_no_copies(states: str) -> None:
    """With gradients at new addresses too. 8 MB of parameters; the tables take some kB."""
    parameters, optimizer = cases.build(states, cases.dtype_for(states), "cuda", ((16, 512, 512), (3, 40, 64)))

    def step() -> None:
        optimizer.step(grad_factor=clip_factor(grad_norm(parameters), 1.0))

    kept = []
    for seed in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
            kept.append(p.grad)
        with no_syncs():
            step()  # the first compiles, and makes the codebooks
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with no_syncs():
            step()
        assert torch.cuda.max_memory_allocated() - before < 2**17, seed


def test_more_elements_than_32_bits_of_a_sign_count() -> None:
    """Offsets, chunks and random numbers beyond 2**31 elements: the last ones are updated, and as others are."""
    if torch.cuda.mem_get_info()[0] < 22e9:
        pytest.skip("needs 22 GB")
    numel = 2**31 + 3 * 16384 + 16
    p = nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    optimizer = AdamW([{"params": [p]}], 2**-9, (0.0, 0.0), 1e-20, "bf16_stochastic")
    p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    for tail in (p[-16:], p[2**31 - 16384 : 2**31], p[-49152:], p[:16384]):
        assert ((tail == 1) | (tail == 1 - 2**-8)).all()
    for part in (p[:49152], p[-49152:]):
        assert abs((part == 1).float().mean().item() - 0.5) < 5 * 0.5 / 49152**0.5
    assert not torch.equal(p[:49152], p[-49152:])


def replayed(states: str, fresh_grads: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters after four updates, of which three are a captured one's replays, and after four of the host's. Each
    has its gradients, rate and factor; `fresh_grads`: the gradients are at new addresses when it is captured."""
    results = []
    for capture in (True, False):
        parameters, optimizer = cases.build(states, cases.dtype_for(states), "cuda", SHAPES)
        rate, limit = torch.tensor(cases.LR, device="cuda"), torch.tensor(1.0, device="cuda")
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p in parameters:
            p.grad = torch.ones_like(p)

        def fill(seed: int, parameters: list = parameters, rate: Tensor = rate, limit: Tensor = limit) -> None:
            rate.fill_(cases.LR * (1 + seed))
            limit.fill_(1.0 + seed)
            for p in parameters:
                generator = torch.Generator("cuda").manual_seed(seed)
                p.grad.copy_(torch.randn(p.shape, generator=generator, device="cuda"))

        def step(parameters: list = parameters, optimizer: AdamW = optimizer, limit: Tensor = limit) -> None:
            optimizer.step(grad_factor=limit / (grad_norm(parameters) + 1e-6))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fill(0)
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if capture:
            if fresh_grads:
                for p in parameters:
                    p.grad = torch.ones_like(p)
            with torch.cuda.graph(graph):
                step()
        for seed in range(1, 4):
            fill(seed)
            if capture:
                graph.replay()
            else:
                step()
        results.append([p.detach().clone() for p in parameters])
    return results[0], results[1]


@pytest.mark.parametrize("states", cases.STATES)
def test_captured_step(states: str) -> None:
    mine, expected = replayed(states, fresh_grads=False)
    for a, b in zip(mine, expected, strict=True):
        assert torch.equal(a, b)


def test_captured_step_with_gradients_that_moved_before() -> None:
    """The tables are then sent by the graph itself."""
    mine, expected = replayed("bf16_stochastic", fresh_grads=True)
    for a, b in zip(mine, expected, strict=True):
        assert torch.equal(a, b)
