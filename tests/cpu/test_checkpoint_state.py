"""Training checkpoints in one process: what goes in comes out, and what they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from moetrain.checkpoint import check_checkpoint, export_run, load_state, save_hf, save_state
from tests.families import FAMILIES, build


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
    assert family in FAMILIES
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
