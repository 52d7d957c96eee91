"""A packed row gives each document the logits and gradients that it has alone."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from moetrain.data.isolation import Documents, isolate_documents, packing_support, recurrent_mixers
from tests.families import FAMILIES, VOCAB, build

LENGTHS = ((5, 7, 4), (9, 1, 6))  # longer and shorter than the sliding window of 6, and a single token
REFUSED = {"deepseek_v4", "inkling", "inkling2", "minimax_m3_vl", "qwen4_exp"}  # model types, without "_text"


def packed(lengths: tuple[tuple[int, ...], ...]) -> tuple[list[list[torch.Tensor]], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randint(3, VOCAB, (n,), generator=generator) for n in row] for row in lengths]
    batch = {
        "input_ids": torch.stack([torch.cat(row) for row in rows]),
        "position_ids": torch.stack([torch.cat([torch.arange(len(doc)) for doc in row]) for row in rows]),
        "seq_idx": torch.stack(
            [torch.cat([torch.full((len(doc),), i, dtype=torch.int32) for i, doc in enumerate(row)]) for row in rows]
        ),
    }
    return rows, batch


def make(family: str, attention: str | None = None) -> PreTrainedModel:
    model = build(family) if attention is None else build(family, attn_implementation=attention)
    for part in (model.config, *model.modules()):
        if hasattr(part, "index_topk"):
            part.index_topk = 64  # select every key: random indexers tie, and ties fall differently in a longer row
    return model.eval() if family == "phimoe" else model  # phimoe's router is random in training


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_isolated(model: PreTrainedModel, lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> None:
    rows, batch = packed(lengths)
    logits = model(**batch).logits
    alone = torch.stack([torch.cat([model(doc[None], use_cache=False).logits[0] for doc in row]) for row in rows])
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5 * alone.abs().max().item())
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    expected = gradients(model, (alone * weights).sum())
    found = gradients(model, (logits * weights).sum())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-5 * gradient.abs().max().item() + 1e-6
        assert (found[name] - gradient).abs().max().item() <= tolerance, name


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, None) for family in FAMILIES]
    + [(family, "eager") for family in ("qwen3_moe", "nemotron_h", "qwen3_next")],
)
def test_documents_of_a_packed_row_are_as_alone(family: str, attention: str | None) -> None:
    model = make(family, attention)
    model_type = model.config.get_text_config().model_type
    if model_type.removesuffix("_text") in REFUSED:
        assert model_type in str(packing_support(model))
        with pytest.raises(ValueError, match="packing=false"):
            isolate_documents(model)
        return
    assert packing_support(model) is None
    assert_isolated(isolate_documents(isolate_documents(model)))  # a second call changes nothing


@pytest.mark.parametrize(
    ("family", "leaks"), [("qwen3_moe", False), ("gpt_oss", True), ("nemotron_h", True), ("qwen3_next", True)]
)
def test_what_transformers_isolates_alone(family: str, leaks: bool) -> None:
    """Holds the facts that `isolate_documents` rests on: a leak that is gone can be taken out of it."""
    rows, batch = packed(((8, 8),))
    model = make(family, "eager")
    del batch["seq_idx"]
    with torch.no_grad():
        second = model(**batch, use_cache=False).logits[0, 8:]
        alone = model(rows[0][1][None], use_cache=False).logits[0]
        assert torch.allclose(second, alone, atol=1e-4) is not leaks
        cached = model(**batch, use_cache=True).logits[0, 8:]
        assert not torch.allclose(cached, alone, atol=1e-4), "a cache turns the document mask off"


def test_recomputed_layers_see_the_same_documents() -> None:
    model = isolate_documents(make("nemotron_h", "sdpa"))
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_isolated(model)


def test_a_batch_without_documents_runs_as_before() -> None:
    plain, isolated = make("qwen3_next", "sdpa"), isolate_documents(make("qwen3_next", "sdpa"))
    _, batch = packed(LENGTHS)
    ids = batch["input_ids"]
    with torch.no_grad():
        isolated(**batch)
        assert torch.equal(isolated(ids).logits, plain(ids).logits)
        padding = torch.ones_like(ids)
        padding[:, -3:] = 0
        assert torch.equal(isolated(ids, attention_mask=padding).logits, plain(ids, attention_mask=padding).logits)


def test_another_model_is_not_masked_by_the_first() -> None:
    plain = make("gpt_oss", "eager")
    _, batch = packed(LENGTHS)
    with torch.no_grad():
        before = plain(batch["input_ids"]).logits
        isolate_documents(make("gpt_oss", "eager"))(**batch)
        assert torch.equal(plain(batch["input_ids"]).logits, before)
        with pytest.raises(ValueError, match="attention_mask"):
            isolate_documents(make("gpt_oss", "eager"))(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
        assert torch.equal(plain(batch["input_ids"]).logits, before)


def test_flash_attention_gets_the_lengths_that_transformers_computes() -> None:
    """Over the whole batch: Transformers does so by itself for one row only."""
    _, batch = packed(((5, 7, 4), (9, 1, 6), (16,)))
    found = Documents(batch["seq_idx"]).flash_kwargs()
    (cu_q, cu_k), (longest_q, longest_k) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert torch.equal(found["cu_seq_lens_q"], cu_q) and torch.equal(found["cu_seq_lens_k"], cu_k)
    assert (found["max_length_q"], found["max_length_k"]) == (longest_q, longest_k)


def test_an_attention_without_document_mask_is_refused() -> None:
    model = make("qwen3_moe", "sdpa")
    model.config._attn_implementation = "somebodys_attention"
    assert "somebodys_attention" in str(packing_support(model))


def test_unknown_recurrent_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("qwen3_next", "sdpa")
    monkeypatch.setattr("moetrain.data.isolation.recurrent_mixers", lambda model: [])
    assert "linear_attention" in str(packing_support(model))


def test_mamba_kernels_get_seq_idx_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("nemotron_h", "sdpa")
    (mixer,) = recurrent_mixers(model)
    calls: list[dict] = []

    def kernel(hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        calls.append(kwargs | {"shape": hidden_states.shape[:2]})
        return hidden_states

    monkeypatch.setattr(mixer, "forward", kernel)
    monkeypatch.setattr("moetrain.data.isolation._is_recurrent", lambda module: module is mixer)
    isolate_documents(model)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "moetrain.backends.mamba.find_spec",
        lambda name: real("torch") if name in ("mamba_ssm", "causal_conv1d") else real(name),
    )
    _, batch = packed(LENGTHS)
    model(**batch)
    assert len(calls) == 1 and calls[0]["shape"] == (2, 16) and torch.equal(calls[0]["seq_idx"], batch["seq_idx"])
