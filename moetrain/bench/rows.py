"""The tables of `moetrain bench kernels | dispatch | layer`: one line for each part."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moetrain import mesh

ON_CPU = "Measured on a CPU: this checks that it runs, and tells nothing of GPUs."


@dataclass(frozen=True)
class Row:
    """One line of the table. `rate` is in TFLOP/s or GB/s, `share` its part of the limit measured in the same run."""

    shape: str
    part: str
    ms: float
    rate: float
    unit: str
    share: float


def format_table(rows: Sequence[Row]) -> str:
    widths = [max(len(getattr(row, column)) for row in rows) + 2 for column in ("shape", "part")]
    lines = [f"{'shape':<{widths[0]}}{'part':<{widths[1]}}{'ms':>9}{'rate':>9} {'':<8}{'share':>7}"]
    for row in rows:
        lines.append(
            f"{row.shape:<{widths[0]}}{row.part:<{widths[1]}}{row.ms:>9.4f}{row.rate:>9.0f} {row.unit:<8}"
            f"{100 * row.share:>6.0f}%"
        )
    return "\n".join(lines)


def command_line(words: Sequence[str]) -> str:
    """What a user typed, for the record, from the arguments of `moetrain`."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    start = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} -m moetrain" if by_torchrun else "moetrain"
    return f"{start} {shlex.join(words)}"


def present(name: str, rows: Sequence[Row], about: str, out: Path | None) -> None:
    """On rank 0: print the table under the machine that it is from and `about`, the command or the setting, and write
    it to `out`/`name`.json too."""
    if mesh.rank() != 0:
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{mesh.world_size()} x {gpu}, torch {torch.__version__}, {about}")
    print(format_table(rows))
    if gpu == "CPU":
        print(ON_CPU)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    found = {"gpu": gpu, "world": mesh.world_size(), "torch": torch.__version__, "about": about}
    file = out / f"{name}.json"
    file.write_text(json.dumps(found | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {file}")
