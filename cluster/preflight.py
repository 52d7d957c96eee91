"""Is this node fit to train? A table of small checks, as a Slurm prolog or a job's first step, in at most 3 minutes.

    python -m cluster.preflight --site cluster/site.toml          all checks, as text
    python -m cluster.preflight --site cluster/site.toml --json   for programs: with every figure that was measured
    python -m cluster.preflight --quick                           what takes seconds and no GPU memory: for a prolog

It ends with 0 (ok), 1 (warning), 2 (critical) or 3 (unknown), as Nagios plugins do: critical where any check is, else
warning where any is, else unknown where anything could not be checked. A check never says ok of what it did not see.

It needs Python 3.11 and, for the rates, torch; nothing else. The directory `cluster` can be copied to where nodes look
for prologs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NoReturn

from cluster import checks, links
from cluster.node import CRITICAL, FAILED, OK, UNKNOWN, WARNING, Broken, Measured, Node, Result, Status, read_site, why

DEADLINE_SECONDS = 170.0
"""All checks together; one that is not reached by then is critical."""

Check = Callable[[Node], Result]

CHECKS: dict[str, Check] = {
    "gpus": checks.check_gpus,
    "ecc": checks.check_ecc,
    "xid": checks.check_xid,
    "clocks": checks.check_clocks,
    "nvlink": checks.check_nvlink,
    "infiniband": checks.check_infiniband,
    "gdrcopy": checks.check_gdrcopy,
    "disk": checks.check_disk,
    "clock": checks.check_clock,
    "image": checks.check_image,
    "memory": checks.check_memory,
    "gemm": checks.check_gemm,
    "all_reduce": links.check_all_reduce,
    "gpu_pairs": links.check_gpu_pairs,
    "pairs": links.check_pairs,
}
SLOW = frozenset({"image", "memory", "gemm", "all_reduce", "gpu_pairs", "pairs"})


@dataclass(frozen=True)
class Finding:
    check: str
    status: Status
    text: str
    seconds: float = 0.0
    measured: Measured = field(default_factory=dict)


def examine(node: Node, names: Sequence[str]) -> list[Finding]:
    """Run checks in order. One that cannot be made is unknown, or critical where the node itself is why."""
    findings = []
    for name in names:
        begin = time.monotonic()
        measured: Measured = {}
        try:
            if begin >= node.deadline:
                status, text = CRITICAL, f"not reached within {DEADLINE_SECONDS:.0f} s"
            else:
                found = CHECKS[name](node)
                status, text, measured = found if len(found) == 3 else (*found, measured)
        except Broken as error:
            status, text = CRITICAL, str(error)
        except (*FAILED, ValueError, LookupError) as error:  # a tool is missing or speaks in a way that we do not know
            status, text = UNKNOWN, why(error)
        findings.append(Finding(name, status, text, round(time.monotonic() - begin, 2), measured))
    return findings


def overall(findings: Sequence[Finding]) -> Status:
    """The worst of them: critical, then warning, then unknown, then ok."""
    return max((finding.status for finding in findings), key=(OK, UNKNOWN, WARNING, CRITICAL).index, default=UNKNOWN)


class _Parser(argparse.ArgumentParser):
    """Wrong flags say nothing of the node; argparse's own code 2 would."""

    def error(self, message: str) -> NoReturn:
        self.exit(int(UNKNOWN), f"{self.format_usage()}{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="preflight", description="Is this node fit to train?")
    parser.add_argument("--site", metavar="FILE", help="site file with the limits; without it those of 8 x H100 SXM")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--quick", action="store_true", help="leave out what takes more than seconds or GPU memory")
    parser.add_argument("--peers", default="", metavar="NAME=ADDRESS,...", help="all nodes of the job, to be paired")
    parser.add_argument("--image", metavar="FILE=SHA256", help="image and its hash, in place of the site file's")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"some of: {' '.join(CHECKS)} (default: all)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.checks if name not in CHECKS]:
        parser.error(f"no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    try:
        node = read_site(args.site) if args.site else Node()
    except ValueError as error:
        parser.error(str(error))
    if args.image:
        image, _, sha256 = args.image.partition("=")
        node = replace(node, image=image, image_sha256=sha256)
    name = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    peers = tuple((peer.partition("=")[0], peer.partition("=")[2]) for peer in args.peers.split(",") if peer)
    node = replace(node, name=name, peers=peers, deadline=time.monotonic() + DEADLINE_SECONDS)
    findings = examine(node, args.checks or [check for check in CHECKS if not (args.quick and check in SLOW)])
    worst = overall(findings)
    if args.json:
        rows = [asdict(finding) | {"status": finding.status.name.lower()} for finding in findings]
        print(json.dumps({"node": name, "status": worst.name.lower(), "findings": rows}))
    else:
        for finding in findings:
            print(f"{finding.status.name:<8} {finding.check:<10} {finding.text}")
        print(f"{worst.name:<8} {name}")
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
