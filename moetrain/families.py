"""What moetrain knows about model families: the one module that names them.

Almost everything is read from Transformers itself. A family is a mixture of experts that can be distributed when its
modeling file decorates the experts class with `@use_experts_implementation`; the decorator leaves attributes on every
instance, which is how the experts of a built model are found, and from them follow the plans that say what is sharded
over the expert ranks and over the FSDP ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

# Families that cannot match plain Transformers under expert parallelism, each with its reason.
UNSUPPORTED: dict[str, str] = {}

# Names under which configurations keep the number of experts of a layer.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# And the number of experts of a token.
TOP_KS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
# Switches that turn an expert count off.
MOE_SWITCHES = ("is_moe", "enable_moe_block")


class DecoratedFamilies(NamedTuple):
    """Families of the installed Transformers whose experts are decorated, by the way to load them."""

    causal_lm: dict[str, str]
    """Model type to class in `AutoModelForCausalLM`."""
    image_text_to_text: dict[str, str]
    """Model type to class in `AutoModelForImageTextToText`, where there is no causal LM."""
    unreachable: tuple[str, ...]
    """Packages of Transformers that neither auto class reaches."""


@cache
def decorated_families() -> DecoratedFamilies:
    """Find the decorated families from the sources of Transformers, importing no model (about 0.2 s, then cached)."""
    decorated = _decorated_packages()

    def members(mapping: dict[str, str]) -> dict[str, str]:
        return {key: name for key, name in mapping.items() if model_type_to_module_name(key) in decorated}

    causal_lm = members(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    image_text = members(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    reached = {model_type_to_module_name(key) for key in causal_lm | image_text}
    return DecoratedFamilies(
        causal_lm,
        {key: name for key, name in image_text.items() if key not in causal_lm},
        tuple(sorted(decorated - reached)),
    )


def _decorated_packages() -> frozenset[str]:
    """Packages under `transformers.models` with a modeling file that decorates an experts class."""
    spec = find_spec("transformers.models")
    assert spec is not None and spec.submodule_search_locations
    decorator = re.compile(r"^@use_experts_implementation", re.MULTILINE)
    files = Path(spec.submodule_search_locations[0]).glob("*/modeling_*.py")
    return frozenset(path.parent.name for path in files if decorator.search(path.read_text(encoding="utf-8")))


def check_supported(config: PretrainedConfig) -> None:
    """Raise a ValueError with the reason if the family is listed in `UNSUPPORTED`."""
    for model_type in (config.model_type, config.get_text_config().model_type):
        if model_type in UNSUPPORTED:
            raise ValueError(
                f"{model_type!r} does not work with moetrain, use plain Transformers: {UNSUPPORTED[model_type]}"
            )


def is_moe(config: PretrainedConfig) -> bool:
    """Whether the configuration asks for more than one expert in a layer, decorated or not."""
    text = config.get_text_config()
    if any(getattr(text, switch, True) is False for switch in MOE_SWITCHES):
        return False
    sections: tuple[Any, ...] = (text, getattr(text, "ffn_config", None))  # DBRX counts its experts in `ffn_config`
    counts = [getattr(section, name, None) for section in sections for name in EXPERT_COUNTS]
    return any(isinstance(count, int) and count > 1 for count in counts)


def correct_after_load(model: PreTrainedModel) -> None:
    """Repair in place what Transformers 5.23 gets wrong when it builds a family.

    The Mamba layers of nemotron_h clamp their time step to (`time_step_min`, inf) and ignore `time_step_limit`, which
    is (0, inf) in the released configurations: short steps are lengthened, and the logits change.
    """
    config = model.config.get_text_config()
    if config.model_type == "nemotron_h":
        mixers: list[Any] = [module for module in model.modules() if hasattr(module, "time_step_limit")]
        for mixer in mixers:
            mixer.time_step_limit = tuple(config.time_step_limit)


def experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every decorated experts class in the model, in module order."""
    marks = ("has_gate", "is_transposed", "num_experts")  # set by the decorator (num_experts by the class itself)
    return [(name, module) for name, module in model.named_modules() if all(hasattr(module, mark) for mark in marks)]


def outermost_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Transformers' checkpointable layers that are in no other one, in module order."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {part for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if layer not in inner]


def top_k_of(config: PretrainedConfig) -> int:
    """Experts of a token, from a text model's configuration. Raises LookupError where it has none."""
    for name in TOP_KS:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise LookupError(f"{config.model_type} has none of {', '.join(TOP_KS)}")


def fallback_reason(model: PreTrainedModel) -> str | None:
    """Why the model trains as plain Transformers with FSDP2, without expert parallelism; None if it need not."""
    if experts_modules(model):
        return None
    model_type = model.config.model_type
    if is_moe(model.config):
        return (
            f"{model_type!r} is a mixture of experts, but Transformers does not decorate its experts with "
            "@use_experts_implementation, so they cannot be distributed over ranks"
        )
    return f"{model_type!r} with this configuration is a dense model, it has no experts to distribute"


def ep_plan(model: nn.Module) -> dict[str, str]:
    """Expert-parallel plan for `DistributedConfig`: experts modules and their parameters, layer numbers as `*`.

    Read from the module tree. In Transformers 5.23 it equals the family's own plan for every causal LM but gemma4,
    whose plan also shards the dense MLP over the expert ranks: those hold different batches here.
    """
    plan: dict[str, str] = {}
    for name, module in experts_modules(model):
        pattern = replace_layer_number_by_wildcard(name)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.shape[0] != module.num_experts:
                raise ValueError(
                    f"{name}.{parameter_name} has shape {tuple(parameter.shape)}: its first dimension is not the "
                    f"{module.num_experts} experts, so it cannot be sharded over expert ranks."
                )
            plan[f"{pattern}.{parameter_name}"] = "grouped_gemm"
        plan[pattern] = "ep_dispatch_experts"
    return plan


def fsdp_plan(model: PreTrainedModel) -> dict[str, str]:
    """FSDP2 plan for `DistributedConfig`: the family's own rules that name a module, and those it misses.

    Transformers' default names `embed_tokens`, `layers.*` and `norm`. Families with other names (nemotron_h, jamba,
    lfm2_moe) would keep embeddings, final norm or head in the root group, which stays gathered for the whole step.
    """
    modules = {replace_layer_number_by_wildcard(name): module for name, module in model.named_modules()}
    plan = {name: style for name, style in model.fsdp_plan.items() if name in modules}
    derived = _derived_fsdp_plan(model, modules)
    plan |= {name: style for name, style in derived.items() if not _covered(name, plan)}
    if not any(style == "keep_full_weight" and name.split(".")[-1] == "norm" for name, style in plan.items()):
        # Transformers gathers the head with a norm of that name. Without one it goes to the root group, which stays
        # gathered: TRL reads the head's weight without calling it, and a shard's gradient would miss the other ranks.
        head = next((name for name, module in modules.items() if module is model.get_output_embeddings()), None)
        plan.pop(head or "", None)
    return plan


def _derived_fsdp_plan(model: PreTrainedModel, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Embeddings and layers are freed after use; the last norm and the head, where backward begins, are kept.

    `modules` maps names with `*` for layer numbers to modules. Only embeddings of the decoder itself are named:
    vision towers read the weight of a position embedding without calling the module, which would find it sharded.
    """
    layers = [name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)]
    decoder = list(model.get_decoder().children())
    embeddings = [module for module in decoder if isinstance(module, nn.Embedding)]
    tail = [_final_norm(model.get_decoder()), model.get_output_embeddings()]
    freed = [name for name in layers if not _inside(name, layers)]
    freed += [name for name, module in modules.items() if any(module is one for one in embeddings)]
    kept = [name for name, module in modules.items() if any(module is one for one in tail)]
    return dict.fromkeys(freed, "free_full_weight") | dict.fromkeys(kept, "keep_full_weight")


def _final_norm(decoder: nn.Module) -> nn.Module | None:
    """The first norm that a decoder registers after its layers."""
    children = list(decoder.named_children())
    lists = [i for i, (_, module) in enumerate(children) if isinstance(module, nn.ModuleList)]
    after = children[lists[0] + 1 :] if lists else []
    return next((module for name, module in after if "norm" in name), None)


def _inside(name: str, parents: Iterable[str]) -> bool:
    """Whether `name` is a submodule of one of `parents`."""
    return any(name.startswith(f"{parent}.") for parent in parents)


def _covered(name: str, plan: dict[str, str]) -> bool:
    """Whether a rule of `plan` names the module or one around it."""
    return name in plan or _inside(name, plan)
