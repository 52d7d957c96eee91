"""AdamW on sharded parameters, learning-rate schedules, and the gradient norm over any mix of meshes.

build.py       build_optimizer: which parameters, which decay, which states
adamw.py       AdamW: the states and the step
reference.py   its update by torch's operators (moetrain.kernels.adamw: by one kernel), 8-bit codes, stochastic rounding
norm.py        grad_norm, clip_factor, clip_grad_norm
schedule.py    build_scheduler, keep_settings

A model with expert parallelism has parameters on several device meshes, and torch's multi-tensor kernels refuse a list
that mixes them; their local shards are ordinary tensors and go together.
"""

from __future__ import annotations

from moetrain.optim.adamw import AdamW
from moetrain.optim.build import build_optimizer
from moetrain.optim.norm import clip_factor, clip_grad_norm, grad_norm
from moetrain.optim.reference import Quantiser, quantised_block, stochastic_round_
from moetrain.optim.schedule import build_scheduler, keep_settings

__all__ = [
    "AdamW",
    "Quantiser",
    "build_optimizer",
    "build_scheduler",
    "clip_factor",
    "clip_grad_norm",
    "grad_norm",
    "keep_settings",
    "quantised_block",
    "stochastic_round_",
]
