"""Checks of the links: NCCL between the GPUs of a node, and between nodes in pairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.checks import RATES, blame, gpu_rates
from cluster.node import CRITICAL, FAILED, MEASURING_SECONDS, OK, UNKNOWN, WARNING, Node, Result, once, why

PORT = 19790
ROUNDS = 2
"""Partners that a node is measured with: slow with both, it is the node; slow with one, it is the other."""
ROUND_SECONDS = (40.0, 70.0)
"""Who waited for a dead partner in the first round comes late to the second, and is waited for."""


def check_all_reduce(node: Node) -> Result:
    """NCCL between the GPUs of this node."""
    if (gpus := len(gpu_rates(node))) < 2:
        return UNKNOWN, f"{gpus} GPU{'s' * (gpus != 1)} here"
    found = round(node_links(node)["bus_gb_per_second"], 1)
    expected = node.limits.all_reduce_gb_per_second
    return OK if found >= expected else CRITICAL, f"{found:.0f} GB/s, expected {expected:.0f}", {"gb_per_second": found}


def check_gpu_pairs(node: Node) -> Result:
    """NCCL from each GPU of this node to each other: a path that an all-reduce does not take is seen too."""
    if (gpus := len(gpu_rates(node))) < 2:
        return UNKNOWN, f"{gpus} GPU{'s' * (gpus != 1)} here"
    rates = [[round(rate, 1) for rate in row] for row in node_links(node)["pair_gb_per_second"]]
    expected = node.limits.gpu_pair_gb_per_second
    pairs = {(i, j): rates[i][j] for i in range(gpus) for j in range(gpus) if i != j}
    bad = [f"GPU {i} to {j}: {rate:.0f}" for (i, j), rate in pairs.items() if rate < expected]
    measured = {"gb_per_second": rates}
    if bad:
        return CRITICAL, f"{'; '.join(bad)} GB/s, expected {expected:.0f}", measured
    return OK, f"{min(pairs.values()):.0f} to {max(pairs.values()):.0f} GB/s between every two", measured


@once
def node_links(node: Node) -> dict[str, Any]:
    """What NCCL does between the GPUs of this node; raises as `gpu_rates` does."""
    gpus = len(gpu_rates(node))
    try:
        return measure("links", gpus, 0, gpus, "127.0.0.1", PORT, node.remaining(MEASURING_SECONDS))
    except FAILED as error:
        raise blame(node, error) from error


def check_pairs(node: Node) -> Result:
    """NCCL between this node and two others, one after the other; their clocks too."""
    gpus = len(gpu_rates(node))
    if not gpus:
        return UNKNOWN, "no GPU here"
    if len(node.peers) < 2:
        return UNKNOWN, "no other nodes; a job gives them with --peers"
    return judge_pairs([measure_pair(node, gpus, number) for number in range(min(ROUNDS, len(node.peers) - 1))], node)


@dataclass(frozen=True)
class Pair:
    """This node measured with another one; `failure` where there is no measurement."""

    partner: str
    gb_per_second: float = 0.0
    clock_skew_seconds: float = 0.0
    failure: str = ""


def partner_of(index: int, count: int, number: int) -> int | None:
    """With whom node `index` of `count` is paired in a round: everyone with everyone once, as in a tournament.

    None where the count is odd and the node sits out.
    """
    seats = count + count % 2
    last = seats - 1
    if index == last:
        found = number * (seats // 2) % last
    else:
        found = (number - index) % last
        found = last if found == index else found
    return found if found < count else None


def measure_pair(node: Node, gpus: int, number: int) -> Pair | None:
    """All GPUs of this node and of its partner of a round; None where it has none."""
    index = [name for name, _ in node.peers].index(node.name)
    other = partner_of(index, len(node.peers), number)
    if other is None:
        return None
    partner, first = node.peers[other][0], min(index, other)
    port = PORT + 1 + number * len(node.peers) + first
    try:
        seconds = node.remaining(ROUND_SECONDS[number])
        found = measure("all-reduce", gpus, 0 if index < other else gpus, 2 * gpus, node.peers[first][1], port, seconds)
    except FAILED as error:
        return Pair(partner, failure=why(error))
    return Pair(partner, found["bus_gb_per_second"], found["clock_skew_seconds"])


def judge_pairs(pairs: Sequence[Pair | None], node: Node) -> Result:
    """Critical where every partner is too slow or too far in time: then it is this node. One of several: a warning."""
    measured = [pair for pair in pairs if pair is not None]
    expected, skew = node.limits.pair_gb_per_second, node.limits.clock_skew_seconds
    good = [
        pair
        for pair in measured
        if not pair.failure and pair.gb_per_second >= expected and pair.clock_skew_seconds <= skew
    ]
    text = "; ".join(
        f"{pair.partner}: {pair.failure or f'{pair.gb_per_second:.0f} GB/s, {pair.clock_skew_seconds:.2f} s apart'}"
        for pair in measured
    )
    figures = {pair.partner: round(pair.gb_per_second, 1) for pair in measured if not pair.failure}
    if len(good) == len(measured):
        return OK, text, {"gb_per_second": figures}
    text += f"; expected {expected:.0f} GB/s and {skew:g} s"
    return WARNING if good else CRITICAL, text, {"gb_per_second": figures}


def measure(verb: str, ranks: int, first: int, world: int, address: str, port: int, seconds: float) -> dict[str, Any]:
    """One measurement by `world` ranks, of which `ranks` run here, from number `first` on.

    Returns what it measured (see `rates.py`), from the first rank that is here.

    Raises:
        subprocess.SubprocessError: a rank failed, or was not done within `seconds`.
    """
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(RATES), verb],
            env={**common, "RANK": str(first + local), "LOCAL_RANK": str(local)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for local in range(ranks)
    ]
    deadline = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, verb, stderr=errors)
    found: dict[str, Any] = json.loads(outputs[0][0])
    return found
