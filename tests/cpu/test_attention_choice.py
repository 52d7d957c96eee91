"""Which kernel a case gets, which models get this package's attention, and how that is explained."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from moetrain.attention import explain_attention, select_attention
from moetrain.backends import attention as backends
from moetrain.backends.attention import Case, choose_backend
from tests.families import build

GPU = torch.device("cuda", 0)
PLAIN = Case(GPU, torch.bfloat16, 128, 128)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the choice of kernels see an H100 with the libraries of torch 2.11."""
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)


@pytest.mark.parametrize(
    ("case", "backend", "reasons"),
    [
        (PLAIN, "cudnn", {}),
        (PLAIN._replace(sinks=True, head_dim=64, value_dim=64), "cudnn", {}),
        (PLAIN._replace(head_dim=192), "cudnn", {}),
        (PLAIN._replace(documents=True), "flash", {"cudnn": "documents"}),
        (PLAIN._replace(window=128, sinks=True), "flash", {"cudnn": "window"}),
        (PLAIN._replace(head_dim=192, documents=True), "flash", {"cudnn": "documents"}),
        (PLAIN._replace(head_dim=256, value_dim=256), "flash", {"cudnn": "head sizes"}),
        (PLAIN._replace(head_dim=512, value_dim=512), "torch", {"flash": "up to 256", "triton": "up to 128"}),
        (PLAIN._replace(head_dim=64), "triton", {"cudnn": "not larger", "flash": "not larger than keys"}),
        (PLAIN._replace(head_dim=20, value_dim=20), "torch", {"flash": "8 divides"}),
        (PLAIN._replace(dtype=torch.float32), "torch", {"cudnn": "float32", "flash": "float32"}),
        (PLAIN._replace(device=torch.device("cpu")), "torch", {"flash": "not cpu"}),
        (PLAIN._replace(special="dropout"), "torch", {"flash": "dropout"}),
    ],
    ids=str,
)
def test_kernel_of_a_case(case: Case, backend: str, reasons: dict[str, str], hopper: None) -> None:
    found, why = choose_backend(case)
    assert found == backend
    assert all(words in why[name] for name, words in reasons.items())


def test_kernel_follows_the_gpu_and_the_switches(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_backend(PLAIN) == ("flash", {"cudnn": "its backward is not deterministic"})
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    assert choose_backend(PLAIN)[0] == "flash"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(backends, "_capability", lambda device: (8, 0))
    assert choose_backend(PLAIN)[0] == "flash"
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    found, why = choose_backend(PLAIN)
    assert found == "torch" and why["flash"] == why["triton"] == "switched off by torch.backends.cuda.enable_flash_sdp"


def choose_for(model: PreTrainedModel, kernels: str = "auto") -> str:
    select_attention(model, kernels)
    return model.get_decoder().config._attn_implementation


def test_which_models_get_it(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    qwen = build("qwen3_moe").bfloat16()
    assert choose_for(qwen) == "sdpa"  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_for(qwen) == choose_for(qwen) == "moetrain" and len(qwen.model._forward_pre_hooks) == 1
    assert choose_for(build("deepseek_v32")) == "sdpa"  # an indexer reads the mask
    assert choose_for(build("gpt_oss").bfloat16()) == "moetrain"
    assert choose_for(build("gpt_oss")) == "eager"  # no kernel for float32
    assert choose_for(build("qwen3_moe", attn_implementation="eager")) == "eager"  # named by the user
    assert choose_for(qwen, "torch") == "sdpa"
    with pytest.raises(ValueError, match="TransformerEngine is not installed"):
        select_attention(qwen, "transformer_engine")
    assert "moetrain" not in str(qwen.config.to_dict())  # nothing of it in a saved configuration


def test_explanation(hopper: None) -> None:
    model = build("gpt_oss").bfloat16()
    own, _ = explain_attention(model)
    assert str(own) == "attention of 1 layers (window 6, head size 16, sinks): Transformers' eager"
    model.set_attn_implementation("moetrain")
    window, full = explain_attention(model, documents=True)
    assert (window.layers, window.backend) == (1, "torch") and "not cpu" in window.reasons["flash"]
    assert "full, head size 16, documents, sinks" in str(full)
