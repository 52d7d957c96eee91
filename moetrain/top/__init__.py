"""A run as it goes, in a terminal.

follow       metrics.jsonl as it grows -> Snapshot
prometheus   PromQL over HTTP -> Snapshot
snapshot     what is known at one moment, and what is wrong with it
view         Snapshot -> a screen, or a line where there is no terminal
watch        the loop
"""

from __future__ import annotations

from moetrain.top.watch import top

__all__ = ["top"]
