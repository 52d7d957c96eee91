"""Write json/*.json from the code: `python -m monitoring.dashboards`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monitoring.dashboards import DASHBOARDS, JSON


def text(model: dict[str, Any]) -> str:
    """A dashboard's file: keys sorted, so that a change shows as itself."""
    return json.dumps(model, indent=2, sort_keys=True, ensure_ascii=True) + "\n"


def write(folder: Path = JSON) -> list[Path]:
    """Write every dashboard to `folder`; the files."""
    paths = []
    for name, build in DASHBOARDS.items():
        path = folder / f"{name}.json"
        path.write_text(text(build()), encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write():
        print(written)
