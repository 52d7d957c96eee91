"""Time and rate of attention, forward and backward, at the shapes of real models.

    python -m moetrain.bench.attention [--cases NAME ...] [--tokens 4096] [--against transformers] [--out DIRECTORY]

Each case runs on the backend that models get and on the others that take it, captured in a CUDA graph. The operations
counted are those of the keys that a token sees; the backward has 2.5 times those of the forward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from moetrain.attention import CausalMask
from moetrain.backends import transformer_engine
from moetrain.backends.attention import BACKENDS, Case, choose_backend
from moetrain.bench.kernels import graph_milliseconds, measure_gemm
from moetrain.bench.rows import Row, present
from moetrain.kernels.attention import attend


@dataclass(frozen=True)
class Shape:
    """One layer's attention on one GPU."""

    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    rows: int = 1
    window: int | None = None
    sinks: bool = False
    document: int | None = None
    """Mean tokens of a packed document."""
    max_documents: int = 64
    """Of a row; those that are not there are empty."""


QWEN3, GPT_OSS = Shape(32, 4, 128, 128), Shape(64, 8, 64, 64, rows=2, sinks=True)
CASES = {
    "qwen3-30b-a3b": QWEN3,
    "nemotron-3-nano": Shape(32, 2, 128, 128),
    "gpt-oss-20b full": GPT_OSS,
    "gpt-oss-20b window": Shape(64, 8, 64, 64, rows=2, window=128, sinks=True),
    "deepseek-v3": Shape(128, 128, 192, 128),
    "qwen3-30b-a3b packed, 16 places": Shape(32, 4, 128, 128, document=512, max_documents=16),
    "qwen3-30b-a3b packed, 64 places": Shape(32, 4, 128, 128, document=512, max_documents=64),
    "qwen3-30b-a3b packed, 256 places": Shape(32, 4, 128, 128, document=512, max_documents=256),
    "gpt-oss-20b window, packed": Shape(64, 8, 64, 64, rows=2, window=128, sinks=True, document=512),
}


def bench_attention(names: Sequence[str], tokens: int = 4096, against_transformers: bool = False) -> list[Row]:
    """Measure the cases at rows of `tokens` tokens on the current CUDA device.

    Raises:
        ValueError: an unknown case, or no GPU.
    """
    if unknown := sorted(set(names) - set(CASES)):
        raise ValueError(f"unknown case {unknown[0]!r}; valid: {', '.join(CASES)}")
    if not torch.cuda.is_available():
        raise ValueError("attention is timed on a GPU, and torch sees none; `moetrain doctor` says why")
    limit = measure_gemm()
    rows = [Row("limit", "gemm 8192", *limit, "TFLOP/s", 1.0)]
    for name in names:
        rows += _bench_case(name, CASES[name], tokens, limit[1], against_transformers)
        torch.cuda.empty_cache()
    return rows


def _bench_case(name: str, shape: Shape, tokens: int, limit: float, against_transformers: bool) -> list[Row]:
    leaves = _leaves(shape, tokens)
    lengths = document_lengths(shape, tokens)
    mask = CausalMask(shape.window, _cu_seqlens(shape, tokens, lengths) if shape.document else None)
    flops = 2.0 * visible_pairs(lengths, shape.window) * shape.heads * (shape.head_dim + shape.value_dim)
    systems = _systems(shape, leaves, mask)
    if against_transformers:
        systems["transformers"] = _own(shape, leaves, mask)
    table = []
    for system, forward in systems.items():
        step = _step(forward, leaves)
        forward_ms, step_ms = graph_milliseconds(forward, calls=4), graph_milliseconds(step, calls=4)
        for part, ms, work in (("forward", forward_ms, flops), ("backward", step_ms - forward_ms, 2.5 * flops)):
            rate = work / ms / 1e9
            table.append(Row(name, f"{system} {part}", ms, rate, "TFLOP/s", rate / limit))
    return table


def _step(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    with torch.no_grad():  # a graph of autograd would remember the stream it was made on
        grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, grad)


def _systems(shape: Shape, leaves: list[Tensor], mask: CausalMask) -> dict[str, Callable[[], Tensor]]:
    """The backends that take the case; the one that models get is marked."""
    q = leaves[0]
    documents = mask.cu_seqlens is not None
    case = Case(q.device, q.dtype, shape.head_dim, shape.value_dim, shape.window, documents, shape.sinks)
    chosen, _ = choose_backend(case)
    options: dict[str, Any] = {
        "scale": shape.head_dim**-0.5,
        "window": shape.window,
        "cu_seqlens": mask.cu_seqlens,
    }
    sinks = leaves[3] if shape.sinks else None
    systems: dict[str, Callable[[], Tensor]] = {}
    for backend in BACKENDS["attention"]:
        if backend.name == "torch" or backend.missing(case) is not None:
            continue
        label = f"{backend.name} (chosen)" if backend.name == chosen else backend.name
        if backend.name == "transformer_engine":
            systems[label] = lambda: transformer_engine.attend(*_transposed(leaves), **options)
        else:
            systems[label] = lambda name=backend.name: attend(  # type: ignore[misc]
                *_transposed(leaves), name, **options, sinks_H=sinks
            )
    return systems


def _transposed(leaves: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the kernels take them; made in each call, since autograd runs an operation's backward on the stream
    that the operation was on."""
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves[:3])
    return q, k, v


def _own(shape: Shape, leaves: list[Tensor], mask: CausalMask) -> Callable[[], Tensor]:
    """What Transformers calls: SDPA, or GPT-OSS' eager function, with the mask that is made once a step."""
    q, k, v = leaves[:3]
    layer: Any = nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, shape.heads // shape.key_heads
    scale = shape.head_dim**-0.5
    if shape.sinks:
        layer.sinks = leaves[3]
        added = torch.where(mask.dense(q), 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        return lambda: eager_attention_forward(layer, q, k, v, added, scaling=scale)[0]
    dense = None if shape.window is None and mask.cu_seqlens is None else mask.dense(q)
    return lambda: sdpa_attention_forward(layer, q, k, v, dense, scaling=scale)[0]


def _leaves(shape: Shape, tokens: int) -> list[Tensor]:
    """q, k, v [B, heads, S, D] as views of [B, S, heads, D], and the sinks."""
    sizes = [(shape.heads, shape.head_dim), (shape.key_heads, shape.head_dim), (shape.key_heads, shape.value_dim)]
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    leaves = [torch.randn(shape.rows, tokens, *size, **options).transpose(1, 2) for size in sizes]
    leaves += [torch.randn(shape.heads, **options)] * shape.sinks
    return [leaf.requires_grad_() for leaf in leaves]


def document_lengths(shape: Shape, tokens: int) -> list[list[int]]:
    """Tokens of the documents of each row, the same in every run: cut at random places."""
    if shape.document is None:
        return [[tokens]] * shape.rows
    generator = torch.Generator().manual_seed(0)
    places = tokens // shape.document - 1
    lengths = []
    for _ in range(shape.rows):
        cuts = torch.randperm(tokens - 1, generator=generator)[:places].add(1).sort().values.tolist()
        lengths.append([end - start for start, end in zip([0, *cuts], [*cuts, tokens], strict=True)])
    return lengths


def visible_pairs(lengths: list[list[int]], window: int | None) -> int:
    """Pairs of a token and a key that it sees, in all rows."""
    total = 0
    for length in (length for row in lengths for length in row):
        width = min(window or length, length)
        total += width * (width + 1) // 2 + (length - width) * width
    return total


def _cu_seqlens(shape: Shape, tokens: int, lengths: list[list[int]]) -> Tensor:
    ends = torch.tensor([length for row in lengths for length in row], dtype=torch.int64).cumsum(0)
    cu_seqlens = torch.full((shape.rows * shape.max_documents + 1,), shape.rows * tokens, dtype=torch.int32)
    cu_seqlens[0], cu_seqlens[1 : len(ends) + 1] = 0, ends
    return cu_seqlens.cuda()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--tokens", type=int, default=4096, help="in a row")
    parser.add_argument("--against", choices=["transformers"])
    parser.add_argument("--out", type=Path, help="directory for attention.json")
    args = parser.parse_args()
    rows = bench_attention(args.cases, args.tokens, args.against == "transformers")
    present("attention", rows, f"rows of {args.tokens} tokens, bf16", args.out)


if __name__ == "__main__":
    main()
