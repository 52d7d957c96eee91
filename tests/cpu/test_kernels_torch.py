"""The kernels' torch references, their operators' registration, and the match of activations to Transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moetrain.kernels import activation as activation_module
from moetrain.kernels import select_backend
from moetrain.kernels.activation import Activation, recognise_activation
from moetrain.kernels.experts import _experts_op, _rows_op, expert_rows, experts_forward
from moetrain.kernels.permutation import _permute_op, _unpermute_reduce_op, permute, unpermute_reduce
from moetrain.kernels.routing import _route_sort_op, route_sort
from moetrain.kernels.rows import ExpertWeights
from tests import kernel_cases as cases


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tokens_layer(
    leaves: list[torch.Tensor], index: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> torch.Tensor:
    return experts_forward(leaves[0], index, leaves[1], weights, activation)


def plain_layer(
    leaves: list[torch.Tensor], index: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> torch.Tensor:
    """Any function in the activation's place runs as torch operators."""
    return experts_forward(leaves[0], index, leaves[1], weights, lambda up: activation_module._apply(up, activation))


def rows_layer(
    leaves: list[torch.Tensor], index: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> torch.Tensor:
    routing = route_sort(index, weights.up.shape[0], index.numel() + 9)
    rows, row_weights = permute(leaves[0], leaves[1], routing)
    rows = torch.where((routing.slot_R >= 0)[:, None], rows, torch.nan)
    return unpermute_reduce(expert_rows(rows, routing.offsets_E, row_weights, weights, activation), routing)


@pytest.mark.parametrize("layer", [tokens_layer, plain_layer, rows_layer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "kind", "bias", "transposed"),
    [
        ("silu", "random", False, False),
        ("silu", "none", False, False),
        ("gpt_oss", "elsewhere", True, True),
        ("relu2", "skewed", False, False),
        ("gelu_tanh", "sparse", False, True),
    ],
)
def test_layer(name: str, kind: str, bias: bool, transposed: bool, dtype: torch.dtype, layer: cases.Layer) -> None:
    cases.check_layer(name, kind, bias, transposed, dtype, "cpu", layer)


@pytest.mark.parametrize("name", cases.ACTIVATIONS)
def test_reference_backward_is_autograd(name: str) -> None:
    cases.check_activation_reference(name)


def test_capacity_cuts_the_last_rows() -> None:
    index = torch.tensor([[0, 1], [1, 0], [2, 1]])
    routing = route_sort(index, 3, capacity=4)
    assert routing.counts_E.tolist() == [2, 3, 1]
    assert routing.offsets_E.tolist() == [2, 4, 4]
    assert routing.row_TK.tolist() == [[0, 2], [3, 1], [-1, -1]]
    assert routing.slot_R.tolist() == [0, 3, 1, 2]


def test_frozen_parameters_get_no_gradient() -> None:
    """LoRA-like: only the input and the routing weights need gradients."""
    leaves, index, grad, weights = cases.layer_case("silu", "random", False, False, torch.float32, "cpu")
    expected = torch.autograd.grad(tokens_layer(leaves, index, weights(leaves), Activation("silu")), leaves[:2], grad)
    frozen = [*leaves[:2], *(leaf.detach() for leaf in leaves[2:])]
    out = tokens_layer(frozen, index, weights(frozen), Activation("silu"))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, leaves[:2], grad), expected, strict=True))


@pytest.mark.parametrize("layer", [tokens_layer, rows_layer])
def test_input_without_gradient(layer: cases.Layer) -> None:
    """The first trained layer behind frozen ones: only the weights need gradients."""
    leaves, index, grad, weights = cases.layer_case("silu", "random", False, False, torch.float32, "cpu")
    expected = torch.autograd.grad(layer(leaves, index, weights(leaves), Activation("silu")), leaves[1:], grad)
    fixed = [leaves[0].detach(), *leaves[1:]]
    out = layer(fixed, index, weights(fixed), Activation("silu"))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, fixed[1:], grad), expected, strict=True))


def test_operators_are_registered_right() -> None:
    """Schema, fake shapes and autograd of every operator, as torch.compile and checkpointing rely on them."""
    leaves, index, _, weights = cases.layer_case("gpt_oss", "random", True, True, torch.float32, "cpu")
    (x, top_k_weights, *_), parameters = leaves, weights(leaves)
    routing = route_sort(index, 4)
    rows, row_weights = (tensor.detach().requires_grad_() for tensor in permute(x, top_k_weights, routing))
    key = cases.ACTIVATIONS["gpt_oss"].key()
    for op, args in [
        (_route_sort_op, (index, 4, index.numel(), 0)),
        (_permute_op, (x, top_k_weights, routing.row_TK, index.numel())),
        (_unpermute_reduce_op, (rows, None, routing.row_TK)),
        (_experts_op, (x, top_k_weights, routing.row_TK, routing.offsets_E, *parameters, key, True)),
        (_rows_op, (rows, row_weights, routing.offsets_E, *parameters, key, True)),
    ]:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS.values())
def test_activation_key(activation: Activation) -> None:
    assert Activation.parse(activation.key()) == activation


class _Experts(nn.Module):
    def __init__(self, act_fn: nn.Module, gated: bool = True, concatenated: bool = True) -> None:
        super().__init__()
        self.act_fn, self.has_gate, self.is_concatenated = act_fn, gated, concatenated
        self.limit: float | None = None

    def _apply_gate(self, up: torch.Tensor) -> torch.Tensor:
        gate, up = up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def test_recognises_transformers_experts() -> None:
    """Transformers' own modules, the ones with a gate of their own too; what the table lacks is left to torch."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    small = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8}
    with torch.device("meta"):
        qwen = Qwen3MoeExperts(Qwen3MoeConfig(**small))
        gpt_oss = GptOssExperts(GptOssConfig(**small))
        nemotron = NemotronHExperts(NemotronHConfig(**small))
    assert recognise_activation(qwen) == Activation("silu")
    assert recognise_activation(gpt_oss) == Activation("silu", True, True, 1.702, 7.0, 1.0)
    assert recognise_activation(nemotron) == Activation("relu2", gated=False)

    clamped = _Experts(nn.SiLU())
    clamped.limit = 7.0
    clamped._apply_gate = DeepseekV4Experts._apply_gate.__get__(clamped)
    assert recognise_activation(clamped) == Activation("silu", limit=7.0)
    assert recognise_activation(_Experts(nn.GELU(approximate="tanh"))) == Activation("gelu_tanh")
    assert recognise_activation(_Experts(nn.Mish())) is None
    assert recognise_activation(_Experts(nn.Tanh(), gated=False)) is None


def test_table_says_why() -> None:
    name, reasons = select_backend("grouped_mm", torch.device("cpu"), torch.float64)
    assert name == "torch_loop"
    assert set(reasons) == {"triton_tma", "torch_grouped_mm"}
    assert select_backend("permute", torch.device("cpu"), torch.float32)[0] == "torch"
    with pytest.raises(ValueError, match="route_sort"):
        select_backend("route", torch.device("cpu"), torch.float32)
