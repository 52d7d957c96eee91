"""Training checkpoints in one process: what goes in comes out, and what they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from moetrain.checkpoint import check_checkpoint, export_run, find_dropped, load_state, save_hf, save_state
from tests.families import build, tiny


def trained(family: str = "mixtral", lr: float = 1e-3) -> tuple[Any, torch.optim.Optimizer]:
    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_states_that_are_no_json(tmp_path: Path) -> None:
    model, optimizer = trained()
    with pytest.raises(ValueError, match="data_state is no JSON value: Object of type Tensor"):
        save_state(tmp_path / "c", 1, model=model, optimizer=optimizer, data_state={"x": torch.ones(1)})
    with pytest.raises(ValueError, match="extra is no JSON value"):
        save_state(tmp_path / "c", 1, model=model, optimizer=optimizer, extra=object())
    assert not (tmp_path / "c").exists()


def test_scheduler_and_learning_rate_come_back(tmp_path: Path) -> None:
    model, optimizer = trained(lr=0.3)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    path = save_state(tmp_path, 1, model=model, optimizer=optimizer, scheduler=scheduler)
    model, optimizer = trained(lr=0.9)
    again = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    load_state(path, model=model, optimizer=optimizer, scheduler=again)
    assert again.state_dict() == scheduler.state_dict()
    assert optimizer.param_groups[0]["lr"] == 0.15 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("family", ["nemotron_h", "kimi_linear", "gpt_oss", "qwen4_exp", "zaya"])
@pytest.mark.parametrize("original_names", [True, False])
def test_exported_checkpoint_has_the_names_of_its_source(tmp_path: Path, family: str, original_names: bool) -> None:
    build(family).save_pretrained(tmp_path / "source", save_original_format=original_names)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    path = save_state(tmp_path / "c", 1, model=model, optimizer=torch.optim.SGD(model.parameters()))
    save_hf(model, tmp_path / "direct")
    export_run(path, tmp_path / "out", max_shard_bytes=30_000)
    direct, out = check_checkpoint(tmp_path / "direct"), check_checkpoint(tmp_path / "out")
    assert direct.tensors.keys() == out.tensors.keys() == check_checkpoint(tmp_path / "source").tensors.keys()
    for name, tensor in direct.tensors.items():
        other = out.tensors[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        pair = [(i.directory / t.file).read_bytes()[t.start : t.end] for i, t in ((direct, tensor), (out, other))]
        assert pair[0] == pair[1], name


def test_state_of_eight_bit_and_plain_numbers(tmp_path: Path) -> None:
    """Tensors of any type, and numbers beside them, come back as they were."""
    model, optimizer = trained()
    for parameter in model.parameters():
        optimizer.state[parameter] |= {"codes": torch.randint(0, 255, parameter.shape).byte(), "count": 7, "flag": True}
    path = save_state(tmp_path, 1, model=model, optimizer=optimizer)
    expected = {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    again, other = trained()
    for parameter in again.parameters():
        other.state[parameter] |= {"codes": torch.zeros(parameter.shape).byte(), "count": 0, "flag": False}
    load_state(path, model=again, optimizer=other)
    for name, parameter in again.named_parameters():
        for key, value in expected[name].items():
            got = other.state[parameter][key]
            assert (
                torch.equal(got, value)
                if isinstance(value, torch.Tensor)
                else got == value and type(got) is type(value)
            )


def quantise_fp8(directory: Path) -> dict[str, Any]:
    """Rewrite a checkpoint's projections as DeepSeek-V3's are published: FP8 with a scale for each 128 x 128 block."""
    weights = load_file(directory / "model.safetensors")
    for name in [name for name, tensor in weights.items() if name.endswith("proj.weight") and tensor.ndim == 2]:
        scale = weights[name].abs().max().view(1, 1) / 448
        weights |= {name: (weights[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    set_quantisation(
        directory, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    )
    return {"quantization_config": FineGrainedFP8Config(dequantize=True)}


def quantise_mxfp4(directory: Path) -> dict[str, Any]:
    """Rewrite a checkpoint's experts as GPT-OSS's are published: blocks of 32 FP4 values with a shared exponent."""
    weights = load_file(directory / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj")]:
        experts, rows, columns = weights.pop(name).shape
        shape = (experts, columns, rows // 32)
        weights[f"{name}_blocks"] = torch.randint(0, 255, (*shape, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(120, 128, shape, dtype=torch.uint8)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    set_quantisation(directory, {"quant_method": "mxfp4", "modules_to_not_convert": plain})
    return {"quantization_config": Mxfp4Config(dequantize=True)}


def set_quantisation(directory: Path, settings: dict[str, Any]) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize(
    ("config", "quantise"),
    [
        (tiny("deepseek_v3", num_key_value_heads=4), quantise_fp8),
        (tiny("gpt_oss", hidden_size=64, intermediate_size=64), quantise_mxfp4),
    ],
    ids=["fp8", "mxfp4"],
)
def test_model_of_quantised_weights_is_written_plain(tmp_path: Path, config: Any, quantise: Any) -> None:
    """Transformers 5.23's own save refuses the first and writes names that no model loads for the second."""
    plain = AutoModelForCausalLM.from_config(config)
    plain.save_pretrained(tmp_path / "source")
    plain.save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", **quantise(tmp_path / "source"))
    assert not find_dropped(model, check_checkpoint(tmp_path / "source")).tensors
    save_hf(model, tmp_path / "direct")
    path = save_state(tmp_path / "c", 1, model=model, optimizer=torch.optim.SGD(model.parameters()))
    export_run(path, tmp_path / "out")
    for name in ("direct", "out"):
        assert check_checkpoint(tmp_path / name).tensors.keys() == check_checkpoint(tmp_path / "plain").tensors.keys()
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for key, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), key
