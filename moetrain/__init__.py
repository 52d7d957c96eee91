"""Fine-tune Mixture-of-Experts models of Transformers with one changed import.

from moetrain import AutoModelForCausalLM, DistributedConfig
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AutoModelForCausalLM", "AutoModelForImageTextToText", "DistributedConfig", "__version__"]

if TYPE_CHECKING:
    from transformers.distributed import DistributedConfig

    from moetrain.auto import AutoModelForCausalLM, AutoModelForImageTextToText


for _name in ("torchao", "torch.utils._pytree"):
    # Transformers imports torchao, which warns of each of its libraries that is made for another GPU
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    # Transformers takes seconds to import, and `moetrain --help` needs none of it
    if name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        from moetrain import auto

        return getattr(auto, name)
    if name == "DistributedConfig":
        from transformers.distributed import DistributedConfig

        return DistributedConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
