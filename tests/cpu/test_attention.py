"""Attention: its formulas, what a mask is taken for, which kernel a case gets, and models through it.

No kernel of a GPU runs here. Where a test says so, the operator's own reference stands in their place, which goes
through the same registries, masks, sinks and gradients.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, masking_utils

from moetrain import attention as ours
from moetrain.attention import CausalMask, attention_cases, explain_attention, recognise, select_attention
from moetrain.backends import attention as backends
from moetrain.backends import transformer_engine
from moetrain.backends.attention import Case, choose_backend
from moetrain.bench.attention import CASES, document_lengths, visible_pairs
from moetrain.data.isolation import Documents, isolate_documents, packing_support
from moetrain.kernels import attention as kernel
from moetrain.kernels.attention import attend_ref, visible_keys
from moetrain.tape import keep_received
from tests.attention_cases import Problem, check_attention, cumulative, random_leaves, run
from tests.cpu.test_data_isolation import LENGTHS, gradients, make, packed
from tests.families import FAMILIES, build
from tests.interpreted import run_interpreted

GPU = torch.device("cuda", 0)
PROBLEMS = {
    "plain": Problem(2, 13, 4, 2, 8, 8),
    "every head its own": Problem(1, 9, 3, 3, 8, 8),
    "smaller values": Problem(2, 7, 4, 2, 16, 8),
    "window": Problem(2, 13, 4, 1, 8, 8, window=5),
    "narrow window": Problem(1, 6, 2, 1, 8, 8, window=2),
    "sinks": Problem(2, 13, 4, 2, 8, 8, sinks=True),
    "documents": Problem(2, 13, 4, 2, 8, 8, documents=(3, 1, 9, 13, 0, 0)),
    "all": Problem(2, 13, 4, 2, 8, 8, window=3, documents=(6, 7, 1, 12, 0), sinks=True),
}


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


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the choice of kernels see an H100 with the libraries of torch 2.11."""
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)


@pytest.mark.parametrize("name", PROBLEMS)
def test_formulas_of_the_kernels(name: str) -> None:
    check_attention(PROBLEMS[name], "reference", torch.float64, "cpu", 1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputation_takes_what_was_kept(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention runs once though its layer runs twice, in compiled code too, and the gradients are those of without."""
    calls = []
    reference = kernel._FORWARD["reference"]

    def counted(*args: Any) -> Any:
        calls.append(1)
        return reference(*args)

    monkeypatch.setitem(kernel._FORWARD, "reference", counted)

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        q, k, v = (x @ weight).view(2, 9, 3, 4, 8).unbind(2)
        return kernel.attend(q, k, v, "reference", scale=0.3, keep=True).flatten(2).sin()

    x, weight = torch.randn(2, 9, 32, requires_grad=True), torch.randn(32, 96, requires_grad=True)
    plain = layer(x, weight)
    expected = [plain, *torch.autograd.grad(plain.square().sum(), (x, weight))]
    calls.clear()
    function = torch.compile(layer, backend="aot_eager") if compiled else layer
    out = checkpoint(function, x, weight, use_reentrant=False, context_fn=keep_received)
    found = [out, *torch.autograd.grad(out.square().sum(), (x, weight))]
    assert len(calls) == 1
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_operator_is_what_torch_expects_of_one(name: str) -> None:
    """Its shapes without data, its autograd, and what torch.compile makes of it."""
    problem = PROBLEMS[name]
    leaves = random_leaves(problem, torch.float32, "cpu")
    documents = None if problem.documents is None else cumulative(problem.documents, "cpu")
    tensors = [*(leaf.transpose(1, 2) for leaf in leaves[:3]), leaves[3] if problem.sinks else None, documents]
    torch.library.opcheck(torch.ops.moetrain.attention, (*tensors, 0.3, problem.window, "reference", True))
    compiled = torch.compile(
        lambda *leaves: run(problem, list(leaves), "reference"), fullgraph=True, backend="aot_eager"
    )
    results = []
    for function in (compiled, lambda *leaves: run(problem, list(leaves), "reference")):
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_of_sinks_under_the_interpreter() -> None:
    run_interpreted("-m", "tests.attention_cases")


def taken_as(**kwargs: object) -> CausalMask | None:
    """What a mask that Transformers makes for a model of `kwargs` is taken for; None: a dense mask."""
    seen: list[CausalMask | None] = []

    def note(mask_function: object, **_: object) -> None:
        seen.append(recognise(mask_function))

    config = build("mixtral").config
    for name in ("sliding_window", "attention_chunk_size", "is_causal"):
        if name in kwargs:
            setattr(config, name, kwargs.pop(name))
    maker = kwargs.pop("maker", masking_utils.create_causal_mask)
    masking_utils.AttentionMaskInterface.register("noted", note)
    config._attn_implementation = "noted"
    try:
        maker(config, torch.zeros(2, 8, 4), None, past_key_values=None, **kwargs)
    finally:
        del masking_utils.AttentionMaskInterface._global_mapping["noted"]
    return seen[0]


def test_what_a_mask_is_taken_for() -> None:
    sliding, restart = masking_utils.create_sliding_window_causal_mask, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    causal = taken_as()
    assert causal is not None and causal.window is None and causal.cu_seqlens is None
    window = taken_as(maker=sliding, sliding_window=3)
    assert window is not None and window.window == 3 and window.cu_seqlens is None
    for other in (
        {"position_ids": restart},  # documents, but how many stands on the device
        {"maker": masking_utils.create_chunked_causal_mask, "attention_chunk_size": 4},
        {"maker": masking_utils.create_bidirectional_mask},
        {"is_causal": False},
        {"or_mask_function": lambda b, h, q, k: q == k},
        {"and_mask_function": lambda b, h, q, k: q >= k},
        {"block_sequence_ids": torch.zeros(2, 8, dtype=torch.int64)},
    ):
        assert taken_as(**other) is None, other


def test_documents_in_a_mask_function_are_found() -> None:
    _, batch = packed(LENGTHS)
    documents = Documents(batch["seq_idx"], max_documents=5)

    def same(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return batch["seq_idx"][b, q] == batch["seq_idx"][b, k]

    same.documents = documents
    theirs = masking_utils.packed_sequence_compatibility_function(
        masking_utils.sliding_window_causal_mask_function(4), batch["position_ids"], batch["seq_idx"]
    )
    mask = recognise(masking_utils.and_masks(theirs, same))
    assert mask is not None and mask.window == 4 and mask.cu_seqlens is documents.cu_seqlens
    query = torch.zeros(2, 3, 16, 8)
    whole = masking_utils.sdpa_mask(
        2, 16, 16, mask_function=masking_utils.and_masks(theirs, same), allow_is_causal_skip=False
    )
    assert torch.equal(mask.dense(query), whole)


@pytest.mark.parametrize("max_documents", [None, 3, 16])
def test_where_documents_begin(max_documents: int | None) -> None:
    _, batch = packed(LENGTHS)
    documents = Documents(batch["seq_idx"], max_documents)
    starts = [row * 16 + start for row, start, _ in documents.spans]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.cu_seqlens.tolist() == starts + [32] * (2 * (max_documents or 3) + 1 - len(starts))


@pytest.mark.parametrize("name", CASES)
def test_operations_that_the_benchmark_counts(name: str) -> None:
    shape = dataclasses.replace(CASES[name], window=CASES[name].window and 20, document=CASES[name].document and 16)
    lengths = document_lengths(shape, 64)
    assert all(sum(row) == 64 and min(row) > 0 for row in lengths)
    documents = torch.tensor([0, *(length for row in lengths for length in row)], dtype=torch.int32).cumsum(0)
    seen = visible_keys(shape.rows, 64, shape.window, documents.int(), torch.device("cpu"))
    assert visible_pairs(lengths, shape.window) == seen.sum()


def test_more_documents_than_promised_fail() -> None:
    _, batch = packed(((1,) * 16, (16,)))
    assert Documents(batch["seq_idx"], 9).cu_seqlens[-1] == 32  # 17 fit into 2 x 9
    with pytest.raises(RuntimeError, match="max_documents"):
        _ = Documents(batch["seq_idx"], 8).cu_seqlens


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


PLAIN = Case(GPU, torch.bfloat16, 128, 128)


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
        (PLAIN._replace(head_dim=512, value_dim=512), "torch", {"flash": "up to 256"}),
        (PLAIN._replace(head_dim=64), "torch", {"flash": "not larger than keys"}),
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
    assert choose_backend(PLAIN)[0] == "torch"


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
