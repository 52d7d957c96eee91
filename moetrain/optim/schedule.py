"""The learning rate over a run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch.optim.lr_scheduler import LambdaLR

from moetrain.config import OptimConfig


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """Linear warm-up to `lr`, then the schedule down to `lr * min_lr_ratio` in the last of `steps` steps.

    Step k counts from 0. With w = max(warmup_steps, 1) - 1, the step that reaches the peak, the factor on `lr` is
    (k + 1) / warmup_steps up to w; after it, with t = (k - w) / (steps - 1 - w), it is r + (1 - r) (1 - t) for
    `linear`, r + (1 - r) (1 + cos(pi t)) / 2 for `cosine`, and 1 for `constant`.
    """
    peak = max(config.warmup_steps, 1) - 1

    def factor(step: int) -> float:
        if step < peak:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        progress = min((step - peak) / max(steps - 1 - peak, 1), 1.0)
        left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left

    return LambdaLR(optimizer, factor)


@torch.no_grad()
@contextlib.contextmanager
def keep_settings(optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> Iterator[None]:
    """Around the loading of their states: learning rate, betas, decay and the like stay those of this run's
    configuration, which may differ from the saved run's; what was learned and counted comes from the checkpoint."""
    counted = ("params", "updates")
    kept = [{key: value for key, value in group.items() if key not in counted} for group in optimizer.param_groups]
    yield
    scheduler.base_lrs = [settings["initial_lr"] for settings in kept]
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, settings, lr in zip(optimizer.param_groups, kept, scheduler._last_lr, strict=True):
        group.update(settings | {"lr": lr})
