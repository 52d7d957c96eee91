"""The Mamba-2 kernels on a GPU: numbers, host syncs, CUDA graphs, compilation.

Also clean under the checkers, each with shapes small enough to be quick:
    compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_mamba_gpu.py -k small
    compute-sanitizer --tool racecheck python -m pytest tests/gpu/test_mamba_gpu.py -k small
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from moetrain.backends import mamba
from moetrain.kernels.mamba2 import causal_conv, chunk_scan, gated_norm
from tests import mamba_cases as cases
from tests.families import build
from tests.kernel_cases import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.bfloat16, torch.float32]
INF = float("inf")
LARGE = {
    "nano": (1, 1111, 64, 64, 8, 128),
    "ultra, two ranks of heads": (2, 300, 32, 64, 1, 128),
    "wide": (1, 200, 6, 128, 1, 256),
}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.set_sync_debug_mode("default")


@contextmanager
def full_precision() -> Iterator[None]:
    """Transformers' convolution in fp32, which cuDNN would run in TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "channels", "taps", "bias", "packed"),
    [(1000, 6144, 4, True, True), (61, 130, 3, False, True), (1, 128, 2, True, False)],
)
def test_convolution(tokens: int, channels: int, taps: int, bias: bool, packed: bool, dtype: torch.dtype) -> None:
    cases.check_conv(2, tokens, channels, taps, bias, packed, dtype, "cuda")


@pytest.mark.parametrize("packed", [False, True])
def test_small_convolution(packed: bool) -> None:
    cases.check_conv(2, 70, 40, 4, True, packed, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "width"), [(8, 512), (1, 5120), (3, 20)])
def test_norm(groups: int, width: int, dtype: torch.dtype) -> None:
    cases.check_norm(2, 333, groups, width, dtype, "cuda")


def test_small_norm() -> None:
    cases.check_norm(1, 37, 2, 48, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("packed", "limit"), [(False, (0.05, 1.0)), (True, (0.0, INF))])
@pytest.mark.parametrize("name", LARGE)
def test_scan(name: str, packed: bool, limit: tuple[float, float], dtype: torch.dtype) -> None:
    cases.check_scan(LARGE[name], packed, limit, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", cases.SCANS)
def test_small_scan(name: str, packed: bool, dtype: torch.dtype) -> None:
    cases.check_scan(cases.SCANS[name], packed, (0.0, INF), dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_that_forget_at_once(dtype: torch.dtype) -> None:
    cases.check_quick_heads(dtype, "cuda")


@pytest.mark.parametrize("model_type", cases.MIXERS)
def test_mixer_is_transformers(model_type: str) -> None:
    slow = cases.build_mixer(model_type, "cuda", torch.float32)
    fast = cases.install(copy.deepcopy(slow))
    x, grad = torch.randn(2, 2, 333, 32, device="cuda").unbind()
    with full_precision():
        cases.check_same(cases.mixer_step(fast, x, grad), cases.mixer_step(slow, x, grad), 1e-4)


@pytest.mark.parametrize("model_type", ["nemotron_h", "falcon_h1"])
def test_bf16_mixer_is_as_near_to_fp32_as_transformers(model_type: str) -> None:
    exact = cases.build_mixer(model_type, "cuda", torch.bfloat16).float()
    slow = copy.deepcopy(exact).bfloat16()
    fast = cases.install(copy.deepcopy(slow))
    x, grad = torch.randn(2, 2, 500, 32, device="cuda").bfloat16().unbind()
    with full_precision():
        expected = cases.mixer_step(exact, x.float(), grad.float())
    found, theirs = cases.mixer_step(fast, x, grad), cases.mixer_step(slow, x, grad)
    for name, wanted in expected.items():
        limit = 2 * relative_error(theirs[name], wanted) + 3e-3  # its products are in fp32, ours in bf16
        assert relative_error(found[name], wanted) < limit, name


@pytest.mark.parametrize("family", ["nemotron_h", "granitemoehybrid"])
def test_whole_model_is_transformers(family: str) -> None:
    model = build(family).cuda()
    batch = {name: torch.randint(3, 100, (2, 150), device="cuda") for name in ("input_ids", "labels")}

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}

    with full_precision():
        expected = step()
        assert mamba.use_mamba_kernels(model) is None
        cases.check_same(step(), expected, 1e-3)


def nano_step(dtype: torch.dtype = torch.bfloat16) -> tuple[Callable[[], list[torch.Tensor]], list[torch.Tensor]]:
    """Forward and backward of the three parts in a row, and what they read."""
    (x, dt, A, B, C, D, dt_bias), grad = cases.scan_case((2, 300, 16, 64, 2, 128), dtype, "cuda")
    wide = torch.cat([tensor.flatten(2) for tensor in (x, B, C)], -1)
    weight, bias = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((wide.shape[2], 4), wide.shape[2:]))
    gate, scale = torch.randn(2, 300, 1024, device="cuda").to(dtype), torch.randn(1024, device="cuda").to(dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in (wide, dt, A, D, dt_bias, weight, bias, gate, scale)]
    seq_idx = cases.documents(2, 300, "cuda")

    def step() -> list[torch.Tensor]:
        wide, dt, A, D, dt_bias, weight, bias, gate, scale = leaves
        x, B, C = causal_conv(wide, weight, bias, seq_idx).split([1024, 256, 256], -1)
        x, B, C = x.unflatten(-1, (16, 64)), B.unflatten(-1, (2, 128)), C.unflatten(-1, (2, 128))
        y = chunk_scan(x, dt, A, B, C, D, dt_bias, (0.0, INF), seq_idx)
        out = gated_norm(y.flatten(2), gate, scale, 2, 1e-5)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.flatten(2))]

    return step, [*leaves, seq_idx]


def test_same_bits_every_time() -> None:
    step, _ = nano_step()
    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


def test_graph_follows_new_documents() -> None:
    """Nothing waits for the device, and a captured step, replayed on other tokens and documents, is the eager one."""
    step, inputs = nano_step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):
        with torch.no_grad():
            inputs[0].normal_()
            inputs[-1].copy_(cases.documents(2, 300, "cuda"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_compiles_without_a_break() -> None:
    mixer = cases.install(cases.build_mixer("nemotron_h", "cuda", torch.float32))
    x, grad = torch.randn(2, 1, 200, 32, device="cuda").unbind()
    compiled = torch.compile(cases.as_model(mixer), fullgraph=True)
    with full_precision():
        expected = cases.mixer_step(mixer, x, grad)
        cases.check_same(cases.mixer_step(mixer, x, grad, forward=compiled), expected, 1e-4)
