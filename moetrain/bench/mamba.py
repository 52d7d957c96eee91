"""Time of a Mamba-2 layer and of its parts at the shapes of real models, against what must move or be computed.

    python -m moetrain.bench.mamba [--shapes NAME ...] [--tokens 4096] [--documents N] [--against transformers]
                                   [--sweep] [--out DIRECTORY]

Parts and layer are captured in a CUDA graph; Transformers' own path is timed as the host issues it. A part's bytes are
those of its inputs and outputs, and of the states that the scan writes and reads again. `--sweep` times the scan with
other tiles, the fastest first.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHMamba2Mixer

from moetrain.backends.mamba import use_mamba_kernels
from moetrain.bench.kernels import eager_milliseconds, graph_milliseconds, measure_gemm
from moetrain.bench.rows import Row, present
from moetrain.kernels.mamba2 import causal_conv, chunk_scan, gated_norm
from moetrain.kernels.mamba2_scan import Tiles, chunk_states, scan_forward, tiles, time_steps
from moetrain.kernels.mamba2_scan_backward import scan_backward

NEMOTRON_3 = {"mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "chunk_size": 128}
SHAPES = {
    "nemotron-3-nano": {"hidden_size": 2688, "mamba_num_heads": 64},
    "nemotron-3-super": {"hidden_size": 4096, "mamba_num_heads": 128},
    "nemotron-3-ultra": {"hidden_size": 8192, "mamba_num_heads": 256},
}


class Limits(NamedTuple):
    """Of this GPU, measured: TFLOP/s of an 8192^3 product in bf16, GB/s of a copy (read + written)."""

    tflops: float
    gbytes: float


def bench_mamba(
    names: Sequence[str], tokens: int = 4096, documents: int = 0, against_transformers: bool = False
) -> list[Row]:
    """Measure one layer of each of `names` (keys of SHAPES) on a row of `tokens` tokens on the current CUDA device.

    Args:
        documents: packed into the row; 0 is a row without `seq_idx`.

    Raises:
        ValueError: no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("the kernels are timed on a GPU, and torch sees none; `moetrain doctor` says why")
    gemm_ms, tflops = measure_gemm()
    copy_ms = _copy_milliseconds(2**31)
    limits = Limits(tflops, 2 * 2**31 / copy_ms / 1e6)
    rows = [
        Row("limit", "gemm 8192", gemm_ms, limits.tflops, "TFLOP/s", 1.0),
        Row("limit", "copy", copy_ms, limits.gbytes, "GB/s", 1.0),
    ]
    for name in names:
        mixer = _mixer(name)
        seq_idx = _documents(tokens, documents)
        rows += _bench_parts(name, mixer, tokens, seq_idx, limits)
        rows += _bench_mixer(name, mixer, tokens, seq_idx, limits, against_transformers)
        torch.cuda.empty_cache()
    return rows


def _copy_milliseconds(size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return eager_milliseconds(lambda: target.copy_(source))  # a copy node in a graph runs at two thirds of it


def _mixer(name: str) -> Any:
    """Transformers' layer of the shape in bf16, with the time steps and decays that it is initialised with."""
    config = NemotronHConfig(layers_block_type=["linear_attention"], **NEMOTRON_3, **SHAPES[name])
    with torch.device("cuda"):
        mixer = NemotronHMamba2Mixer(config, layer_idx=0)
    nn.init.uniform_(mixer.dt_bias, -6.9, -2.3)  # time steps of 0.001 to 0.1
    mixer.time_step_limit = (0.0, float("inf"))
    return mixer.bfloat16()


def _documents(tokens: int, documents: int) -> Tensor | None:
    if documents == 0:
        return None
    starts = torch.zeros(1, tokens, dtype=torch.int32, device="cuda")
    starts[0, torch.randperm(tokens - 1)[: documents - 1] + 1] = 1
    return starts.cumsum(1).int()


def _inputs(mixer: Any, tokens: int) -> SimpleNamespace:
    """Random tensors in the layout that the layer gives its parts: slices of the projections."""
    heads, groups, state = mixer.num_heads, mixer.n_groups, mixer.ssm_state_size
    sizes = [mixer.intermediate_size, mixer.conv_dim, heads]
    gate, conv_in, dt = torch.randn(1, tokens, sum(sizes), device="cuda").bfloat16().split(sizes, -1)
    conv_out = torch.randn(1, tokens, mixer.conv_dim, device="cuda").bfloat16()
    x, B, C = conv_out.split([mixer.intermediate_size, groups * state, groups * state], -1)
    return SimpleNamespace(
        gate=gate,
        conv_in=conv_in,
        scan=[
            x.unflatten(-1, (heads, -1)),
            dt,
            -torch.exp(mixer.A_log.detach().float()),
            B.unflatten(-1, (groups, -1)),
            C.unflatten(-1, (groups, -1)),
            mixer.D.detach(),
            mixer.dt_bias.detach(),
        ],
        y=torch.randn(1, tokens, mixer.intermediate_size, device="cuda").bfloat16(),
    )


def _bench_parts(name: str, mixer: Any, tokens: int, seq_idx: Tensor | None, limits: Limits) -> list[Row]:
    given, span = _inputs(mixer, tokens), (0.0, float("inf"))
    x, dt, A, B, C, _, dt_bias = given.scan
    conv = [given.conv_in, mixer.conv1d.weight.detach().squeeze(1), mixer.conv1d.bias.detach()]
    norm = [given.y, given.gate, mixer.norm.weight.detach()]
    size = tiles(x, B)
    steps = time_steps(dt, A, dt_bias, *span, size.chunk)
    states = chunk_states(x, B, *steps, seq_idx, size)[0]
    grad = torch.randn_like(given.y).view(x.shape)
    c, y, b, s = given.conv_in.numel(), x.numel(), B.numel(), states.numel()

    convolve: Callable[..., Tensor] = functools.partial(causal_conv, seq_idx_BS=seq_idx)
    scan: Callable[..., Tensor] = functools.partial(chunk_scan, dt_limit=span, seq_idx_BS=seq_idx)
    normalise: Callable[..., Tensor] = functools.partial(gated_norm, groups=mixer.n_groups, eps=1e-5)
    parts: list[tuple[str, Callable[[], Any], int]] = [
        ("conv forward", lambda: convolve(*conv), 2 * c),
        ("conv forward + backward", _step(convolve, conv), 5 * c),
        ("scan forward", lambda: scan(*given.scan), 3 * y + 3 * b + 2 * s),
        ("  time steps", lambda: time_steps(dt, A, dt_bias, *span, size.chunk), 5 * dt.numel()),
        ("  states", lambda: chunk_states(x, B, *steps, seq_idx, size), y + b + s),
        ("  states, backward", lambda: chunk_states(grad, C, *steps, seq_idx, size, states), y + b + 2 * s),
        ("scan forward + backward", _step(scan, given.scan), 10 * y + 12 * b + 8 * s),
        ("norm forward", lambda: normalise(*norm), 3 * y),
        ("norm forward + backward", _step(normalise, norm), 8 * y),
    ]
    rows = []
    for part, fn, numbers in parts:
        ms = graph_milliseconds(fn)
        rate = 2 * numbers / ms / 1e6
        rows.append(Row(name, part, ms, rate, "GB/s", rate / limits.gbytes))
    return rows


def _step(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def _bench_mixer(
    name: str, mixer: Any, tokens: int, seq_idx: Tensor | None, limits: Limits, against_transformers: bool
) -> list[Row]:
    """The whole layer, at the rate of its two projections' operations, and those products alone."""
    x = torch.randn(1, tokens, mixer.hidden_size, device="cuda").bfloat16()
    grad, inner = torch.randn_like(x), torch.randn(1, tokens, mixer.intermediate_size, device="cuda").bfloat16()
    weights = [mixer.in_proj.weight.detach(), mixer.out_proj.weight.detach()]
    flop = 2 * tokens * sum(weight.numel() for weight in weights)
    fast = copy.deepcopy(mixer)
    model: Any = nn.Sequential(fast)
    model.dtype, model.config = torch.bfloat16, mixer.config
    assert use_mamba_kernels(model) is None

    def forward(layer: Any, seq_idx: Tensor | None) -> Tensor:
        with torch.no_grad():
            out: Tensor = layer(x) if seq_idx is None else layer(x, seq_idx=seq_idx)
        return out

    def step(layer: Any, seq_idx: Tensor | None) -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_(), *layer.parameters()]
        kwargs: dict[str, Any] = {} if seq_idx is None else {"seq_idx": seq_idx}
        return lambda: torch.autograd.grad(layer(leaves[0], **kwargs), leaves, grad)

    products = [_step(torch.nn.functional.linear, pair) for pair in zip((x, inner), weights, strict=True)]
    timings = {
        "layer forward": (graph_milliseconds(lambda: forward(fast, seq_idx), calls=4), flop),
        "layer forward + backward": (graph_milliseconds(step(fast, seq_idx), calls=4), 3 * flop),
        "its products, forward + backward": (sum(graph_milliseconds(fn, calls=4) for fn in products), 3 * flop),
        "layer forward + backward, issued by the host": (eager_milliseconds(step(fast, seq_idx)), 3 * flop),
    }
    if against_transformers:  # in one document: its path takes no seq_idx
        slow = eager_milliseconds(lambda: forward(mixer, None), calls=2, repeats=3)
        timings["Transformers, forward"] = slow, flop
        slow = eager_milliseconds(step(mixer, None), calls=2, repeats=3)
        timings["Transformers, forward + backward"] = slow, 3 * flop
    rows = []
    for part, (ms, operations) in timings.items():
        rate = operations / ms / 1e9
        rows.append(Row(name, part, ms, rate, "TFLOP/s", rate / limits.tflops))
    return rows


def sweep_tiles(name: str, tokens: int = 4096, documents: int = 0) -> None:
    """Print the scan's time with every tile size, forward and backward, the fastest first."""
    from triton.runtime.errors import OutOfResources

    given, seq_idx = _inputs(_mixer(name), tokens), _documents(tokens, documents)
    x, B = given.scan[0], given.scan[3]
    grad, usual = torch.randn_like(x), tiles(x, B)
    calls: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "forward": (scan_forward, given.scan),
        "backward": (scan_backward, [grad, *given.scan]),
    }
    for way, (scan, tensors) in calls.items():
        found: list[tuple[float, Tiles]] = []
        for chunk, heads, stages, warps in itertools.product((64, 128), (2, 4, 8), (1, 2, 3), (4, 8)):
            size = usual._replace(chunk=chunk, heads=heads, stages=stages, warps=warps)
            run = functools.partial(scan, *tensors, seq_idx, 0.0, float("inf"), size)
            with contextlib.suppress(OutOfResources):
                found.append((graph_milliseconds(run), size))
        for ms, size in sorted(found)[:8]:
            print(f"{name} scan {way}: {ms:.4f} ms, {size}" + (" (in use)" if size == usual else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["nemotron-3-nano"], choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=0, help="packed into the row (default: none, no seq_idx)")
    parser.add_argument("--against", choices=["transformers"])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, help="for the table as JSON")
    args = parser.parse_args()
    rows = bench_mamba(args.shapes, args.tokens, args.documents, args.against == "transformers")
    present("mamba", rows, f"{args.tokens} tokens, {args.documents or 1} documents", args.out)
    if args.sweep:
        for name in args.shapes:
            sweep_tiles(name, args.tokens, args.documents)


if __name__ == "__main__":
    main()
