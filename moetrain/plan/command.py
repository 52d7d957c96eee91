"""`moetrain plan`: from its arguments to what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import get_console
from rich.console import Console

from moetrain.config import RunConfig, _apply_override, load_config, parse_config
from moetrain.plan.layout import Choices
from moetrain.plan.search import Machine, make_plan
from moetrain.plan.show import as_json, draw_plan, print_plan
from moetrain.plan.simulate import simulate

DOES_NOT_FIT = 1
"""Exit code where no layout fits."""


def run(args: argparse.Namespace) -> int:
    """Plan, or simulate one rank; returns the exit code.

    Raises:
        ValueError: what was asked for is wrong; the message says how to mend it.
    """
    for flag in ("nodes", "gpus_per_node", "top", "steps"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}")
    if min(args.storage, args.restart) <= 0:
        raise ValueError("--storage and --restart must be above 0")
    config = run_config(args.config, args.model, args.overrides, args.seq_len, args.states)
    machine = Machine(args.nodes, args.gpus_per_node, args.gpu, args.storage, args.restart)
    choices = Choices(_size(args.ep, "--ep"), _size(args.replicas, "--replicas"), _size(args.batch, "--batch"))
    choices = replace(choices, checkpointing=None if args.checkpointing == "auto" else args.checkpointing)
    if args.simulate is not None:
        result = simulate(config, machine, choices, rank=args.simulate, steps=args.steps)
        print(
            json.dumps(result) if args.json else "\n".join(f"{name}: {_shown(value)}" for name, value in result.items())
        )
        return 0
    console = Console(stderr=True)
    with console.status("") as status:
        plan = make_plan(config, machine, choices, args.top, status.update)
    if args.json:
        print(json.dumps(as_json(plan)))
    else:
        print_plan(plan, get_console())
    if args.plot is not None:
        draw_plan(plan, Path(args.plot))
        console.print(f"wrote {args.plot}")
    return 0 if plan.fitting else DOES_NOT_FIT


def run_config(
    path: str | None, model: str | None, overrides: Sequence[str], seq_len: int | None, states: str | None
) -> RunConfig:
    """The run that is planned.

    Args:
        path: YAML file; None with `model`. An override may stand in its place then.
        model: directory with a `config.json`, hub id, or a published model's name.

    Raises:
        ValueError: neither or both are given, or one of them is wrong.
    """
    overrides = list(overrides)
    if model is not None and path is not None and "=" in path:
        overrides.insert(0, path)
        path = None
    if (path is None) == (model is None):
        raise ValueError("moetrain plan takes a run's YAML file or --model, one of them")
    overrides += [f"data.seq_len={seq_len}"] if seq_len else []
    overrides += [f"optim.states={states}"] if states else []
    if path is not None:
        return load_config(path, overrides)
    raw: dict[str, Any] = {
        "output_dir": "plan",
        "model": {"path": model},
        "data": {"train": [{"path": "python:stdlib"}]},
        "train": {"steps": 1},
    }
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw)


def _shown(value: Any) -> str:
    if value is None:
        return "not measured here"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(text: str, flag: str) -> int | None:
    """None for `auto`."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{flag} takes a number or auto, not {text!r}")
    return int(text)
