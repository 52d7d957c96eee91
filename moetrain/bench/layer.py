"""Time and rate of a Mixture-of-Experts layer behind its router, by each way of bringing tokens to their experts.

Every rank has its own tokens and 1 / `ep_size` of the experts. Each way is first compared with Transformers' own layer
on the same weights; then it is timed, as a CUDA graph where nothing in it waits for the host. A time is the slowest
rank's. TFLOP/s count the experts' products alone, so that what dispatch and combine cost shows as a lower rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers.distributed.expert_parallel import AllToAllEP

from moetrain import mesh
from moetrain.backends import deep_ep
from moetrain.bench.flops import peak_tflops
from moetrain.bench.kernels import eager_milliseconds, graph_milliseconds
from moetrain.bench.rows import Row
from moetrain.bench.shapes import LayerShape, count_experts, experts_module, layer_shape
from moetrain.moe.dispatch import Dispatcher, StaticDispatcher, build_dispatcher, nvlink_obstacle
from moetrain.moe.layer import local_experts_forward, moe_forward
from moetrain.moe.router import GATES

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
TOLERANCE = 2e-2
"""Relative difference of two bf16 layers that sum in other orders."""


def bench_layer(
    model: str,
    tokens: int = 4096,
    ep_size: int = 1,
    gate: str = "random",
    dispatch: str = "auto",
    against_transformers: bool = False,
) -> list[Row]:
    """Check the layer, then measure it. Call it on every rank, with the default group initialised where there are
    several.

    Args:
        tokens: of a rank.
        dispatch: the only dispatcher to measure; `auto` measures all that can run here.

    Raises:
        ValueError: an unknown model, or a layout or dispatcher that cannot run here.
        AssertionError: outputs or gradients differ from Transformers' by more than rounding.
    """
    device, limit = mesh.device(), peak_tflops(mesh.device())
    mesh.check_ep_divides(count_experts(model), ep_size, mesh.world_size())
    shape = layer_shape(f"{model}-ep{ep_size}", tokens)
    ep_mesh = _ep_mesh(ep_size, device)
    torch.manual_seed(mesh.rank())
    experts = experts_module(shape, str(device))
    inputs = _inputs(shape, shape.num_experts * ep_size, gate, device)
    flop = 6 * tokens * shape.top_k * sum(p[0].numel() for p in experts.parameters() if p.dim() == 3)

    native_name, native = _native(experts, ep_mesh)
    expected = _step(native, experts, inputs)
    systems: dict[str, tuple[Layer, bool]] = {}
    for name, dispatcher in _dispatchers(dispatch, shape, ep_mesh).items():
        layer = _layer(experts, dispatcher)
        _check(name, _step(layer, experts, inputs), expected)
        if isinstance(dispatcher, StaticDispatcher) and not dispatcher.waits:
            dispatcher.capacity = _needed(dispatcher)
        systems[name] = layer, not dispatcher.waits
    if against_transformers:
        systems[native_name] = native, ep_mesh is None
    rows = []
    for name, (layer, static) in systems.items():
        for part, fn, share in (
            ("forward", lambda layer=layer: layer(*inputs[:3]), 1 / 3),
            ("forward + backward", lambda layer=layer: _step(layer, experts, inputs), 1.0),
        ):
            ms, how = _slowest(fn, static, device)
            rate = flop * share / ms / 1e9
            rows.append(Row(model, f"{name}, {part}, {how}", ms, rate, "TFLOP/s", rate / limit if limit else 0.0))
    return rows


def _ep_mesh(ep_size: int, device: torch.device) -> DeviceMesh | None:
    """Expert groups of neighbouring ranks; None where each rank has all experts."""
    if ep_size == 1:
        return None
    return init_device_mesh(
        device.type, (mesh.world_size() // ep_size, ep_size, 1), mesh_dim_names=("efsdp", "ep", "tp")
    )


def _inputs(shape: LayerShape, num_experts: int, gate: str, device: torch.device) -> tuple[Tensor, ...]:
    """Tokens, choices and their weights, and a gradient of the output."""
    if gate not in GATES:
        raise ValueError(f"a layer without its router has no {gate!r} gate; valid: {', '.join(GATES)}")
    x_TH = torch.randn(shape.tokens, shape.hidden, device=device).bfloat16().requires_grad_()
    index_TK = GATES[gate](torch.empty(shape.tokens, shape.top_k, dtype=torch.int64, device=device), num_experts)
    weights_TK = torch.rand(shape.tokens, shape.top_k, device=device)
    weights_TK = (weights_TK / weights_TK.sum(1, keepdim=True)).bfloat16().requires_grad_()
    return x_TH, index_TK, weights_TK, torch.randn_like(x_TH)


def _native(experts: Any, ep_mesh: DeviceMesh | None) -> tuple[str, Layer]:
    if ep_mesh is None:
        return "transformers grouped_mm", experts
    return "transformers all_to_all", AllToAllEP(experts, ep_mesh["ep"], ep_mesh["tp"])


def _dispatchers(dispatch: str, shape: LayerShape, ep_mesh: DeviceMesh | None) -> dict[str, Dispatcher]:
    group = None if ep_mesh is None else ep_mesh["ep"].get_group()
    names = [dispatch]
    if dispatch == "auto":
        names = ["local"] if ep_mesh is None else ["alltoall", "allgather"]
        if ep_mesh is not None and nvlink_obstacle(ep_mesh["ep"].size()) is None:
            names.append("nvlink")
        sizes = deep_ep.Sizes(shape.hidden, shape.top_k, shape.num_experts, torch.bfloat16)
        if ep_mesh is not None and deep_ep.obstacle(ep_mesh["ep"].size(), sizes) is None:
            names.append("deep_ep")
    ranks = 1 if ep_mesh is None else ep_mesh["ep"].size()
    return {name: build_dispatcher(name, shape.num_experts * ranks, group) for name in names}


def _layer(experts: Any, dispatcher: Dispatcher) -> Layer:
    if isinstance(dispatcher, StaticDispatcher) or dispatcher.num_experts != experts.num_experts:
        return lambda x, index, weights: moe_forward(experts, dispatcher, x, index, weights)
    return lambda x, index, weights: local_experts_forward(experts, x, index, weights)


def _step(layer: Layer, experts: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output, and the gradients of tokens, weights and experts."""
    x_TH, index_TK, weights_TK, grad_TH = inputs
    out_TH = layer(x_TH, index_TK, weights_TK)
    return out_TH.detach(), *torch.autograd.grad(out_TH, [x_TH, weights_TK, *experts.parameters()], grad_TH)


def _check(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for value, reference in zip(found, expected, strict=True):
        error = (value.double() - reference.double()).norm() / reference.double().norm()
        assert error < TOLERANCE, f"{name} differs from Transformers by {error:.1e} in a tensor {tuple(value.shape)}"


def _needed(dispatcher: StaticDispatcher) -> int:
    """Rows that the fullest rank received."""
    assert dispatcher.needed is not None
    dist.all_reduce(dispatcher.needed, dist.ReduceOp.MAX)
    return int(dispatcher.needed.item())


def _slowest(fn: Callable[[], Any], static: bool, device: torch.device) -> tuple[float, str]:
    """Milliseconds of the slowest rank, and how they were measured."""
    if dist.is_initialized():
        dist.barrier()
    if device.type != "cuda":
        ms, how = _cpu_milliseconds(fn), "eager"
    elif static:
        torch.cuda.synchronize()
        ms, how = graph_milliseconds(fn, calls=4), "graph"
    else:
        ms, how = eager_milliseconds(fn), "eager"
    if dist.is_initialized():
        slowest = torch.tensor(ms, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        ms = slowest.item()
    return ms, how


def _cpu_milliseconds(fn: Callable[[], Any]) -> float:
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])
