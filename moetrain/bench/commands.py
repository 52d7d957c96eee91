"""The verb `moetrain bench`: its words, and what each part of it calls. Imports nothing heavy before a part runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moetrain.bench.shapes import SHAPES, find_shape, layer_shape, nearest

Run = Callable[[argparse.Namespace], int]
DEFAULT_MODEL = "qwen3-30b-a3b"
OUT = "runs/bench"
WITHOUT_GPU = {"model": "tiny --processes 2 --seq-len 256", "layer": "layer tiny --processes 2 --tokens 256"}
"""What runs anywhere in the place of a part that needs GPUs."""
KERNELS = ("auto", "transformer_engine", "te", "torch")
GATES, CHECKPOINTING = ("learned", "random", "sequential"), ("none", "full", "selective")


def positive(text: str) -> int:
    """Of a command line: an integer from 1 on."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def name_part(words: Sequence[str]) -> list[str]:
    """`bench MODEL ...` as `bench model MODEL ...`: argparse has no verb for every model."""
    if list(words[:1]) == ["bench"] and len(words) > 1 and words[1] not in PARTS and not words[1].startswith("-"):
        return ["bench", "model", *words[1:]]
    return list(words)


def run_bench(args: argparse.Namespace) -> int:
    """Time what was asked for, in this process as one of the ranks; the exit code."""
    return PARTS[args.part](args)


def check_names(args: argparse.Namespace) -> None:
    """Raises ValueError, with the nearest names, for a model that there is not, and where a part or a model is timed on
    a GPU and torch sees none: on a CPU it would take hours, and tell nothing."""
    if args.part == "model" and args.model not in SHAPES:
        parts = [part for part in PARTS if part != "model"]
        raise ValueError(
            f"unknown model or part {args.model!r}{nearest(args.model, [*parts, *SHAPES])} The models are "
            f"{', '.join(SHAPES)}; the parts are {', '.join(parts)}"
        )
    if "model" in args:
        find_shape(args.model)
    for name in getattr(args, "models", ()):
        layer_shape(name)
    if args.part in WITHOUT_GPU and not args.model.startswith("tiny"):
        _check_gpu(f"{args.model} is timed on a GPU", args.part)
    elif args.part == "dispatch":
        _check_gpu("the exchange is timed on two GPUs or more", "layer")


def _check_gpu(what: str, instead: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"{what}, and torch sees none; `moetrain bench {WITHOUT_GPU[instead]}` runs anywhere")


def run_model(args: argparse.Namespace) -> int:
    from moetrain import mesh
    from moetrain.bench import compare
    from moetrain.bench.systems import Case
    from moetrain.config import full_name

    case = Case(
        model=args.model,
        layers=args.layers,
        batch=args.batch,
        seq_len=args.seq_len,
        gate=args.gate,
        ep_size=args.ep_size or compare.largest_ep_size(args.model, mesh.world_size()),
        kernels=full_name(args.kernels),
        dispatch=full_name(args.dispatch),
        activation_checkpointing=args.activation_checkpointing,
        checkpointed_layers=args.checkpointed_layers,
        graph=args.graph,
        warmup=args.warmup,
        steps=args.steps,
    )
    return compare.bench_model(case, Path(args.out), args.words, args.against is not None, args.profile)


def run_kernels(args: argparse.Namespace) -> int:
    from moetrain.bench.kernels import SHAPES, bench_kernels
    from moetrain.bench.rows import command_line, present

    rows = bench_kernels(args.models or SHAPES, args.tokens, args.against is not None)
    present("kernels", rows, command_line(args.words), Path(args.out))
    return 0


def run_attention(args: argparse.Namespace) -> int:
    from moetrain.bench.attention import CASES, bench_attention
    from moetrain.bench.rows import command_line, present

    rows = bench_attention(args.cases or list(CASES), args.tokens, args.against is not None)
    present("attention", rows, command_line(args.words), Path(args.out))
    return 0


def run_dispatch(args: argparse.Namespace) -> int:
    from moetrain.bench.dispatch import bench_dispatch
    from moetrain.bench.isolate import join_group, leave_group
    from moetrain.bench.rows import command_line, present

    shape = layer_shape(args.model, args.tokens)
    join_group()
    rows = bench_dispatch(
        args.tokens,
        args.hidden or shape.hidden,
        args.intermediate or shape.intermediate,
        args.experts or shape.num_experts,
        args.top_k or shape.top_k,
    )
    present("dispatch", rows, command_line(args.words), Path(args.out))
    leave_group()
    return 0


def run_layer(args: argparse.Namespace) -> int:
    from moetrain import mesh
    from moetrain.bench.compare import largest_ep_size
    from moetrain.bench.isolate import join_group, leave_group
    from moetrain.bench.layer import bench_layer
    from moetrain.bench.rows import command_line, present
    from moetrain.config import full_name
    from moetrain.prepare import keep_quiet

    keep_quiet()
    join_group()
    ep_size = args.ep_size or largest_ep_size(args.model, mesh.world_size())
    dispatch = full_name(args.dispatch)
    rows = bench_layer(args.model, args.tokens, ep_size, args.gate, dispatch, args.against is not None)
    present("layer", rows, command_line(args.words), Path(args.out))
    leave_group()
    return 0


def run_optimizer(args: argparse.Namespace) -> int:
    from moetrain.bench.optimizer import bench_optimizer

    bench_optimizer()
    return 0


PARTS: dict[str, Run] = {
    "model": run_model,
    "kernels": run_kernels,
    "attention": run_attention,
    "dispatch": run_dispatch,
    "layer": run_layer,
    "optimizer": run_optimizer,
}


def add_bench(verbs: Any, add_verb: Callable[..., argparse.ArgumentParser], run: Run) -> None:
    """Add the verb to the command line.

    Args:
        add_verb: makes a parser from verbs, name, function, description and examples.
        run: the function of every part: it starts ranks where `args.on_ranks` says so, and calls `run_bench`.
    """
    parts = verbs.add_parser(
        "bench",
        help="time a training step beside native Transformers, or a part of it",
        description="Time a training step of a published model, with random weights, or a part of it.",
        epilog="`moetrain bench MODEL --help` and `moetrain bench layer --help` show the options.",
    ).add_subparsers(title="what to time", required=True, metavar="MODEL | PART")

    def add(part: str, what: str, *examples: str) -> argparse.ArgumentParser:
        parser = add_verb(parts, part, run, what, *examples)
        parser.set_defaults(part=part, on_ranks=part in ("model", "dispatch", "layer"))
        return parser

    _add_model(add)
    sub = add(
        "kernels",
        "each kernel of the expert layer, on one GPU",
        "moetrain bench kernels",
        "moetrain bench kernels qwen3-30b-a3b-ep8 --against transformers",
    )
    sub.add_argument("models", nargs="*", metavar="MODEL", help="-epN behind it: one of N ranks' share (default: four)")
    _add_sizes(sub)
    _add_against(sub)

    sub = add(
        "attention",
        "attention by each backend that takes the case, on one GPU",
        "moetrain bench attention",
        'moetrain bench attention "gpt-oss-20b window" --against transformers',
    )
    sub.add_argument("cases", nargs="*", metavar="CASE", help="a wrong name lists all (default: all)")
    _add_sizes(sub)
    _add_against(sub)

    sub = add(
        "dispatch",
        "tokens to their experts and back: NVLink stores beside NCCL's collectives",
        "torchrun --nproc-per-node 8 -m moetrain bench dispatch",
        "moetrain bench dispatch gpt-oss-20b --processes 4",
    )
    sub.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=f"default: {DEFAULT_MODEL}")
    _add_sizes(sub)
    for size in ("--hidden", "--intermediate", "--experts", "--top-k"):
        sub.add_argument(size, type=positive, metavar="N", help="instead of the model's")
    _add_processes(sub)

    sub = add(
        "layer",
        "the layer behind its router by each way of reaching the experts: dispatch, experts, combine",
        "torchrun --nproc-per-node 8 -m moetrain bench layer --against transformers",
        "moetrain bench layer tiny --processes 2 --tokens 256    (no GPU needed)",
    )
    sub.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=f"default: {DEFAULT_MODEL}")
    _add_sizes(sub)
    _add_against(sub)
    sub.add_argument("--gate", choices=GATES[1:], default="random", help="how tokens choose experts (default: random)")
    sub.add_argument(
        "--ep-size", type=positive, metavar="N", help="ranks that share the experts (default: as many as can)"
    )
    sub.add_argument("--dispatch", default="auto", metavar="NAME", help="only this way (default: all that can run)")
    _add_processes(sub)

    add("optimizer", "the optimizer's step", "moetrain bench optimizer")


def _add_model(add: Callable[..., argparse.ArgumentParser]) -> None:
    sub = add(
        "model",
        "a whole step of a published model: forward, loss, backward, optimizer",
        "torchrun --nproc-per-node 8 -m moetrain bench qwen3-30b-a3b --against transformers",
        "moetrain bench qwen3-30b-a3b --processes 8 --batch 4 --activation-checkpointing full",
        "moetrain bench qwen3-30b-a3b --processes 1 --layers 8 --profile",
        "moetrain bench qwen3-30b-a3b --kernels te --dispatch deepep",
        "moetrain bench tiny --seq-len 256 --against transformers    (no GPU needed)",
    )
    sub.prog = "moetrain bench"
    sub.add_argument("model", metavar="MODEL", help=f"such as {DEFAULT_MODEL}; a wrong name lists all")
    _add_against(sub)
    sub.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences of a rank (default: 1)")
    sub.add_argument("--seq-len", type=positive, default=4096, metavar="N", help="tokens of a sequence (default: 4096)")
    sub.add_argument("--layers", type=positive, metavar="N", help="only the first N layers of the model")
    sub.add_argument("--gate", choices=GATES, default="learned", help="how tokens choose experts (default: learned)")
    sub.add_argument(
        "--ep-size", type=positive, metavar="N", help="ranks that share the experts (default: as many as can)"
    )
    sub.add_argument("--kernels", choices=KERNELS, default="auto", help="as model.kernels of a run (default: auto)")
    sub.add_argument("--dispatch", default="auto", metavar="NAME", help="as model.dispatch of a run (default: auto)")
    sub.add_argument("--activation-checkpointing", choices=CHECKPOINTING, default="none", help="default: none")
    sub.add_argument(
        "--checkpointed-layers", type=positive, metavar="N", help="of moetrain's, the first N (default: all)"
    )
    sub.add_argument("--graph", choices=("auto", "on", "off"), default="auto", help="CUDA graph (default: auto)")
    sub.add_argument(
        "--warmup", type=positive, default=10, metavar="N", help="steps before the timed ones (default: 10)"
    )
    sub.add_argument("--steps", type=positive, default=10, metavar="N", help="timed steps (default: 10)")
    sub.add_argument("--profile", action="store_true", help="also trace two steps: kernels by part, exposed exchange")
    _add_out(sub, "JSON, plot and trace")
    _add_processes(sub)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=positive, default=4096, metavar="N", help="of a rank (default: 4096)")
    _add_out(parser, "the table as JSON")


def _add_against(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", choices=("transformers",), help="measure native Transformers too")


def _add_out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"for {what} (default: {OUT})")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="ranks to start on this machine, unless torchrun or Slurm has (default: one a GPU, or one)",
    )
