"""Models through this package's attention.

No kernel of a GPU runs here. Where a test asks for `kernels`, the operator's own reference stands in their place, which
goes through the same registries, masks, sinks and gradients.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from moetrain import attention as ours
from moetrain.attention import CausalMask, attention_cases, select_attention
from moetrain.backends.attention import Case
from moetrain.data.isolation import isolate_documents, packing_support
from tests.cpu.test_data_isolation import LENGTHS, gradients, make, packed
from tests.families import FAMILIES


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Pretend that the models are on a GPU, with the reference for its kernels; the cases that arrived, counted."""
    calls: dict[str, int] = {}

    def choose(case: Case, kernels: str = "auto") -> tuple[str, dict[str, str]]:
        calls[str(case)] = calls.get(str(case), 0) + 1
        return ("torch" if case.special else "reference"), {}

    monkeypatch.setattr(ours, "_on_gpu", lambda device, dtype: True)
    monkeypatch.setattr(ours, "choose_backend", choose)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_what_their_own_attention_gives(family: str, kernels: dict[str, int]) -> None:
    """Logits and gradients, plain and packed, with the reference for kernels; and each layer is what
    `attention_cases` says of it, without a dense mask."""
    model = make(family)
    decoder = model.get_decoder()
    if packing_support(model) or not decoder._supports_flash_attn:
        pytest.skip("keeps its own attention, or cannot be packed")
    _, batch = packed(LENGTHS)
    own = decoder.config._attn_implementation
    isolate_documents(model, max_documents=4)
    weights = torch.randn(model(**batch).logits.shape)
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for name in (own, ours.NAME):
        decoder.set_attn_implementation(name)
        for inputs in (batch, {"input_ids": batch["input_ids"]}):
            kernels.clear()
            logits = model(**inputs, use_cache=False).logits
            results.append((logits.detach(), gradients(model, (logits * weights).sum())))
            if name == ours.NAME:
                documents = "seq_idx" in inputs
                cases = attention_cases(decoder)
                assert kernels == {str(case._replace(documents=documents)): layers for case, layers in cases}
    for (logits, expected), (found_logits, found) in ((results[0], results[2]), (results[1], results[3])):
        torch.testing.assert_close(found_logits, logits, rtol=0, atol=1e-5 * logits.abs().max().item())
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (found[name] - gradient).abs().max().item()
            assert error <= 5e-5 * gradient.abs().max().item() + 1e-6, name
        assert "sinks" not in str(kernels) or any("sinks" in name and value.any() for name, value in found.items())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "granitemoe_swa"])
def test_on_a_cpu_nothing_changes(family: str) -> None:
    """To the bit: plain, padded, packed, and generation with a cache."""
    _, batch = packed(LENGTHS)
    padding = torch.ones(2, 16, dtype=torch.int64)
    padding[0, 11:] = 0
    results = []
    for name in (None, ours.NAME):
        model = make(family, name).eval()
        with torch.no_grad():
            plain = model(batch["input_ids"]).logits
            padded = model(batch["input_ids"], attention_mask=padding).logits
            text = model.generate(batch["input_ids"], max_new_tokens=8, do_sample=False, pad_token_id=0)
            restarting = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            packed_logits = isolate_documents(model)(**batch).logits
        results.append((plain, padded, text, restarting, packed_logits))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


class Layer(nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dropout": 0.5}, "dropout"),
        ({"position_bias": torch.zeros(1, 4, 16, 16)}, "position bias"),
        ({"output_attentions": True}, "weights"),
        ({"keys": 20}, "a cache"),
        ({"is_causal": False}, None),
        ({"attention_mask": torch.ones(2, 1, 16, 16, dtype=torch.bool)}, None),
    ],
)
def test_what_only_sdpa_computes_goes_there(
    changes: dict[str, Any], words: str | None, kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sdpa = Mock(return_value=("out", None))
    monkeypatch.setattr(ours, "sdpa_attention_forward", sdpa)
    options = {"keys": 16, "attention_mask": None, **changes}
    query, key = torch.randn(2, 4, 16, 8), torch.randn(2, 2, options.pop("keys"), 8)
    mask = options.pop("attention_mask")
    assert ours.attention("auto", Layer(), query, key, key, mask, scaling=0.3, sliding_window=4, **options)[0] == "out"
    (_, *tensors), kwargs = sdpa.call_args
    assert all(found is given for found, given in zip(tensors, (query, key, key, mask), strict=True))
    assert kwargs.items() >= {"scaling": 0.3, "sliding_window": 4}.items()
    assert all(kwargs[name] is value for name, value in options.items())
    assert (words is None and not kernels) or words in next(iter(kernels))


def test_a_soft_cap_goes_to_the_eager_function(kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """And it gets a mask that is added, even where there was none: eager knows no `is_causal`."""
    eager = Mock(return_value=(None, None))
    monkeypatch.setattr(sys.modules[__name__], "eager_attention_forward", eager, raising=False)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    for mask, causal in ((CausalMask(window=2), None), (None, None), (None, False)):
        ours.attention("auto", Layer(), query, key, key, mask, scaling=0.3, softcap=30.0, is_causal=causal)
    window, causal, both_ways = (call.args[4] for call in eager.call_args_list)
    assert window.shape == (2, 1, 5, 5) and torch.equal(window[1, 0] == 0, torch.ones(5, 5).tril().triu(-1).bool())
    assert torch.equal(causal[0, 0] == 0, torch.ones(5, 5).tril().bool()) and causal.min() < -1e38
    assert both_ways is None


def test_positions_are_not_looked_at(kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' look at positions reads the device. Nothing does where documents, or their absence, are known."""
    look = Mock(side_effect=ours._look_for_packing)
    monkeypatch.setattr(ours, "_look_for_packing", look)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    model = make("qwen3_moe").bfloat16()
    select_attention(model)
    _, batch = packed(LENGTHS)
    with torch.no_grad():
        model(batch["input_ids"], use_cache=False)
        assert look.call_count == 0
        model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        assert look.call_count == 1
        isolate_documents(model, max_documents=3)(**batch)
        assert look.call_count == 1
        model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        assert look.call_count == 2


def test_new_documents_in_the_same_tensor_are_seen(kernels: dict[str, int]) -> None:
    """As a captured step has them: the batch is copied into tensors that stay."""
    model = isolate_documents(make("qwen3_moe", ours.NAME), max_documents=4)
    _, batch = packed(((8, 8), (16,)))
    _, other = packed(LENGTHS)
    with torch.no_grad():
        expected = model(**other).logits
        model(**batch)
        for name in batch:
            batch[name].copy_(other[name])
        assert torch.equal(model(**batch).logits, expected)
