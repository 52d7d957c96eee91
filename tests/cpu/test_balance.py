from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.families import experts_modules
from moetrain.moe.balance import BiasUpdate, LoadStats, set_aux_loss
from moetrain.moe.router import set_gate
from tests.families import EXPERTS, FAMILIES, TOP_K, batch, build


def count_by_hand(model: nn.Module) -> dict[str, Tensor]:
    """Tokens of each expert of each layer, added up over all calls."""
    counts = {name: torch.zeros(EXPERTS) for name, _ in experts_modules(model)}

    def counter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for expert in args[1].flatten().tolist():
                counts[name][expert] += 1

        return hook

    for name, module in experts_modules(model):
        module.register_forward_pre_hook(counter(name))
    return counts


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "minimax_m2", "nemotron_h", "deepseek_v4", "zaya"])
def test_counts_of_several_passes(family: str) -> None:
    model = build(family)
    stats, counts = LoadStats.attach(model), count_by_hand(model)
    for seed in range(2):
        model(**batch(seed), use_cache=False)
    load = stats.read()
    assert [layer.name for layer in load.layers] == list(counts)
    assert stats.load_LE is not None
    for row, layer, expected in zip(stats.load_LE, load.layers, counts.values(), strict=True):
        assert torch.equal(row, expected)
        assert layer.max_over_mean == pytest.approx((expected.max() / expected.mean()).item())
        assert layer.idle_experts == (expected == 0).sum()
        shares = [n / expected.sum().item() for n in expected.tolist() if n]
        assert layer.entropy == pytest.approx(-sum(s * math.log(s) for s in shares) / math.log(EXPERTS))
    assert load.max_over_mean == max(layer.max_over_mean for layer in load.layers)
    assert load.idle_experts == sum(layer.idle_experts for layer in load.layers)
    assert load.entropy == min(layer.entropy for layer in load.layers)
    # the window is closed: the next one starts at zero
    model(**batch(5), use_cache=False)
    stats.read()
    assert stats.load_LE.sum(1).unique().numel() == 1
    assert stats.load_LE.sum() == len(load.layers) * 32 * min(TOP_K, model.config.num_experts_per_tok)


def test_extremes() -> None:
    stats = LoadStats(["one", "two"], [4, 2], torch.device("cpu"))
    stats.counts_LE[:] = torch.tensor([[0.0, 12.0, 0.0, 0.0], [5.0, 5.0, 0.0, 0.0]])
    load = stats.read()
    one, two = load.layers
    assert (one.max_over_mean, one.idle_experts, one.entropy) == (4.0, 3, 0.0)
    assert (two.max_over_mean, two.idle_experts) == (1.0, 0)
    assert two.entropy == pytest.approx(1.0)


def test_a_dense_model_has_no_load() -> None:
    load = LoadStats.attach(nn.Linear(2, 2)).read()
    assert (load.max_over_mean, load.idle_experts, load.entropy, load.layers) == (None, None, None, [])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_and_pauses_count_nothing(reentrant: bool) -> None:
    model: Any = build("mixtral")
    stats = LoadStats.attach(model)
    model(**batch(0), use_cache=False)
    stats.read()
    expected = stats.load_LE
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = count_by_hand(model)
    model(**batch(0), use_cache=False).loss.backward()
    with stats.paused():
        model(**batch(1), use_cache=False)
    stats.read()
    assert torch.equal(stats.load_LE, expected)
    assert sum(c.sum() for c in calls.values()) == 3 * expected.sum()  # forward, recomputation, pause


@pytest.mark.parametrize("stats_first", [True, False])
def test_stats_see_the_gate(stats_first: bool) -> None:
    model = build("qwen3_moe")
    if stats_first:
        stats = LoadStats.attach(model)
        set_gate(model, "sequential")
    else:
        set_gate(model, "sequential")
        stats = LoadStats.attach(model)
    model(**batch(0), use_cache=False)
    assert stats.read().max_over_mean == 1.0


def correction_biases(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: t for name, t in tensors.items() if name.endswith(("e_score_correction_bias", "expert_bias"))}


@pytest.mark.parametrize(
    "family",
    [
        "deepseek_v3",
        "glm4_moe",
        "nemotron_h",
        "minimax_m2",
        "ernie4_5_moe",
        "dots1",
        "afmoe",
        "lfm2_moe",
        "deepseek_v4",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_update_of_a_family(family: str, dtype: torch.dtype) -> None:
    model = build(family).to(dtype)
    stats = LoadStats.attach(model)
    update = BiasUpdate(model, 0.001, stats)
    before = {name: bias.detach().clone() for name, bias in correction_biases(model).items()}
    with pytest.raises(RuntimeError, match=r"needs a LoadStats\.read"):
        update.step()
    model(**batch(0), use_cache=False)
    load = {layer.name: row for layer, row in zip(stats.read().layers, stats.load_LE, strict=True)}
    update.step()
    assert before
    for name, bias in correction_biases(model).items():
        assert bias.dtype == torch.float32
        layer = next(row for layer, row in load.items() if name.startswith(layer.removesuffix("experts")))
        expected = before[name] + 0.001 * torch.sign(layer.mean() - layer)
        torch.testing.assert_close(bias.detach(), expected, rtol=0, atol=1e-7)
        assert not torch.equal(bias, before[name])
    with pytest.raises(RuntimeError, match=r"needs a LoadStats\.read"):
        update.step()


def test_bias_update_balances_a_skewed_router() -> None:
    """Half of the experts start out preferred by 0.5; the busiest expert falls from over 2 times the mean to 1.3."""
    model = build("deepseek_v3")
    (bias,) = correction_biases(model).values()
    bias[: EXPERTS // 2] += 0.5
    stats = LoadStats.attach(model)
    update = BiasUpdate(model, 0.02, stats)
    history = []
    with torch.no_grad():
        for _ in range(60):
            model(**batch(0, rows=16, length=32), use_cache=False)
            load = stats.read()
            update.step()
            history.append((load.max_over_mean, load.idle_experts, load.entropy))
    assert history[0][0] > 2 and history[0][2] < 0.9
    assert history[-1][0] < 1.3 and history[-1][1] == 0 and history[-1][2] > 0.99


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "zaya"])
def test_bias_update_without_a_bias_is_refused(family: str) -> None:
    model = build(family)
    with pytest.raises(ValueError, match=r"bias_update_rate=0\.1 .*has none"):
        BiasUpdate(model, 0.1, LoadStats.attach(model))


AUX_FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "minimax_m2", "ernie4_5_moe", "granitemoe", "qwen3_5_moe"]


@pytest.mark.parametrize("family", AUX_FAMILIES)
def test_aux_loss_of_a_family(family: str) -> None:
    model: Any = build(family)
    assert set_aux_loss(model, 0.0) == "auxiliary loss: off"
    plain = model(**batch(0), use_cache=False).loss
    assert set_aux_loss(model, 0.5) == "auxiliary loss: coefficient 0.5"
    output = model(**batch(0), use_cache=False)
    assert output.aux_loss > 0
    torch.testing.assert_close(output.loss, plain + 0.5 * output.aux_loss, rtol=1e-5, atol=0)
    # the term does not depend on the normalisation of the tokens' loss
    again = model(**batch(0), use_cache=False, num_items_in_batch=1)
    torch.testing.assert_close(again.loss, plain * 30 + 0.5 * output.aux_loss, rtol=1e-5, atol=0)
    assert model.config.get_text_config().router_aux_loss_coef == 0.5


def test_aux_loss_over_passes_is_their_mean() -> None:
    """Two passes of a step with num_items_in_batch give the gradient of the mean of the two auxiliary losses."""
    passes = [batch(0), batch(1)]
    model: Any = build("mixtral")
    set_aux_loss(model, 0.5)
    expected = 0
    for inputs in passes:
        output = model(**inputs, use_cache=False, num_items_in_batch=60)
        expected = expected + output.loss - 0.5 * output.aux_loss + 0.5 * output.aux_loss / 2
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert set_aux_loss(model, 0.5, grad_accum=2) == "auxiliary loss: coefficient 0.5 over 2 passes"
    assert model.config.router_aux_loss_coef == 0.5
    for inputs in passes:
        model(**inputs, use_cache=False, num_items_in_batch=60).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-7, msg=name)


def test_aux_loss_by_the_configuration() -> None:
    model: Any = build("qwen3_moe")
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.25
    assert set_aux_loss(model, None, grad_accum=5) == "auxiliary loss: coefficient 0.25 over 5 passes"
    assert model.router_aux_loss_coef == pytest.approx(0.05)
    model.config.output_router_logits = False
    assert set_aux_loss(model, None) == "auxiliary loss: off"


def test_aux_loss_of_every_family_is_known() -> None:
    """The families whose forward adds one, against a forward that does."""
    for family in FAMILIES:
        model: Any = build(family)
        try:
            set_aux_loss(model, 0.5)
        except ValueError as error:
            assert "has no auxiliary loss" in str(error)
            assert set_aux_loss(model, None) == "auxiliary loss: none in this family"
            assert set_aux_loss(model, 0.0) == "auxiliary loss: none in this family"
            assert getattr(model(**batch(0), use_cache=False, output_router_logits=True), "aux_loss", None) is None
        else:
            output = model(**batch(0), use_cache=False)
            assert output.aux_loss is not None and output.aux_loss > 0, family
