"""The auto classes in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM as PlainAutoModelForCausalLM
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

from moetrain import AutoModelForCausalLM
from moetrain.families import correct_after_load
from tests.families import FAMILIES, batch, build


def test_it_is_the_real_class(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert isinstance(model, Qwen3MoeForCausalLM)
    assert isinstance(model, PreTrainedModel)
    assert model.config._experts_implementation == "moetrain"
    model.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved["architectures"] == ["Qwen3MoeForCausalLM"]
    assert "moetrain" not in json.dumps(saved)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h+latent"])
@pytest.mark.parametrize("experts", ["moetrain", "eager"])
def test_equals_plain_eager(family: str, experts: str, tmp_path: Path) -> None:
    plain = build(family)
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation=experts).train()
    correct_after_load(plain)  # see `test_time_step_limit_is_the_configuration_s`
    plain.set_experts_implementation("eager")
    for each in (plain, model):
        each(**batch(0), use_cache=False).loss.backward()
    ours = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_time_step_limit_is_the_configuration_s(tmp_path: Path) -> None:
    config = FAMILIES["nemotron_h"]()
    config.time_step_limit = (0.002, 7.0)
    PlainAutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    limits = {module.time_step_limit for module in model.modules() if hasattr(module, "time_step_limit")}
    assert limits == {(0.002, 7.0)}


def test_from_config_is_ready_to_train() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["mixtral"](), dtype=torch.float32).train()
    assert model.config._experts_implementation == "moetrain"
    model(**batch(0), use_cache=False).loss.backward()


def test_remote_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    """Code from a model directory runs only when asked for; the file below would leave a trace."""
    trace = tmp_path / "ran"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not trace.exists()
