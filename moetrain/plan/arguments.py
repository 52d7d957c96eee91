"""The arguments of `moetrain plan`. Imports nothing heavy: `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from moetrain.plan.constants import GPUS, RESTART_SECONDS, STORAGE_GB_S


def add_plan(verbs: Any, add: Callable[..., argparse.ArgumentParser], run: Callable[[argparse.Namespace], int]) -> None:
    """Add the verb to `verbs` by `add(verbs, name, run, what, *examples)`."""
    sub = add(
        verbs,
        "plan",
        run,
        "say what a run would take, from its configuration alone; code 1 if no layout fits",
        "moetrain plan my.yaml --nodes 16 --gpu h100-80gb",
        "moetrain plan --model nemotron-3-ultra-550b-a55b --nodes 16 --states bf16_stochastic --plot plan.png",
        "moetrain plan my.yaml --nodes 16 --simulate 37",
    )
    sub.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file of the run")
    sub.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, such as optim.lr=1e-5")
    sub.add_argument(
        "--model", metavar="NAME_OR_DIR", help="instead of CONFIG: a config.json's directory, a hub id, a name"
    )
    sub.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    sub.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    sub.add_argument("--gpu", default="h100-80gb", metavar="KIND", help=f"{', '.join(GPUS)} (default: h100-80gb)")
    sub.add_argument("--ep", default="auto", metavar="N", help="ranks that share the experts, or auto (default)")
    sub.add_argument("--replicas", default="auto", metavar="N", help="replicas of the sharded model, or auto (default)")
    sub.add_argument("--batch", default="auto", metavar="N", help="rows of a rank in one pass, or auto (default)")
    sub.add_argument("--checkpointing", default="auto", choices=("auto", "none", "selective", "full"))
    sub.add_argument("--seq-len", type=int, metavar="N", help="instead of data.seq_len")
    sub.add_argument("--states", metavar="KIND", help="instead of optim.states")
    sub.add_argument(
        "--storage", type=float, default=STORAGE_GB_S, metavar="GB/s", help="that a node writes (default: 2)"
    )
    sub.add_argument(
        "--restart", type=float, default=RESTART_SECONDS, metavar="S", help="from a stop on (default: 300)"
    )
    sub.add_argument("--top", type=int, default=5, metavar="N", help="layouts to show (default: 5)")
    sub.add_argument("--plot", metavar="FILE", help="draw memory and time as a PNG")
    sub.add_argument("--json", action="store_true", help="for programs")
    sub.add_argument("--simulate", type=int, metavar="RANK", help="run one rank alone, without network, and measure it")
    sub.add_argument("--steps", type=int, default=3, metavar="N", help="of the simulation (default: 3)")
