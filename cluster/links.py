"""Checks of the links: NCCL between the GPUs of a node, and between nodes in pairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.checks import RATES, blame, gpu_rates
from cluster.node import CRITICAL, FAILED, OK, UNKNOWN, WARNING, Node, Result, why

PORT = 19790
ROUNDS = 2
"""Partners that a node is measured with: slow with both, it is the node; slow with one, it is the other."""
ROUND_SECONDS = (40.0, 70.0)
"""Who waited for a dead partner in the first round comes late to the second, and is waited for."""


def check_all_reduce(node: Node) -> Result:
    """NCCL between the GPUs of this node."""
    gpus = len(gpu_rates(node))
    if gpus < 2:
        return UNKNOWN, f"{gpus} GPU{'s' * (gpus != 1)} here"
    try:
        found = all_reduce(gpus, 0, gpus, "127.0.0.1", PORT, node.remaining())["bus_gb_per_second"]
    except FAILED as error:
        raise blame(node, error) from error
    expected = node.limits.all_reduce_gb_per_second
    return OK if found >= expected else CRITICAL, f"{found:.0f} GB/s, expected {expected:.0f}"


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
        seconds = min(node.remaining(), ROUND_SECONDS[number])
        found = all_reduce(gpus, 0 if index < other else gpus, 2 * gpus, node.peers[first][1], port, seconds)
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
    if len(good) == len(measured):
        return OK, text
    return (WARNING if good else CRITICAL), f"{text}; expected {expected:.0f} GB/s and {skew:g} s"


def all_reduce(ranks: int, first: int, world: int, address: str, port: int, seconds: float) -> dict[str, float]:
    """One all-reduce of `world` ranks, of which `ranks` run here, from number `first` on.

    Returns what it measured (see `rates.py`), from the first rank that is here.

    Raises:
        subprocess.SubprocessError: a rank failed, or was not done within `seconds`.
    """
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(RATES), "all-reduce"],
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
            raise subprocess.CalledProcessError(process.returncode, "all-reduce", stderr=errors)
    found: dict[str, float] = json.loads(outputs[0][0])
    return found
