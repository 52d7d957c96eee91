from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

import moetrain.kernels.linear_cross_entropy
from moetrain.kernels.linear_cross_entropy import IGNORED, chunked_linear_cross_entropy, linear_cross_entropy_ref
from moetrain.loss import install_loss, without_logits
from tests.families import FAMILIES, batch, build

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


def gemma2(softcap: float | None) -> Any:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, **heads, final_logit_softcapping=softcap))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.train()


def inputs(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    torch.manual_seed(tokens)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.rand(tokens) < 0.3] = IGNORED
    leaf = {
        "hidden": torch.randn(tokens, hidden, dtype=dtype),
        "weight": torch.randn(vocabulary, hidden, dtype=dtype),
        "bias": torch.randn(vocabulary, dtype=dtype),
    }
    return SimpleNamespace(labels=labels, **{name: t.requires_grad_() for name, t in leaf.items()})


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("chunk", [1, 5, 64, 1000, None])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.25, None), (True, 3.0, 5.0)])
def test_chunked_equals_reference(
    tokens: int, chunk: int | None, bias: bool, scale: float, softcap: float | None
) -> None:
    x = inputs(tokens, 12, 33)
    leaves = [x.hidden, x.weight, *([x.bias] if bias else [])]
    args = (x.hidden, x.weight, x.labels, x.bias if bias else None, scale, softcap)
    expected = linear_cross_entropy_ref(*args)
    loss = chunked_linear_cross_entropy(*args, chunk_tokens=chunk)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(loss / 7, leaves)
    theirs = torch.autograd.grad(expected / 7, leaves)
    for gradient, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


def test_no_label_no_loss_no_gradient() -> None:
    x = inputs(9, 12, 33)
    loss = chunked_linear_cross_entropy(x.hidden, x.weight, torch.full((9,), IGNORED), chunk_tokens=4)
    loss.backward()
    assert loss == 0 and x.hidden.grad.abs().sum() == 0 and x.weight.grad.abs().sum() == 0


def test_large_logits_stay_finite() -> None:
    x = inputs(9, 12, 33)
    loss = chunked_linear_cross_entropy(x.hidden, x.weight, x.labels, logit_scale=1e4)
    torch.testing.assert_close(loss, linear_cross_entropy_ref(x.hidden, x.weight, x.labels, logit_scale=1e4))
    loss.backward()
    assert x.hidden.grad.isfinite().all()


def test_bf16_sums_the_weight_gradient_in_fp32() -> None:
    """1,024 chunks: summed in bf16, whose sums stop growing after 256 equal terms, the gradient would be far off."""
    x = inputs(1024, 16, 8, torch.bfloat16)
    chunked_linear_cross_entropy(x.hidden, x.weight, x.labels, chunk_tokens=1).backward()
    exact = inputs(1024, 16, 8, torch.bfloat16)
    hidden, weight = exact.hidden.detach().double(), exact.weight.detach().double().requires_grad_()
    F.cross_entropy(hidden @ weight.T, exact.labels, ignore_index=IGNORED, reduction="sum").backward()
    assert x.weight.grad.dtype == torch.bfloat16
    error = (x.weight.grad.double() - weight.grad).norm() / weight.grad.norm()
    assert error < 3e-3


@pytest.mark.parametrize("trained", [{"hidden"}, {"weight"}, {"bias"}, {"hidden", "bias"}, set()])
def test_gradients_of_what_is_trained(trained: set[str]) -> None:
    x = inputs(20, 12, 33)
    for name in ("hidden", "weight", "bias"):
        getattr(x, name).requires_grad_(name in trained)
    expected = linear_cross_entropy_ref(x.hidden, x.weight, x.labels, x.bias)
    loss = chunked_linear_cross_entropy(x.hidden, x.weight, x.labels, x.bias, chunk_tokens=6)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == bool(trained)
    if trained:
        leaves = [getattr(x, name) for name in sorted(trained)]
        pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_without_gradients_only_the_loss_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    real = moetrain.kernels.linear_cross_entropy.torch_cross_entropy

    def spy(*args: Any) -> tuple[Tensor, Tensor]:
        wanted.append(args[-1])
        return real(*args)

    monkeypatch.setattr(moetrain.kernels.linear_cross_entropy, "torch_cross_entropy", spy)
    x = inputs(20, 12, 33)
    with torch.no_grad():
        loss = chunked_linear_cross_entropy(x.hidden, x.weight, x.labels, x.bias, chunk_tokens=10)
    torch.testing.assert_close(loss, linear_cross_entropy_ref(x.hidden, x.weight, x.labels, x.bias))
    chunked_linear_cross_entropy(x.hidden, x.weight, x.labels, x.bias, chunk_tokens=10)
    assert wanted == [False, False, True, True]


def test_second_backward_is_refused() -> None:
    x = inputs(5, 12, 33)
    loss = chunked_linear_cross_entropy(x.hidden, x.weight, x.labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moetrain.kernels.linear_cross_entropy.CHUNK_LOGITS, "cpu", 7 * 128)


def gradients(model: Any, rows: dict[str, Tensor], **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**rows, use_cache=False, **kwargs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(mine: tuple[Any, dict[str, Tensor]], plain: tuple[Any, dict[str, Tensor]], rtol: float = 1e-5) -> None:
    torch.testing.assert_close(mine[0].loss, plain[0].loss, rtol=1e-5, atol=0)
    assert mine[1].keys() == plain[1].keys()
    for name, expected in plain[1].items():
        error = (mine[1][name] - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        assert error < rtol, (name, error)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_plain(family: str) -> None:
    """Loss and every gradient, in chunks of 7 of the 32 tokens, some without label."""
    model: Any = build(family)
    rows = batch(3)
    rows["labels"][0, :5] = IGNORED
    kwargs = {"num_items_in_batch": torch.tensor(19)}
    plain = gradients(model, rows, **kwargs)
    assert "fused" in install_loss(model, "fused")
    with without_logits(model):
        mine = gradients(model, rows, **kwargs)
    assert mine[0].logits is None
    # inkling's short convolutions have gradients of 1e-6 of their neighbours', where rounding shows
    assert_same(mine, plain, rtol=1e-4 if family == "inkling_text" else 1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_soft_cap_and_tied_head(softcap: float | None) -> None:
    model = gemma2(softcap)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.randint(0, 50, (2, 20))
    rows = {"input_ids": tokens, "labels": tokens}
    plain = gradients(model, rows)
    message = install_loss(model, "fused")
    assert message.endswith("soft cap 2.5" if softcap else "cross entropy")
    assert_same(gradients(model, rows), plain)


@pytest.mark.parametrize("items", [None, 11, 11.5, torch.tensor(11)])
@pytest.mark.parametrize("shifted", [False, True])
def test_normalisation_and_shifted_labels(items: Any, shifted: bool) -> None:
    model: Any = build("granitemoe")
    rows = batch(1)
    rows["labels"][1, 4:9] = IGNORED
    kwargs: dict[str, Any] = {"num_items_in_batch": items}
    if shifted:
        kwargs["shift_labels"] = torch.randint(3, 128, (2, 16))
    plain = gradients(model, rows, **kwargs)
    install_loss(model, "fused")
    assert_same(gradients(model, rows, **kwargs), plain)


def test_auxiliary_loss_is_added() -> None:
    model: Any = build("mixtral")
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    plain = gradients(model, batch(0))
    install_loss(model, "fused")
    mine = gradients(model, batch(0))
    assert_same(mine, plain)
    torch.testing.assert_close(mine[0].aux_loss, plain[0].aux_loss)


def test_the_plain_path_stays_for_all_else() -> None:
    model: Any = build("qwen3_moe")
    rows = batch(0)
    training = model(**rows, use_cache=False)
    model.eval()
    expected = model(**rows, use_cache=False)
    generated = model.generate(rows["input_ids"], max_new_tokens=5, do_sample=False)
    install_loss(model, "fused")
    for mine in (
        model(**rows, use_cache=False),
        model(input_ids=rows["input_ids"], use_cache=False),
    ):
        assert torch.equal(mine.logits, expected.logits)
    assert torch.equal(model(**rows, use_cache=False).loss, expected.loss)
    assert torch.equal(model.generate(rows["input_ids"], max_new_tokens=5, do_sample=False), generated)
    with torch.no_grad(), without_logits(model):
        mine = model(**rows, use_cache=False)
        assert mine.logits is None and "logits" not in mine
        torch.testing.assert_close(mine.loss, expected.loss)
        assert torch.equal(model(input_ids=rows["input_ids"], use_cache=False).logits, expected.logits)
    assert model(**rows, use_cache=False).logits is not None
    model.train()
    assert torch.equal(model(**rows, use_cache=False, return_dict=False)[1], training.logits)
    assert torch.equal(model(input_ids=rows["input_ids"], use_cache=False).logits, training.logits)
    assert model(**rows, use_cache=False).logits is None
    assert model(rows["input_ids"], None, None, None, None, rows["labels"], use_cache=False).logits is None


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    model: Any = build("qwen3_moe")
    install_loss(model, "fused")
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 10**6), labels=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
    logits = model(input_ids=batch(0)["input_ids"], use_cache=False).logits
    assert logits.shape == (2, 16, 128)


def test_plain_takes_out_an_installation() -> None:
    model: Any = build("qwen3_moe")
    expected = model(**batch(0), use_cache=False)
    install_loss(model, "fused")
    assert install_loss(model, "auto") == install_loss(model, "auto")
    assert install_loss(model, "plain") == "loss: plain, as asked"
    mine = model(**batch(0), use_cache=False)
    assert torch.equal(mine.loss, expected.loss) and torch.equal(mine.logits, expected.logits)
    assert "forward" not in vars(model.lm_head)


def shifted_head(model: Any) -> None:
    """A model that changes its logits in a way of its own."""
    forward = type(model).forward

    class Shifted(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            handle = self.lm_head.register_forward_hook(lambda module, args, output: F.softplus(output))
            try:
                return forward(self, *args, **kwargs)
            finally:
                handle.remove()

    model.__class__ = Shifted


def scale_in_place(model: Any) -> None:
    """A model that changes its logits without a copy."""
    forward = type(model).forward

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            handle = self.lm_head.register_forward_hook(lambda module, args, output: output.mul_(0.5))
            try:
                return forward(self, *args, **kwargs)
            finally:
                handle.remove()

    model.__class__ = Scaled


def own_loss(model: Any) -> None:
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.mean()


def wrapped_head(model: Any) -> None:
    model.lm_head = nn.Sequential(model.lm_head)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shifted_head, "more than a factor and a soft cap"),
        (scale_in_place, "writes into them"),
        (own_loss, "not ForCausalLMLoss"),
        (wrapped_head, "not a plain nn.Linear"),
    ],
)
def test_models_that_do_not_fit_are_refused_or_left_plain(change: Any, reason: str) -> None:
    model: Any = build("qwen3_moe")
    change(model)
    with pytest.raises(ValueError, match=reason):
        install_loss(model, "fused")
    expected = model(**batch(0), use_cache=False)
    message = install_loss(model, "auto")
    assert message.startswith("loss: plain, since") and reason in message
    mine = model(**batch(0), use_cache=False)
    assert torch.equal(mine.loss, expected.loss) and torch.equal(mine.logits, expected.logits)


def test_a_dense_model_and_unknown_modes() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    tokens = torch.randint(0, 50, (2, 20))
    plain = gradients(model, {"input_ids": tokens, "labels": tokens})
    assert "fused" in install_loss(model, "auto")
    with without_logits(model):
        assert_same(gradients(model, {"input_ids": tokens, "labels": tokens}), plain)
    with pytest.raises(ValueError, match="auto, fused, plain"):
        install_loss(model, "liger")
