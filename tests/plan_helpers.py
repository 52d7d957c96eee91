"""What the tests of the plan share: a machine, a run, a layer of experts, units to be sharded."""

from __future__ import annotations

from typing import Any

import torch

from moetrain.auto import AutoModelForCausalLM
from moetrain.config import OptimConfig, RunConfig, parse_config
from moetrain.plan.constants import GPUS
from moetrain.plan.memory import Parameter, Unit, units_of
from moetrain.plan.trace import ExpertLayer
from tests.families import FAMILIES

H200 = GPUS["h200"]
QWEN_LAYER = ExpertLayer("experts", 128, tokens=4096, hidden=2048, top_k=8, token_bytes=2)


def run_of(path: str = "tiny", **sections: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {
        "output_dir": "plan",
        "model": {"path": path},
        "data": {"train": [{"path": "python:stdlib"}], "seq_len": 128},
        "train": {"steps": 1, "compile": "off"},
    }
    for section, values in sections.items():
        raw[section] = raw.get(section, {}) | values
    return parse_config(raw)


def tiny_units(family: str = "qwen3_moe", states: str = "bf16_stochastic") -> list[Unit]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16)
    return units_of(model, OptimConfig(states=states))


def two_units() -> list[Unit]:
    """A layer of 800 bytes and a head of 80, each over the ranks of a world."""
    layer = Unit(("layer",), [Parameter("layer.weight", (400,), 2, 4.0, False)], is_layer=True)
    head = Unit(("head",), [Parameter("head.weight", (40,), 2, 4.0, False)], freed=False)
    return [layer, head]
