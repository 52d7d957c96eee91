"""Checks of the kernels against their references, shared by the interpreter on CPU and the GPU tests.

Every check poisons with NaN what a kernel must not read, and compares with arithmetic in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from moetrain.kernels import activation as activation_module
from moetrain.kernels.activation import Activation, gated_activation_backward_ref, gated_activation_ref
from moetrain.kernels.bias import (
    add_row_bias_,
    add_row_bias_ref,
    expert_sum,
    expert_sum_ref,
    row_bias_backward,
    row_bias_backward_ref,
)
from moetrain.kernels.experts import expert_rows, experts_forward_ref
from moetrain.kernels.gated import gated_activation, gated_activation_backward
from moetrain.kernels.grouped import multiply_outer, multiply_outer_ref, multiply_rows, multiply_rows_ref
from moetrain.kernels.permutation import permute_ref, permute_rows, sum_rows, unpermute_reduce_ref
from moetrain.kernels.routing import route_sort, route_sort_ref
from moetrain.kernels.row_stack import Place, RowStack, rows_at
from moetrain.kernels.rows import ExpertWeights
from moetrain.kernels.top_k import top_k, top_k_ref

Layer = Callable[[list[torch.Tensor], torch.Tensor, ExpertWeights, Activation], torch.Tensor]
"""Forward of a layer: leaves [x, top_k_weights, parameters...], choices, the parameters, activation."""

ACTIVATIONS = {
    "silu": Activation("silu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "relu2": Activation("relu2", gated=False),
    "clamped": Activation("silu", limit=1.0),
    "gpt_oss": Activation("silu", interleaved=True, alpha=1.702, limit=1.0, up_shift=1.0),
}

ROUTINGS = ("random", "skewed", "sparse", "elsewhere", "none")


def choices(kind: str, tokens: int, top_k: int, experts: int, device: str) -> torch.Tensor:
    """Router choices [tokens, top_k]; ids outside [0, experts) are on other ranks."""
    if kind == "random":
        pool = torch.rand(tokens, max(experts, top_k)).argsort(1)[:, :top_k]
    elif kind == "skewed":  # every token to one expert first
        pool = torch.rand(tokens, max(experts, top_k)).argsort(1)[:, :top_k]
        pool[:, 0] = experts // 2
    elif kind == "sparse":  # most experts get nothing
        pool = torch.randint(0, 2, (tokens, top_k)) * (experts - 1)
    elif kind == "elsewhere":  # half of the experts are not here; -1 and `experts` both say so
        pool = torch.randint(-1, 2 * experts, (tokens, top_k))
    else:
        pool = torch.full((tokens, top_k), experts)
    return pool.to(device)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """|result - expected| / |expected|; NaN fails every comparison."""
    difference = (result.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()


def tolerance(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Tensors from `torch.empty` start as NaN, so that what a kernel did not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def poison(*tensors: torch.Tensor, used: int) -> None:
    for tensor in tensors:
        tensor[used:] = math.nan


def check_route_sort(
    kind: str, tokens: int, top_k: int, experts: int, capacity: int | None, device: str, first: int = 0
) -> None:
    index = choices(kind, tokens, top_k, experts, device) + first
    routing = route_sort(index, experts, capacity, first)
    expected = route_sort_ref(index, experts, tokens * top_k if capacity is None else capacity, first)
    for name, value, reference in zip(routing._fields, routing, expected, strict=True):
        assert value.dtype == torch.int32
        assert torch.equal(value, reference), name
    here = routing.row_TK.flatten() >= 0
    slots = torch.arange(index.numel(), device=device, dtype=torch.int32)[here]
    assert torch.equal(routing.slot_R[routing.row_TK.flatten()[here].long()], slots)
    for value, again in zip(routing, route_sort(index, experts, capacity, first), strict=True):
        assert torch.equal(value, again)


def check_permute(kind: str, tokens: int, top_k: int, hidden: int, dtype: torch.dtype, device: str) -> None:
    """Rows, sums and weights, with a capacity above the rows used and NaN in what is not used."""
    experts = 5
    routing = route_sort(choices(kind, tokens, top_k, experts, device), experts, tokens * top_k + 7)
    used = int(routing.offsets_E[-1])
    x = torch.randn(tokens, hidden, dtype=dtype, device=device)
    weights = torch.rand(tokens, top_k, device=device)
    rows, row_weights = permute_rows(x, weights, routing.row_TK, routing.slot_R.numel())
    rows_ref, row_weights_ref = permute_ref(x, weights, routing.row_TK, routing.slot_R.numel())
    assert torch.equal(rows[:used], rows_ref[:used])
    assert torch.equal(row_weights[:used], row_weights_ref[:used])

    y = torch.randn(routing.slot_R.numel(), hidden, dtype=dtype, device=device)
    y_weights = torch.rand(routing.slot_R.numel() + 1, device=device)[1:]
    expected, expected_weights = unpermute_reduce_ref(y.double(), y_weights, routing.row_TK)
    poison(y, y_weights, used=used)
    y_weights._base[0] = math.nan  # where the weight of row -1 would be
    out, out_weights = sum_rows(y, y_weights, routing.row_TK)
    assert out.dtype == dtype
    assert relative_error(out, expected) <= tolerance(dtype) / 2
    assert torch.equal(out_weights, expected_weights)
    assert torch.equal(out, sum_rows(y, y_weights, routing.row_TK)[0])


def check_activation(name: str, inner: int, rows: int, bias: bool, dtype: torch.dtype, device: str) -> None:
    """Forward and backward against float64, with empty experts, and NaN past the last row."""
    activation = ACTIVATIONS[name]
    width = 2 * inner if activation.gated else inner
    offsets = torch.tensor([0, rows // 3, rows // 3, rows], dtype=torch.int32, device=device)
    up = torch.randn(rows + 5, width, device=device).mul_(1.5).to(dtype)
    grad = torch.randn(rows + 5, inner, device=device).to(dtype)
    weights = torch.rand(rows + 5, device=device)
    biases = torch.randn(4, width, device=device).to(dtype) if bias else None
    wide = (up.double(), weights.double(), offsets, None if biases is None else biases.double(), activation)
    expected = gated_activation_ref(*wide)
    expected_gradients = gated_activation_backward_ref(grad.double(), *wide)
    poison(up, grad, weights, used=rows)

    with unwritten_is_nan():
        out = gated_activation(up, weights, offsets, biases, activation)
        gradients = gated_activation_backward(grad, up, weights, offsets, biases, activation)
    assert all(tensor[rows:].isnan().all() for tensor in (out, *gradients)), "wrote past the last row"
    assert relative_error(out[:rows], expected[:rows]) <= tolerance(dtype)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient[:rows], reference[:rows]) <= tolerance(dtype)
    assert torch.equal(gradients[2][:rows], out[:rows])
    again = gated_activation_backward(grad, up, weights, offsets, biases, activation)
    assert all(torch.equal(a[:rows], b[:rows]) for a, b in zip(gradients, again, strict=True))


def check_activation_reference(name: str) -> None:
    """The reference's backward is autograd's, in float64."""
    activation = ACTIVATIONS[name]
    offsets = torch.tensor([2, 2, 9])
    up = torch.randn(9, 24, dtype=torch.float64).mul_(1.5).requires_grad_()
    weights = torch.rand(9, dtype=torch.float64, requires_grad=True)
    out = gated_activation_ref(up, weights, offsets, None, activation)
    grad = torch.randn_like(out)
    expected = (*torch.autograd.grad(out, (up, weights), grad), out)
    gradients = gated_activation_backward_ref(grad, up.detach(), weights.detach(), offsets, None, activation)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient, reference) <= 1e-12


def check_biases(columns: int, dtype: torch.dtype, device: str) -> None:
    offsets = torch.tensor([3, 3, 40, 41], dtype=torch.int32, device=device)
    rows = torch.randn(50, columns, device=device).to(dtype)
    weights = torch.rand(50, device=device)
    bias = torch.randn(4, columns, device=device).to(dtype)
    expected = add_row_bias_ref(rows.double(), weights.double(), offsets, bias.double())
    expected_weights = row_bias_backward_ref(rows.double(), offsets, bias.double())
    expected_sums = [expert_sum_ref(rows.double(), w, offsets) for w in (weights.double(), None)]
    poison(rows, weights, used=41)

    assert relative_error(row_bias_backward(rows, offsets, bias)[:41], expected_weights[:41]) <= 1e-5
    for w, expected_sum in zip((weights, None), expected_sums, strict=True):
        assert relative_error(expert_sum(rows, w, offsets), expected_sum) <= tolerance(dtype)
    add_row_bias_(rows, weights, offsets, bias)
    assert relative_error(rows[:41], expected[:41]) <= tolerance(dtype)


def check_top_k(rows: int, experts: int, k: int, dtype: torch.dtype, device: str) -> None:
    """Exactly the reference, which is stable: with equal numbers, both zeros, infinities and NaN."""
    scores = (torch.randn(rows, experts, device=device) * 4).round().div(4).to(dtype)
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], device=device, dtype=dtype)
    where = torch.rand(rows, experts, device=device) < 0.1
    scores[where] = special[torch.randint(5, (int(where.sum()),), device=device)]
    for given in (scores, scores.t().contiguous().t(), scores.reshape(1, rows, experts)):
        values, indices = top_k(given, k)
        expected_values, expected = top_k_ref(given, k)
        assert values.shape == expected.shape == (*given.shape[:-1], k) and values.dtype == dtype
        assert torch.equal(indices, expected)
        torch.testing.assert_close(values, expected_values, rtol=0.0, atol=0.0, equal_nan=True)


GROUPS = {
    "few": [40, 64, 1, 0, 63],
    "more": [130, 160, 161, 0, 300],  # up to 32 rows more than a tile of 128 go with it
    "empty": [0, 0, 0, 0, 0],
    "one": [0, 0, 517, 0, 0],
    "tiles": [128, 256, 0, 128, 384],
}


def check_grouped(group: str, inner: int, width: int, dtype: torch.dtype, device: str) -> None:
    """Both products with weights in both layouts, more rows than are used, NaN in those; twice the same bits."""
    offsets = torch.tensor(GROUPS[group]).cumsum(0).to(torch.int32).to(device)
    used = int(offsets[-1])
    rows = torch.randn(used + 72, inner, device=device).to(dtype)
    grad = torch.randn(used + 72, width, device=device).to(dtype)
    weight = torch.randn(5, inner, width, device=device).to(dtype)
    expected = multiply_rows_ref(rows.double(), weight.double(), offsets)
    expected_outer = multiply_outer_ref(rows.double(), grad.double(), offsets)
    poison(rows, grad, used=used)

    for layout in (weight, weight.transpose(1, 2).contiguous().transpose(1, 2)):
        with unwritten_is_nan():
            out = multiply_rows(rows, layout, offsets)
        assert out[used:].isnan().all(), "wrote past the last row"
        assert relative_error(out[:used], expected[:used]) <= tolerance(dtype)
        assert torch.equal(out[:used], multiply_rows(rows, layout, offsets)[:used])
    outer = multiply_outer(rows, grad, offsets)
    assert relative_error(outer, expected_outer) <= tolerance(dtype)
    assert torch.equal(outer, multiply_outer(rows, grad, offsets))


def layer_case(
    name: str, routing: str, bias: bool, transposed: bool, dtype: torch.dtype, device: str
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, Callable[[list[torch.Tensor]], ExpertWeights]]:
    """Inputs of a small layer: leaves [x, top_k_weights, parameters...], choices, output gradient, and the function
    that makes `ExpertWeights` of the leaves."""
    tokens, top_k, experts, hidden, inner = (96 if device == "cuda" else 30), 2, 4, 64, 48
    activation = ACTIVATIONS[name]
    width = 2 * inner if activation.gated else inner
    shapes = [(hidden, width), (inner, hidden)] if transposed else [(width, hidden), (hidden, inner)]
    leaves = [torch.randn(tokens, hidden), torch.rand(tokens, top_k)]
    leaves += [torch.randn(experts, *shape) * 0.2 for shape in shapes]
    leaves += [torch.randn(experts, width), torch.randn(experts, hidden)] if bias else []
    leaves = [leaf.to(device, torch.float32 if i == 1 else dtype).requires_grad_() for i, leaf in enumerate(leaves)]

    def weights(tensors: list[torch.Tensor]) -> ExpertWeights:
        up, down, *biases = tensors[2:]
        up_bias, down_bias = biases or (None, None)
        return ExpertWeights(up, down, up_bias, down_bias, transposed)

    grad = torch.randn(tokens, hidden).to(device, dtype)
    return leaves, choices(routing, tokens, top_k, experts, device), grad, weights


def check_layer(
    name: str,
    routing: str,
    bias: bool,
    transposed: bool,
    dtype: torch.dtype,
    device: str,
    forward: Layer,
) -> None:
    """Output and every gradient of a layer against the loop over experts in float64; twice the same bits."""
    leaves, index, grad, weights = layer_case(name, routing, bias, transposed, dtype, device)
    activation = ACTIVATIONS[name]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = experts_forward_ref(
        wide[0], index, wide[1], weights(wide), lambda up: activation_module._apply(up, activation)
    )
    expected_gradients = torch.autograd.grad(expected, wide, grad.double(), materialize_grads=True)
    runs = []
    for _ in range(2):
        out = forward(leaves, index, weights(leaves), activation)
        runs.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    limit = 3e-2 if dtype == torch.bfloat16 else 1e-4
    if dtype == torch.bfloat16 and activation.limit < math.inf:
        limit = 1e-1  # rounding moves values across the clamp, where the gradient jumps
    for i, (value, reference) in enumerate(zip(runs[0], (expected, *expected_gradients), strict=True)):
        assert relative_error(value, reference) <= limit, f"output {i}"
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def check_row_stack(name: str, bias: bool, transposed: bool, dtype: torch.dtype, device: str) -> None:
    """Layers whose rows lie one after the other, all forwards before the first backward: the same bits as with memory
    of their own, in two passes. Nothing is written beyond the rows of a call."""
    stack, room = RowStack(torch.device(device)), 200
    layers = []
    for routing in ("random", "none", "skewed", "sparse"):
        leaves, index, _, weights = layer_case(name, routing, bias, transposed, dtype, device)
        grad = torch.randn(room, leaves[0].shape[1], device=device).to(dtype)
        layers.append((leaves, route_sort(index, 4, room), grad, weights(leaves)))
    counts = [int(routing.counts_E.sum()) for _, routing, _, _ in layers]

    def forward(layer: int, place: Place | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        (x, top_k_weights, *parameters), routing, _, weights = layers[layer]
        rows, row_weights = permute_rows(x.detach(), top_k_weights.detach(), routing.row_TK, room, place)
        inputs = [rows.requires_grad_(), row_weights.requires_grad_()]
        out = expert_rows(rows, routing.offsets_E, row_weights, weights, ACTIVATIONS[name], place)
        return out, [*inputs, *parameters]

    def backward(layer: int, out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        used, grad = counts[layer], layers[layer][2]
        poison(grad, used=used)
        rows, weights, *rest = torch.autograd.grad(out, inputs, grad)
        return [out.detach()[:used], rows[:used], weights[:used], *rest]

    expected = [backward(layer, *forward(layer, None)) for layer in range(len(layers))]
    up_columns = layers[0][3].up.shape[2 if transposed else 1]
    stack.begin()
    assert all(stack.push(routing.counts_E) is None for _, routing, _, _ in layers)
    assert int(stack.most) == sum(counts[:-1])
    stack.lay_out(int(stack.most), room)
    for _ in range(2):
        stack.begin()
        places = [stack.push(routing.counts_E) for _, routing, _, _ in layers]
        assert [int(place.at) for place in places if place is not None] == [sum(counts[:n]) for n in range(len(counts))]
        assert places[0] is not None
        for buffer, columns in (("rows", layers[0][0][0].shape[1]), ("up", up_columns)):
            places[0].rows(buffer, room, columns, dtype)
            stack._buffers[buffer].fill_(math.nan)
        done = [forward(layer, place) for layer, place in enumerate(places)]
        assert all(buffer[sum(counts) :].isnan().all() for buffer in stack._buffers.values())
        for layer in reversed(range(len(layers))):
            found = backward(layer, *done[layer])
            assert all(torch.equal(a, b) for a, b in zip(found, expected[layer], strict=True)), f"layer {layer}"
    assert set(stack._buffers) == {"rows", "up"}


def check_full_stack(device: str) -> None:
    """What does not fit is noted, and stays inside of the buffers."""
    stack = RowStack(torch.device(device))
    stack.lay_out(100, 64)
    counts = torch.tensor([20, 30], dtype=torch.int32, device=device)
    starts = []
    for _ in range(5):
        place = stack.push(counts)
        assert place is not None
        starts.append(int(place.at))
        rows_at(place.rows("rows", 64, 8, torch.float32), place.at).fill_(1.0)
    assert starts == [0, 50, 100, 100, 100]
    assert int(stack.most) == 200, "two calls were too high"
    assert stack._buffers["rows"].shape == (164, 8) and bool((stack._buffers["rows"] == 1.0).all())
