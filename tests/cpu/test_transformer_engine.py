"""TransformerEngine: refused where it is missing, and the wiring of its modules with a fake of it."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain import attention as ours
from moetrain.backends import transformer_engine
from moetrain.data.isolation import isolate_documents
from moetrain.kernels.attention import attend_ref
from tests.cpu.test_data_isolation import LENGTHS, gradients, make, packed
from tests.families import build


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="TransformerEngine is installed")
def test_transformer_engine_is_refused_in_one_line() -> None:
    reason = transformer_engine.missing()
    assert reason and "\n" not in reason
    with pytest.raises(ValueError, match=r"not installed; pip install .* Or choose model\.kernels=auto"):
        transformer_engine.use_transformer_engine(build("qwen3_moe"))


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Modules with the signatures of TransformerEngine's, computed by torch: the wiring, none of its numbers. What was
    built of them, with its options."""
    built: list[tuple[str, dict[str, Any]]] = []

    def linear(in_features: int, out_features: int, **options: Any) -> nn.Module:
        built.append(("linear", options))
        return nn.Linear(in_features, out_features, bias=options["bias"], device=options["device"])

    def norm(shape: int, eps: float, dtype: torch.dtype, device: str, zero_centered_gamma: bool) -> nn.Module:
        built.append(("norm", {"centred": zero_centered_gamma}))
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(shape, device=device))
        module.forward = lambda x: nn.functional.rms_norm(
            x.float(), (shape,), module.weight.float() + zero_centered_gamma, eps
        )
        return module

    def dot_product(heads: int, kv_channels: int, **options: Any) -> Any:
        built.append(("attention", options))

        def forward(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
            rows = q.shape[0] // kwargs["max_seqlen_q"] if "max_seqlen_q" in kwargs else q.shape[0]
            q, k, v = (tensor.reshape(rows, -1, *tensor.shape[-2:]) for tensor in (q, k, v))
            left, _ = options["window_size"]
            window = None if left < 0 else left + 1
            documents = kwargs.get("cu_seqlens_q")
            scale = options["softmax_scale"]
            return attend_ref(q, k, v, scale=scale, window=window, cu_seqlens=documents).contiguous().flatten(2)

        return forward

    engine = types.SimpleNamespace(Linear=linear, RMSNorm=norm, DotProductAttention=dot_product)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.SimpleNamespace(pytorch=engine))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    monkeypatch.setattr(transformer_engine, "missing", lambda: None)
    transformer_engine._attention_module.cache_clear()
    return built


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "mixtral"])
def test_wiring_of_transformer_engine_with_a_fake_of_it(
    family: str, fake_engine: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer_engine, "HALF", (torch.float32,))  # no rounding that would flip a router
    model = make(family)
    _, batch = packed(LENGTHS)
    isolate_documents(model, max_documents=4)
    expected = model(**batch).logits
    weights = torch.randn_like(expected)
    wanted, names = gradients(model, (expected * weights).sum()), list(model.state_dict())
    monkeypatch.setattr(ours, "_on_gpu", lambda device, dtype: True)
    monkeypatch.setattr(ours, "choose_backend", lambda case, kernels: (kernels, {}))
    counts = transformer_engine.use_transformer_engine(model)
    assert transformer_engine.use_transformer_engine(model) == {"linear": 0, "norm": 0}  # a second call changes nothing
    model.get_decoder().set_attn_implementation(ours.NAMES["transformer_engine"])
    found = model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert list(model.state_dict()) == names
    got = gradients(model, (found * weights).sum())
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert (gradient - wanted[name]).norm() <= 5e-5 * wanted[name].norm() + 1e-6, name
    kinds = [kind for kind, _ in fake_engine]
    assert counts == {"linear": kinds.count("linear"), "norm": kinds.count("norm")}
    assert min(counts.values()) >= 4 and kinds.count("attention") == 1  # one for all layers of a kind
    centred = {options["centred"] for kind, options in fake_engine if kind == "norm"}
    assert centred == {family == "qwen3_next"}  # its norms multiply by 1 + weight
    options = next(options for kind, options in fake_engine if kind == "attention")
    assert options["qkv_format"] == "thd" and options["attn_mask_type"] == "padding_causal"
    assert options["window_size"] == ((5, 0) if family == "mixtral" else (-1, 0))


def test_what_counts_as_an_rms_norm() -> None:
    class Gated(nn.RMSNorm):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(x)

    class Other(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    kind = transformer_engine.rms_norm_kind
    assert kind(nn.RMSNorm(24, eps=1e-6)) is False
    for other in (nn.LayerNorm(24), nn.Linear(24, 24, bias=False), Gated(24, eps=1e-6), Other(24, eps=1e-6)):
        assert kind(other) is None
