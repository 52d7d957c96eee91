"""One record a step -> console, metrics.jsonl, Prometheus, and other libraries' displays.

recorder.py     Metrics: what the trainer calls
records.py      the records, and the reader of metrics.jsonl
phases.py       where a rank's time goes
console.py      the lines on the terminal
file.py         metrics.jsonl
starts.py       how often a run was started
background.py   the thread of console and file
series.py       what Prometheus sees
endpoint.py     HTTP, TLS, passwords
sinks.py        TensorBoard, Weights & Biases
discovery.py    where Prometheus finds the ranks
device.py       times of work on the device; needs torch

metrics.jsonl holds one JSON object a line with a `kind`: `run` when a process starts writing (what is known of the
run), `step` (`StepRecord`), `eval` (`EvalRecord`) and `event` (a checkpoint, a restart, ...).
"""

from __future__ import annotations

from moetrain.metrics.recorder import Metrics
from moetrain.metrics.records import (
    FILE_NAME,
    PHASES,
    EvalRecord,
    Expectation,
    LayerLoads,
    Memory,
    StepRecord,
    bytes_text,
    iter_records,
    read_records,
)

__all__ = [
    "FILE_NAME",
    "PHASES",
    "EvalRecord",
    "Expectation",
    "LayerLoads",
    "Memory",
    "Metrics",
    "StepRecord",
    "bytes_text",
    "iter_records",
    "read_records",
]
