"""`python -m cluster.lab up | down | status`: the lab from a shell."""

from __future__ import annotations

import argparse
import sys
import time

from cluster import lab


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.lab", description="A real Slurm of 16 nodes on one machine."
    )
    parser.add_argument("verb", choices=("up", "down", "status"))
    parser.add_argument("--root", default=".lab", metavar="DIR", help="everything is written there (default: .lab)")
    parser.add_argument("--nodes", type=int, default=16, metavar="N")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of a node, by name only (default: 8)")
    args = parser.parse_args()
    begin = time.monotonic()
    if args.verb == "up":
        try:
            found = lab.up(args.root, args.nodes, args.gpus)
        except (ValueError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(found.run("sinfo"), end="")
        print(f"up in {time.monotonic() - begin:.1f} s; to use it:\n  export SLURM_CONF={found.root}/etc/slurm.conf")
        return 0
    earlier = lab.find(args.root)
    runs = earlier is not None and bool(lab.daemons(earlier))
    if earlier is not None and args.verb == "down":
        lab.down(earlier)
        lab.remove(earlier)
    if earlier is None or not runs:
        print(f"no lab runs in {args.root}")
        return 0 if args.verb == "down" else 1
    if args.verb == "status":
        print(earlier.run("sinfo") + earlier.run("squeue"), end="")
        return 0
    print(f"down in {time.monotonic() - begin:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
