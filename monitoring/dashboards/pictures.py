"""The pictures in the documents: an hour of 128 simulated ranks with planted faults, and a small run beside them.

python -m monitoring.dashboards.pictures docs/images
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from monitoring.dashboards import DASHBOARDS
from monitoring.dashboards.history import now, prometheus
from monitoring.dashboards.render import main as render
from monitoring.demo.faults import Fault
from monitoring.demo.run import Run, Shape

MINUTES = 60
LARGE, SMALL = Shape("large", nodes=16, gpus=8), Shape("small", nodes=2, gpus=8, step_seconds=3.2, layers=12)
STORY = (
    Fault("xid", 900),  # a GPU falls off its bus,
    Fault("rank-down", 900, 1020),
    Fault("restart-loop", 1020, 1030),  # so the run is started again
    Fault("dead-expert", 1500),
    Fault("straggler", 1800),  # and that GPU runs hot
    Fault("throttle", 1800),
    Fault("busy-expert", 2200),
)


def main(folder: Path) -> None:
    """Write `folder/dashboard-<name>.png`."""
    begin = now() - MINUTES * 60
    runs = [Run(LARGE, STORY, begin), Run(SMALL, (), begin, seed=1)]
    with tempfile.TemporaryDirectory() as scratch:
        pages = Path(scratch) / "pages"
        with prometheus(runs, begin, MINUTES * 60, Path(scratch)) as url:
            end = str(begin + MINUTES * 60)
            layer = str(LARGE.layers // 2)
            where = ["--prometheus", url, "--run", LARGE.name, "--layer", layer]
            render([*where, "--minutes", str(MINUTES), "--end", end, "--out", str(pages), "--png"])
        for name in DASHBOARDS:
            picture = folder / f"dashboard-{name}.png"
            picture.write_bytes((pages / f"{name}.png").read_bytes())
            print(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
