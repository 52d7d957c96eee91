"""Checkpoints: checked before a run, written during it, exported after it.

source.py      a model directory is checked before a run
dropped.py     weights that Transformers does not load, kept for the export
export.py      a sharded model becomes a Hugging Face checkpoint       (plan.py: who writes what)
state.py       training checkpoints, to resume from                    (storage.py, rng.py)
export_run.py  a training checkpoint becomes a Hugging Face checkpoint
commit.py      how a directory appears at once, complete               (manifest.py: SHA-256 of its files)
format.py      the safetensors file format
"""

from moetrain.checkpoint.dropped import Dropped, find_dropped
from moetrain.checkpoint.export import save_hf
from moetrain.checkpoint.export_run import export_run
from moetrain.checkpoint.source import CheckpointInfo, check_checkpoint, verify_checksums
from moetrain.checkpoint.state import TrainState, find_latest, load_state, prune, save_state, set_aside

__all__ = [
    "CheckpointInfo",
    "Dropped",
    "TrainState",
    "check_checkpoint",
    "export_run",
    "find_dropped",
    "find_latest",
    "load_state",
    "prune",
    "save_hf",
    "save_state",
    "set_aside",
    "verify_checksums",
]
