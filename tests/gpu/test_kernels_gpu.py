"""The Triton kernels on a GPU: numbers, host syncs, CUDA graphs, compilation.

Also clean under the checkers, each with shapes small enough to be quick:
    compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_kernels_gpu.py -k small
    compute-sanitizer --tool racecheck python -m pytest tests/gpu/test_kernels_gpu.py -k small
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moetrain.kernels import grouped
from moetrain.kernels.activation import Activation
from moetrain.kernels.experts import expert_rows, experts_forward
from moetrain.kernels.permutation import permute, unpermute_reduce
from moetrain.kernels.routing import route_sort
from moetrain.kernels.rows import ExpertWeights
from tests import kernel_cases as cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_sm90 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="torch._grouped_mm is only sync-free on compute capability 9.0",
)
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_syncs() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def tokens_layer(
    leaves: list[torch.Tensor], index: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> torch.Tensor:
    return experts_forward(leaves[0], index, leaves[1], weights, activation)


def rows_layer(
    leaves: list[torch.Tensor], index: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> torch.Tensor:
    """The same layer by the entrance for dispatched rows, with NaN in the unused rows."""
    routing = route_sort(index, weights.up.shape[0], index.numel() + 40)
    rows, row_weights = permute(leaves[0], leaves[1], routing)
    used = (routing.slot_R >= 0)[:, None]
    rows = torch.where(used, rows, torch.nan)
    return unpermute_reduce(expert_rows(rows, routing.offsets_E, row_weights, weights, activation), routing)


@pytest.mark.parametrize("kind", cases.ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "capacity"), [(4096, 8, 128, None), (1000, 6, 512, 3000), (1, 1, 1, 4)]
)
def test_route_sort(kind: str, tokens: int, top_k: int, experts: int, capacity: int | None) -> None:
    cases.check_route_sort(kind, tokens, top_k, experts, capacity, "cuda", first=experts)


@pytest.mark.parametrize("kind", cases.ROUTINGS)
def test_small_route_sort(kind: str) -> None:
    cases.check_route_sort(kind, 150, 3, 20, 300, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "tokens", "top_k", "hidden"),
    [("random", 4096, 8, 2048), ("skewed", 513, 6, 2688), ("elsewhere", 4096, 1, 2880), ("none", 16, 2, 64)],
)
def test_permute(kind: str, tokens: int, top_k: int, hidden: int, dtype: torch.dtype) -> None:
    cases.check_permute(kind, tokens, top_k, hidden, dtype, "cuda")


@pytest.mark.parametrize(("kind", "top_k", "hidden"), [("elsewhere", 3, 40), ("skewed", 1, 2060)])
def test_small_permute(kind: str, top_k: int, hidden: int) -> None:
    cases.check_permute(kind, 33, top_k, hidden, torch.bfloat16, "cuda")


@pytest.mark.parametrize("name", cases.ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "bias", "inner"), [(torch.bfloat16, True, 768), (torch.float32, False, 1856)])
def test_activation(name: str, dtype: torch.dtype, bias: bool, inner: int) -> None:
    cases.check_activation(name, inner, 3001, bias, dtype, "cuda")


@pytest.mark.parametrize("name", ["silu", "gpt_oss", "relu2"])
def test_small_activation(name: str) -> None:
    cases.check_activation(name, 72, 33, True, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [72, 2880])
def test_small_biases(columns: int, dtype: torch.dtype) -> None:
    cases.check_biases(columns, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "experts", "k"), [(4096, 128, 8), (1, 32, 4), (333, 512, 22), (70, 1000, 32)])
def test_top_k(rows: int, experts: int, k: int, dtype: torch.dtype) -> None:
    _poison_free_memory()
    cases.check_top_k(rows, experts, k, dtype, "cuda")


@pytest.fixture(params=["hopper", "triton"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever kernels would be chosen for so few rows: these."""
    monkeypatch.setattr(grouped, "ENOUGH_ROWS", 0 if request.param == "hopper" else 2**40)


@pytest.mark.usefixtures("products")
@needs_sm90
@pytest.mark.parametrize("group", cases.GROUPS)
@pytest.mark.parametrize(("inner", "width"), [(2048, 1536), (2880, 2880), (200, 72)])
def test_grouped(group: str, inner: int, width: int) -> None:
    _poison_free_memory()
    cases.check_grouped(group, inner, width, torch.bfloat16, "cuda")


@pytest.mark.usefixtures("products")
@needs_sm90
def test_small_grouped() -> None:
    cases.check_grouped("more", 72, 136, torch.bfloat16, "cuda")


@pytest.mark.usefixtures("products")
@needs_sm90
@pytest.mark.parametrize("layer", [tokens_layer, rows_layer])
@pytest.mark.parametrize("kind", cases.ROUTINGS)
@pytest.mark.parametrize(
    ("name", "bias", "transposed"),
    [("silu", False, False), ("gpt_oss", True, True), ("relu2", False, False), ("clamped", True, False)],
)
def test_layer(name: str, kind: str, bias: bool, transposed: bool, layer: cases.Layer) -> None:
    _poison_free_memory()
    cases.check_layer(name, kind, bias, transposed, torch.bfloat16, "cuda", layer)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    ("name", "bias", "transposed"),
    [("silu", False, False), ("gpt_oss", True, True), ("relu2", False, True)],
)
@needs_sm90
def test_small_row_stack(name: str, bias: bool, transposed: bool) -> None:
    _poison_free_memory()
    cases.check_row_stack(name, bias, transposed, torch.bfloat16, "cuda")
    cases.check_full_stack("cuda")


@pytest.mark.usefixtures("products")
@needs_sm90
def test_small_layer() -> None:
    cases.check_layer("gpt_oss", "sparse", True, True, torch.bfloat16, "cuda", tokens_layer)


def _poison_free_memory() -> None:
    """Fill what the allocator hands out next with NaN, so that an element nobody wrote shows."""
    for numel in (2**25, 2**19, 2**17, 2**15, 2**13, 2**10):
        blocks = [torch.full((numel,), torch.nan, device="cuda") for _ in range(8)]
        del blocks


@pytest.mark.usefixtures("products")
@needs_sm90
@pytest.mark.parametrize("name", ["silu", "gpt_oss"])
def test_no_host_sync(name: str, no_syncs: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    leaves, index, grad, weights = cases.layer_case(
        name, "random", name == "gpt_oss", name == "gpt_oss", torch.bfloat16, "cuda"
    )
    torch.autograd.grad(tokens_layer(leaves, index, weights(leaves), cases.ACTIVATIONS[name]), leaves, grad)
    torch.cuda.set_sync_debug_mode("error")
    for layer in (tokens_layer, rows_layer):
        torch.autograd.grad(layer(leaves, index, weights(leaves), cases.ACTIVATIONS[name]), leaves, grad)


@pytest.mark.usefixtures("products")
@needs_sm90
def test_graph_follows_new_choices() -> None:
    """A captured forward and backward, replayed with other routing, gives what the eager run gives."""
    leaves, index, grad, weights = cases.layer_case("silu", "random", False, False, torch.bfloat16, "cuda")
    activation = cases.ACTIVATIONS["silu"]

    def step() -> tuple[torch.Tensor, ...]:
        out = tokens_layer(leaves, index, weights(leaves), activation)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for kind in ("skewed", "elsewhere", "none"):
        index.copy_(cases.choices(kind, index.shape[0], index.shape[1], 4, "cuda"))
        graph.replay()
        for value, expected in zip(captured, step(), strict=True):
            assert torch.equal(value, expected)


@needs_sm90
def test_compiles_without_a_break() -> None:
    leaves, index, grad, weights = cases.layer_case("silu", "random", False, False, torch.bfloat16, "cuda")
    compiled = torch.compile(tokens_layer, fullgraph=True)
    results = []
    for layer in (tokens_layer, compiled):
        out = layer(leaves, index, weights(leaves), cases.ACTIVATIONS["silu"])
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
