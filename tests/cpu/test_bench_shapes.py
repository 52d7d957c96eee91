"""Shapes that the benchmark knows: published sizes, models cut short, a rank's share of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain import cli
from moetrain.bench.shapes import LARGE, SHAPES, LayerShape, experts_module, layer_shape, model_config
from moetrain.config import ModelConfig
from moetrain.families import experts_modules
from moetrain.plan.shapes import meta_builder

# Billions, as the models' cards have them.
PUBLISHED = {
    "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.09,
    "nemotron-3-nano-30b-a3b": 31.58,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
    "deepseek-v3": 671.03,
}
TINY = [name for name in SHAPES if name.startswith("tiny")]


def meta_model(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_number(name: str) -> None:
    parameters = sum(parameter.numel() for parameter in meta_model(model_config(name)).parameters())
    assert round(parameters / 1e9, 2) == PUBLISHED[name]


def test_every_large_shape_has_a_published_number() -> None:
    assert set(SHAPES) == set(PUBLISHED) | set(TINY)


def test_the_published_shapes_have_the_published_size() -> None:
    for name, billions in (("nemotron-3-super-120b-a12b", 120.67), ("nemotron-3-ultra-550b-a55b", 549.3)):
        model = meta_builder(AutoConfig.for_model(**LARGE[name]), ModelConfig(path=name))()
        assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "layers", "with_experts"),
    [("qwen3-30b-a3b", 8, 8), ("nemotron-3-nano-30b-a3b", 7, 3), ("gpt-oss-20b", 3, 3), ("deepseek-v3", 5, 2)],
)
def test_a_model_is_cut_to_its_first_layers(name: str, layers: int, with_experts: int) -> None:
    model = meta_model(model_config(name, layers))
    assert len(model.model.layers) == layers
    assert len(experts_modules(model)) == with_experts


@pytest.mark.parametrize("layers", [0, 49])
def test_a_model_is_not_cut_to_what_it_does_not_have(layers: int) -> None:
    with pytest.raises(ValueError, match="qwen3-30b-a3b has 48 layers"):
        model_config("qwen3-30b-a3b", layers)


def test_layer_shapes() -> None:
    assert layer_shape("qwen3-30b-a3b-ep8") == LayerShape("qwen3-30b-a3b", 4096, 8, 16, 2048, 768)
    assert layer_shape("gpt-oss-20b", 512) == LayerShape("gpt-oss-20b", 512, 4, 32, 2880, 2880)
    assert layer_shape("nemotron-3-nano-30b-a3b") == LayerShape("nemotron-3-nano-30b-a3b", 4096, 6, 128, 2688, 1856)
    with pytest.raises(ValueError, match="7 ranks cannot share 128 experts"):
        layer_shape("qwen3-30b-a3b-ep7")


@pytest.mark.parametrize("name", TINY)
def test_an_experts_module_is_the_models_own(name: str) -> None:
    shape = layer_shape(f"{name}-ep2", 16)
    torch.manual_seed(0)
    module = experts_module(shape, "cpu")
    assert module.num_experts == 4 == next(module.parameters()).shape[0]
    x_TH = torch.randn(16, shape.hidden).bfloat16()
    index_TK = torch.rand(16, 4).topk(shape.top_k).indices
    weights_TK = torch.rand(16, shape.top_k).bfloat16()
    out_TH = module(x_TH, index_TK, weights_TK)
    module.config._experts_implementation = "eager"
    torch.testing.assert_close(out_TH, module(x_TH, index_TK, weights_TK), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("words", ["qwen3-30b", "layer qwen3-30b", "kernels qwen3-30b"])
def test_an_unknown_model_gets_the_nearest_names(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words.split()]) == 2
    printed = capsys.readouterr().err
    assert "did you mean qwen3-30b-a3b or qwen3-235b-a22b?" in printed and "gpt-oss-120b" in printed
