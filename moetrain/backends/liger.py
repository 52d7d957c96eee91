"""Liger's fused norms, rotary embedding and MLP for models that have no experts to speed up (GPU only)."""

from __future__ import annotations

import importlib.util

import torch
from transformers import PreTrainedModel


def apply_liger(model: PreTrainedModel) -> bool:
    """Swap in Liger's kernels where they are installed, a GPU is there and Liger knows the family; whether it did.

    Liger's own fused loss is left out: this package has one for every family.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)
    return True
