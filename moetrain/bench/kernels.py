"""Time, rate and share of the hardware's limit of each kernel of the expert layer, at the shapes of real models.

Each part is captured in a CUDA graph and replayed, so that the host's launch time is left out; the layer is timed
eager as well. The limits are measured in the same run: a device copy and a large matrix product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moetrain.bench.rows import Row
from moetrain.bench.shapes import LayerShape, experts_module, layer_shape
from moetrain.kernels.activation import Activation, recognise_activation
from moetrain.kernels.bias import add_row_bias_, expert_sum, row_bias_backward
from moetrain.kernels.experts import experts_forward
from moetrain.kernels.gated import gated_activation, gated_activation_backward
from moetrain.kernels.grouped import multiply_outer, multiply_rows
from moetrain.kernels.permutation import permute_rows, sum_rows
from moetrain.kernels.routing import route_sort
from moetrain.kernels.rows import ExpertWeights, expert_weights

SHAPES = ("qwen3-30b-a3b", "qwen3-30b-a3b-ep8", "gpt-oss-20b", "nemotron-3-nano-30b-a3b")
"""Measured unless others are named; `-ep8`: the rows and experts of a rank when 8 ranks share the model's experts."""


def bench_kernels(names: Sequence[str] = SHAPES, tokens: int = 4096, against_transformers: bool = False) -> list[Row]:
    """Measure every part and the whole layer on the current CUDA device.

    Args:
        names: of models, `-epN` behind them for one of N ranks' share.
        tokens: of a rank.

    Raises:
        ValueError: an unknown model, or no GPU.
    """
    shapes = {name: layer_shape(name, tokens) for name in names}
    if not torch.cuda.is_available():
        raise ValueError("the kernels are timed on a GPU, and torch sees none; `moetrain doctor` says why")
    limits = _measure_limits()
    rows = [Row("limit", part, *values, 1.0) for part, values in limits.items()]
    for name, shape in shapes.items():
        module = experts_module(shape)
        rows += _bench_parts(name, shape, module, limits)
        rows += _bench_layer(name, shape, module, limits, against_transformers)
        del module
        torch.cuda.empty_cache()
    return rows


def graph_milliseconds(fn: Callable[[], Any], calls: int = 10, replays: int = 7) -> float:
    """Median time of one `fn()` over replays of a CUDA graph that holds `calls` of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events from its own thread, which a capture of all threads would not survive
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            fn()
    graph.replay()
    return statistics.median(_event_milliseconds(graph.replay) for _ in range(replays)) / calls


def eager_milliseconds(fn: Callable[[], Any], calls: int = 10, repeats: int = 5) -> float:
    """Median time of one `fn()` issued by the host, after a warm-up."""

    def many() -> None:
        for _ in range(calls):
            fn()

    many()
    return statistics.median(_event_milliseconds(many) for _ in range(repeats)) / calls


def _event_milliseconds(fn: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    fn()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds


def _measure_limits() -> dict[str, tuple[float, float, str]]:
    """{part: (ms, rate, unit)} of a 2 GiB device copy and an 8192^3 matrix product in bf16."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy_ms = eager_milliseconds(lambda: target.copy_(source))  # a copy node in a graph runs at two thirds of it
    return {"copy": (copy_ms, 2 * 2**31 / copy_ms / 1e6, "GB/s"), "gemm 8192": (*measure_gemm(), "TFLOP/s")}


def measure_gemm() -> tuple[float, float]:
    """Milliseconds and TFLOP/s of an 8192^3 matrix product in bf16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = graph_milliseconds(lambda: a @ b, calls=2)  # as short as the parts: power limits the clock after 50 ms
    return ms, 2 * 8192**3 / ms / 1e9


def _random_inputs(shape: LayerShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, choices of a random router, their weights, and a gradient of the output."""
    x = torch.randn(shape.tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(shape.tokens, shape.num_experts, device="cuda")
    weights, index = logits.softmax(-1).topk(shape.top_k)
    weights = (weights / weights.sum(-1, keepdim=True)).bfloat16()
    return x, index, weights, torch.randn_like(x)


def _bench_parts(
    name: str, shape: LayerShape, module: torch.nn.Module, limits: dict[str, tuple[float, float, str]]
) -> list[Row]:
    weights, activation = expert_weights(module), recognise_activation_of(module)
    x, index, top_k_weights, _ = _random_inputs(shape)
    routing = route_sort(index, shape.num_experts)
    rows, row_weights = permute_rows(x, top_k_weights, routing.row_TK, index.numel())
    offsets = routing.offsets_E
    up_weight, down_weight = (
        (w if weights.transposed else w.transpose(1, 2)).detach() for w in (weights.up, weights.down)
    )
    up = multiply_rows(rows, up_weight, offsets)
    act = gated_activation(up, row_weights, offsets, weights.up_bias, activation)
    grad_up, _, _ = gated_activation_backward(act, up, row_weights, offsets, weights.up_bias, activation)

    def memory(part: str, fn: Callable[[], Any], numbers: int) -> Row:
        ms = graph_milliseconds(fn)
        rate = 2 * numbers / ms / 1e6
        return Row(name, part, ms, rate, "GB/s", rate / limits["copy"][1])

    def products(part: str, a: torch.Tensor, b: torch.Tensor, inner: int) -> list[Row]:
        """Ours and torch's product: rows [R, K] by weights [E, K, N], or the sum of outer products of two rows."""
        outer = b.dim() == 2
        left = a.t() if outer else a
        times = {
            "grouped": graph_milliseconds(
                lambda: multiply_outer(a, b, offsets) if outer else multiply_rows(a, b, offsets)
            ),
            "torch grouped": graph_milliseconds(lambda: torch._grouped_mm(left, b, offs=offsets)),
        }
        flops = 2 * index.numel() * shape.hidden * inner
        rates = {system: flops / ms / 1e9 for system, ms in times.items()}
        limit = limits["gemm 8192"][1]
        return [Row(name, f"{k} {part}", ms, rates[k], "TFLOP/s", rates[k] / limit) for k, ms in times.items()]

    r, t, w, i = rows.numel(), x.numel(), up.numel(), act.numel()
    width, inner = up.shape[1], act.shape[1]
    up_pair, down_pair = ((rows, grad_up), (act, rows)) if weights.transposed else ((grad_up, rows), (rows, act))
    table = [
        memory("route_sort", lambda: route_sort(index, shape.num_experts), 4 * index.numel() + 4 * index.numel()),
        memory("torch.sort", lambda: torch.sort(index.view(-1)), 4 * index.numel() + 8 * index.numel()),
        memory("permute", lambda: permute_rows(x, top_k_weights, routing.row_TK, index.numel()), t + r),
        memory("sum_rows", lambda: sum_rows(rows, None, routing.row_TK), t + r),
        memory("activation", lambda: gated_activation(up, row_weights, offsets, weights.up_bias, activation), w + i),
        memory(
            "activation backward",
            lambda: gated_activation_backward(act, up, row_weights, offsets, weights.up_bias, activation),
            2 * w + 2 * i,
        ),
        *products("up", rows, up_weight, width),
        *products("down", act, down_weight, inner),
        *products("down dgrad", rows, down_weight.transpose(1, 2), inner),
        *products("up dgrad", grad_up, up_weight.transpose(1, 2), width),
        *products("down wgrad", *down_pair, inner),
        *products("up wgrad", *up_pair, width),
    ]
    if weights.down_bias is not None:
        bias = weights.down_bias.detach()
        table += [
            memory("down bias", lambda: add_row_bias_(rows, row_weights, offsets, bias), 2 * r),
            memory("down bias, weight grad", lambda: row_bias_backward(rows, offsets, bias), r),
            memory("down bias grad", lambda: expert_sum(rows, row_weights, offsets), r),
            memory("up bias grad", lambda: expert_sum(up, None, offsets), w),
        ]
    return table


def recognise_activation_of(module: torch.nn.Module) -> Activation:
    activation = recognise_activation(module)
    assert activation is not None, f"no fused activation computes what {type(module).__name__} does"
    return activation


def _bench_layer(
    name: str,
    shape: LayerShape,
    module: torch.nn.Module,
    limits: dict[str, tuple[float, float, str]],
    against_transformers: bool,
) -> list[Row]:
    """Forward and backward of the whole layer: eager and as a CUDA graph, ours and Transformers' grouped_mm."""
    weights, activation = expert_weights(module), recognise_activation_of(module)
    x, index, top_k_weights, grad = _random_inputs(shape)
    x.requires_grad_()
    top_k_weights.requires_grad_()
    leaves = [x, top_k_weights, *(w for w in weights[:4] if w is not None)]

    def ours() -> torch.Tensor:
        return experts_forward(x, index, top_k_weights, ExpertWeights(*weights), activation)

    def transformers() -> Any:
        return module(x, index, top_k_weights)

    flops = 6 * index.numel() * (weights.up.numel() + weights.down.numel()) / shape.num_experts
    table = []
    for system, forward in [("moetrain", ours)] + [("transformers", transformers)] * against_transformers:

        def step(forward: Callable[[], torch.Tensor] = forward) -> None:
            torch.autograd.grad(forward(), leaves, grad)

        timings = {
            "layer fwd, graph": graph_milliseconds(forward, calls=2),
            "layer fwd+bwd, graph": graph_milliseconds(step, calls=2),
            "layer fwd+bwd, eager": eager_milliseconds(step),
        }
        for part, ms in timings.items():
            rate = (flops / 3 if part.startswith("layer fwd,") else flops) / ms / 1e9
            table.append(Row(name, f"{part}, {system}", ms, rate, "TFLOP/s", rate / limits["gemm 8192"][1]))
        table.append(_memory_row(name, system, forward, step))
    return table


def _memory_row(name: str, system: str, forward: Callable[[], torch.Tensor], step: Callable[[], None]) -> Row:
    """What the forward leaves for the backward, in MB in the place of a rate."""
    before = torch.cuda.memory_allocated()
    out = forward()
    kept = (torch.cuda.memory_allocated() - before - out.numel() * out.element_size()) / 1e6
    del out
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return Row(name, f"layer kept for backward (of peak), {system}", 0.0, kept, "MB", kept / peak)
