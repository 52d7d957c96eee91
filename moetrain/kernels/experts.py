"""The experts of a MoE layer as few kernels of static shape that never wait for the host.

Forward: route_sort, permute, grouped GEMM, activation * routing weight, grouped GEMM, sum to tokens.
Two entrances: `experts_forward` from tokens, for a rank that holds every expert, and `expert_rows` from rows that a
dispatcher has already brought into expert order.

Shapes: T tokens, K choices of a token (top_k), R rows (capacity), E experts on this rank, H hidden, I intermediate,
G width of the up projection (2 I when gated, else I).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moetrain.kernels.activation import Activation, row_experts
from moetrain.kernels.aside import aside, run_now
from moetrain.kernels.grouped import grouped_mm
from moetrain.kernels.permutation import permute, permute_rows, sum_rows, unpermute_reduce
from moetrain.kernels.routing import route_sort
from moetrain.kernels.row_stack import Place
from moetrain.kernels.rows import ExpertWeights, backward_parameters, backward_rows, forward_rows

Gate = Activation | Callable[[torch.Tensor], torch.Tensor]


def experts_forward(
    x_TH: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    weights: ExpertWeights,
    activation: Gate,
    outputs: bool = True,
) -> torch.Tensor:
    """Sum over k of weight * expert(x) for every token [T, H]; choices outside [0, E) add nothing.

    The backward gathers the rows again instead of keeping K copies of every token: at Qwen3-30B-A3B's shape 134 MB
    a layer for one more pass over them.

    Args:
        activation: a row of the fused table, or a function of [R, G] to [R, I] that runs as torch operators.
        outputs: False may leave the result unwritten: only its backward matters.
    """
    routing = route_sort(top_k_index_TK, weights.up.shape[0])
    if not isinstance(activation, Activation):
        rows_RH, weights_R = permute(x_TH, top_k_weights_TK, routing)
        return unpermute_reduce(_plain_rows(rows_RH, routing.offsets_E, weights_R, weights, activation), routing)
    out_TH: torch.Tensor = _experts_op(
        x_TH, top_k_weights_TK, routing.row_TK, routing.offsets_E, *weights, activation.key(), outputs
    )[0]
    return out_TH


def expert_rows(
    rows_RH: torch.Tensor,
    offsets_E: torch.Tensor,
    weights_R: torch.Tensor,
    weights: ExpertWeights,
    activation: Gate,
    place: Place | None = None,
    outputs: bool = True,
) -> torch.Tensor:
    """weight * expert(row) for rows [R, H] in expert order; rows from `offsets_E[-1]` on are not read, and undefined
    in the result and in the gradient.

    Args:
        offsets_E: row at which each expert ends, int32, not above R.
        weights_R: routing weight of each row, fp32.
        place: where the rows lie, `place.at` rows after `rows_RH`; what the backward needs goes there too. Not for
            activations without a kernel. None: in `rows_RH`.
        outputs: as above.
    """
    if not isinstance(activation, Activation):
        assert place is None
        return _plain_rows(rows_RH, offsets_E, weights_R, weights, activation)
    if place is not None:
        placed_RH: torch.Tensor = _PlacedRows.apply(
            rows_RH, weights_R, offsets_E, *weights[:4], weights[4:], activation, place, outputs
        )
        return placed_RH
    out_RH: torch.Tensor = _rows_op(rows_RH, weights_R, offsets_E, *weights, activation.key(), outputs)[0]
    return out_RH


def experts_forward_ref(
    x_TH: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    weights: ExpertWeights,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`experts_forward` as a loop over experts and choices, in the dtype of its inputs."""
    up, down, up_bias, down_bias, transposed = weights[:5]
    out_TH = torch.zeros_like(x_TH)
    for expert in range(up.shape[0]):
        up_e, down_e = (up[expert], down[expert]) if transposed else (up[expert].T, down[expert].T)
        for k in range(top_k_index_TK.shape[1]):
            tokens = (top_k_index_TK[:, k] == expert).nonzero().squeeze(1)
            hidden = x_TH[tokens] @ up_e
            hidden = activation(hidden if up_bias is None else hidden + up_bias[expert])
            hidden = hidden @ down_e
            hidden = hidden if down_bias is None else hidden + down_bias[expert]
            out_TH = out_TH.index_add(0, tokens, hidden * top_k_weights_TK[tokens, k, None])
    return out_TH


def scale_gradients(weights: ExpertWeights) -> ExpertWeights:
    """The same weights; autograd multiplies their gradients by `gradient_scale`."""
    if weights.gradient_scale == 1.0:
        return weights
    up, down, up_bias, down_bias = (
        tensor if tensor is None else _ScaledGradient.apply(tensor, weights.gradient_scale) for tensor in weights[:4]
    )
    assert up is not None and down is not None
    return ExpertWeights(up, down, up_bias, down_bias, weights.transposed)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, scale):  # type: ignore[no-untyped-def]
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * ctx.scale, None


def _plain_rows(
    rows_RH: torch.Tensor,
    offsets_E: torch.Tensor,
    weights_R: torch.Tensor,
    weights: ExpertWeights,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`expert_rows` with any activation, by torch operators and their autograd."""
    up, down, up_bias, down_bias, transposed = scale_gradients(weights)[:5]
    if not transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    num_rows = rows_RH.shape[0]
    unused_R1 = (torch.arange(num_rows, device=rows_RH.device) >= offsets_E[-1])[:, None]
    expert_R = row_experts(offsets_E, num_rows)
    up_RG = grouped_mm(rows_RH, up, offsets_E).masked_fill(unused_R1, 0.0)
    act_RI = activation(up_RG if up_bias is None else up_RG + up_bias[expert_R])
    # the backward of a grouped product leaves these rows unwritten too, and up_bias would sum them
    act_RI = act_RI.masked_fill(unused_R1, 0.0)
    out_RH = grouped_mm(act_RI, down, offsets_E).masked_fill(unused_R1, 0.0)
    out_RH = out_RH if down_bias is None else out_RH + down_bias[expert_R]
    return out_RH * weights_R.masked_fill(unused_R1[:, 0], 0.0)[:, None].to(out_RH.dtype)


@torch.library.custom_op("moetrain::experts", mutates_args=())
def _experts_op(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    row_TK: torch.Tensor,
    offsets_E: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    transposed: bool,
    gradient_scale: float,
    deferrable: bool,
    activation: str,
    outputs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = ExpertWeights(up, down, up_bias, down_bias, transposed, gradient_scale, deferrable)
    rows_RH, weights_R = permute_rows(x_TH, weights_TK, row_TK, row_TK.numel())
    out_RH, up_RG = forward_rows(rows_RH, weights_R, offsets_E, weights, Activation.parse(activation), outputs=outputs)
    if not outputs:
        return torch.empty_like(x_TH), up_RG
    return sum_rows(out_RH, None, row_TK)[0], up_RG


@torch.library.custom_op("moetrain::experts_backward", mutates_args=())
def _experts_backward_op(
    grad_TH: torch.Tensor,
    up_RG: torch.Tensor,
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    row_TK: torch.Tensor,
    offsets_E: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    transposed: bool,
    gradient_scale: float,
    deferrable: bool,
    activation: str,
    needs_x: bool,
    needs_parameters: bool,
) -> list[torch.Tensor]:
    weights = ExpertWeights(up, down, up_bias, down_bias, transposed, gradient_scale, deferrable)
    grad_RH, weights_R = permute_rows(grad_TH, weights_TK, row_TK, row_TK.numel())
    gradients = backward_rows(grad_RH, up_RG, weights_R, offsets_E, weights, Activation.parse(activation), needs_x)
    # without the tokens' gradient any rows will do to bring the weights' back in the order of slots
    grad_rows_RH = grad_RH if gradients.rows_RH is None else gradients.rows_RH
    grad_x_TH, grad_weights_TK = sum_rows(grad_rows_RH, gradients.weights_R, row_TK)
    parameters: list[torch.Tensor | None] = [None] * 4
    if needs_parameters:
        rows_RH = permute_rows(x_TH, None, row_TK, row_TK.numel())[0]
        parameters = backward_parameters(rows_RH, weights_R, offsets_E, grad_RH, gradients, weights)
    grad_weights_TK = grad_weights_TK.to(weights_TK.dtype)
    return _or_empty([grad_x_TH if needs_x else None, grad_weights_TK, *parameters], grad_TH)


@torch.library.custom_op("moetrain::expert_rows", mutates_args=())
def _rows_op(
    rows_RH: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    transposed: bool,
    gradient_scale: float,
    deferrable: bool,
    activation: str,
    outputs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = ExpertWeights(up, down, up_bias, down_bias, transposed, gradient_scale, deferrable)
    return forward_rows(rows_RH, weights_R, offsets_E, weights, Activation.parse(activation), outputs=outputs)


@torch.library.custom_op("moetrain::expert_rows_backward", mutates_args=())
def _rows_backward_op(
    grad_RH: torch.Tensor,
    up_RG: torch.Tensor,
    rows_RH: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    transposed: bool,
    gradient_scale: float,
    deferrable: bool,
    activation: str,
    needs_rows: bool,
    needs_parameters: bool,
) -> list[torch.Tensor]:
    weights = ExpertWeights(up, down, up_bias, down_bias, transposed, gradient_scale, deferrable)
    gradients = _rows_backward(
        grad_RH,
        up_RG,
        rows_RH,
        weights_R,
        offsets_E,
        weights,
        Activation.parse(activation),
        None,
        needs_rows,
        needs_parameters,
    )
    return _or_empty(gradients, grad_RH)


def _rows_backward(
    grad_RH: torch.Tensor,
    up_RG: torch.Tensor,
    rows_RH: torch.Tensor,
    weights_R: torch.Tensor,
    offsets_E: torch.Tensor,
    weights: ExpertWeights,
    activation: Activation,
    at: torch.Tensor | None,
    needs_rows: bool,
    needs_parameters: bool,
) -> list[torch.Tensor | None]:
    """Gradients of the rows, their weights, and the four parameters; None where not needed."""
    grad_RH = grad_RH.contiguous()
    gradients = backward_rows(grad_RH, up_RG, weights_R, offsets_E, weights, activation, needs_rows, at)
    parameters: list[torch.Tensor | None] = [None] * 4
    if needs_parameters:
        run = aside if weights.deferrable else run_now
        parameters = run(backward_parameters, rows_RH, weights_R, offsets_E, grad_RH, gradients, weights, at)
    return [gradients.rows_RH, gradients.weights_R.to(weights_R.dtype), *parameters]


class _PlacedRows(torch.autograd.Function):
    """`_rows_op` on rows of a `RowStack`, which an operator could neither take nor return: they are no memory of its
    own. It runs outside compiled code."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows_RH, weights_R, offsets_E, up, down, up_bias, down_bias, constants, activation, place, outputs
    ):
        weights = ExpertWeights(up, down, up_bias, down_bias, *constants)
        out_RH, up_RG = forward_rows(rows_RH, weights_R, offsets_E, weights, activation, place, outputs)
        ctx.save_for_backward(up_RG, rows_RH, weights_R, offsets_E, *weights[:4])
        ctx.constants = constants, activation, place.at
        return out_RH

    @staticmethod
    def backward(ctx, grad_RH):  # type: ignore[no-untyped-def]
        up_RG, rows_RH, weights_R, offsets_E, up, down, up_bias, down_bias = ctx.saved_tensors
        constants, activation, at = ctx.constants
        weights = ExpertWeights(up, down, up_bias, down_bias, *constants)
        needs = ctx.needs_input_grad
        gradients = _rows_backward(
            grad_RH, up_RG, rows_RH, weights_R, offsets_E, weights, activation, at, needs[0], any(needs[3:7])
        )
        gradients = [*gradients[:2], None, *gradients[2:], *[None] * 4]
        return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


def _or_empty(gradients: list[torch.Tensor | None], like: torch.Tensor) -> list[torch.Tensor]:
    """An operator cannot return None: an empty tensor stands for a gradient that was not asked for."""
    return [like.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_experts_op.register_fake
def _(x_TH, weights_TK, row_TK, offsets_E, up, down, up_bias, down_bias, transposed, *constants):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TH), x_TH.new_empty(row_TK.numel(), up.shape[2 if transposed else 1])


@_rows_op.register_fake
def _(rows_RH, weights_R, offsets_E, up, down, up_bias, down_bias, transposed, *constants):  # type: ignore[no-untyped-def]
    return torch.empty_like(rows_RH), rows_RH.new_empty(rows_RH.shape[0], up.shape[2 if transposed else 1])


@_experts_backward_op.register_fake
@_rows_backward_op.register_fake
def _(grad, up_RG, inputs, row_weights, *args):  # type: ignore[no-untyped-def]
    up, down, up_bias, down_bias, *_constants, needs_inputs, needs_parameters = args[-10:]

    def like(tensor: torch.Tensor | None, needed: bool) -> torch.Tensor:
        return torch.empty_like(tensor) if needed and tensor is not None else grad.new_empty(0)

    parameters = [like(tensor, needs_parameters) for tensor in (up, down, up_bias, down_bias)]
    return [like(inputs, needs_inputs), torch.empty_like(row_weights), *parameters]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, transposed, gradient_scale, deferrable, activation, _outputs = inputs
    ctx.constants = transposed, gradient_scale, deferrable, activation
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _run_backward(ctx, grad, backward_op, num_inputs):  # type: ignore[no-untyped-def]
    """Gradients for the forward's arguments: `num_inputs` tensors, four parameters, four constants."""
    needs = ctx.needs_input_grad
    needs_parameters = any(needs[num_inputs : num_inputs + 4])
    arguments = (*ctx.saved_tensors, *ctx.constants)
    gradients = backward_op(grad, *arguments, needs[0], needs_parameters)
    middle = [None] * (num_inputs - 2)
    gradients = [*gradients[:2], *middle, *gradients[2:], *[None] * len(ctx.constants), None]
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


_experts_op.register_autograd(
    lambda ctx, grad, _: _run_backward(ctx, grad, _experts_backward_op, 4), setup_context=_setup_context
)
_rows_op.register_autograd(
    lambda ctx, grad, _: _run_backward(ctx, grad, _rows_backward_op, 3), setup_context=_setup_context
)
