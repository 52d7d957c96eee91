"""`python -m monitoring.demo`: a simulated cluster with planted faults, for dashboards and alerts without GPUs."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from pathlib import Path

from monitoring.demo.faults import ALERT_OF, active, parse_fault, timetable
from monitoring.demo.run import Run, Shape
from monitoring.demo.server import Demo

WARM_UP, LASTS, PAUSE = 600.0, 2400.0, 1800.0
"""Seconds until the first fault of the timetable, of each fault, and between two."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m monitoring.demo", description=__doc__)
    parser.add_argument("--nodes", type=int, default=16, metavar="N")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    parser.add_argument("--step-seconds", type=float, default=4.0, metavar="S")
    parser.add_argument("--name", default="demo", help="of the run (default: demo)")
    parser.add_argument("--discovery", default="runs/demo/discovery", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="NAME[@BEGIN[-END]]",
        help=f"seconds after the start; may be repeated. Names: {', '.join(ALERT_OF)}",
    )
    parser.add_argument("--timetable", action="store_true", help="one fault after the other, each for 40 minutes")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X", help="everything X times faster (default: 1)")
    args = parser.parse_args()
    try:
        faults = [parse_fault(text) for text in args.fault]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if min(args.nodes, args.gpus, args.step_seconds, args.speed) <= 0:
        print("error: --nodes, --gpus, --step-seconds and --speed must be above 0", file=sys.stderr)
        return 2
    if args.timetable:
        faults += timetable(ALERT_OF, *(seconds / args.speed for seconds in (WARM_UP, LASTS, PAUSE)))
    shape = Shape(args.name, args.nodes, args.gpus, args.step_seconds)
    return serve(Run(shape, faults, time.time(), args.speed), Path(args.discovery), args.port)


def serve(run: Run, discovery: Path, port: int) -> int:
    """Until Ctrl-C or a TERM; faults are announced as they come and go."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        demo = Demo([run], discovery, port)
    except OSError as error:
        print(f"error: port {port} or {discovery}: {error.strerror}; take others, port 0 is any", file=sys.stderr)
        return 2
    shape = run.shape
    print(f"{shape.ranks} ranks on {shape.nodes} nodes at 127.0.0.1:{demo.port}, named in {discovery}", flush=True)
    known: frozenset[str] = frozenset()
    while not stop.wait(0.2):
        now = active(run.faults, demo.seconds)
        for name in sorted(now - known):
            print(f"{demo.seconds:7.0f} s  {name} begins, {ALERT_OF[name]} is to fire", flush=True)
        for name in sorted(known - now):
            print(f"{demo.seconds:7.0f} s  {name} ends", flush=True)
        known = now
    demo.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
