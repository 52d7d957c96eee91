"""Checks of the Mamba-2 kernels against their references, shared by the interpreter on CPU and the GPU tests.

Inputs are slices of wider tensors, as in a model, with NaN around them; results are compared in float64.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from moetrain.backends.mamba import use_mamba_kernels
from moetrain.kernels.mamba2 import chunk_scan, chunk_scan_ref
from moetrain.kernels.mamba2_conv import causal_conv, causal_conv_ref
from moetrain.kernels.mamba2_norm import gated_norm, gated_norm_ref
from tests.kernel_cases import relative_error, unwritten_is_nan

SCANS = {
    # rows, tokens, heads, head_dim, groups, state
    "ragged": (2, 100, 4, 16, 2, 32),
    "one token": (2, 1, 4, 16, 1, 16),
    "odd sizes": (1, 70, 6, 40, 3, 72),
    "two programs a group": (1, 20, 20, 16, 2, 16),
}


def tolerance(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 3e-5)


def documents(rows: int, tokens: int, device: str) -> torch.Tensor:
    """Documents of random lengths: short ones, a boundary at a power of two, and a last one over the rest."""
    starts = torch.rand(rows, tokens, device="cpu") < 4 / max(tokens, 4)
    starts[:, : tokens // 2 + 1 : 64] = True
    starts[:, 3:5] = True
    return starts.cumsum(1).int().to(device)


def inside_nan(*shape: int, dtype: torch.dtype, device: str, margin: int = 8) -> torch.Tensor:
    """Random numbers in the middle of the last dimension of a wider tensor of NaN."""
    wide = torch.full((*shape[:-1], shape[-1] + 2 * margin), torch.nan, dtype=dtype, device=device)
    wide[..., margin:-margin] = torch.randn(shape, device=device).to(dtype)
    return wide[..., margin:-margin]


def gradients_of(
    function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], rest: tuple[Any, ...], grad: torch.Tensor
) -> list[torch.Tensor]:
    """The function's value and the gradients of its leading tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def compare(
    names: str,
    function: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    tensors: list[torch.Tensor],
    rest: tuple[Any, ...],
    grad: torch.Tensor,
    limit: float,
) -> None:
    """Value and gradients against the reference in float64 on the same numbers."""
    with unwritten_is_nan():
        found = gradients_of(function, tensors, rest, grad)
    expected = gradients_of(reference, [tensor.double() for tensor in tensors], rest, grad.double())
    for name, result, wanted, like in zip(
        ["out", *names.split()], found, expected, [tensors[0], *tensors], strict=True
    ):
        assert result.dtype == like.dtype, name
        error = relative_error(result, wanted)
        assert error < limit, f"{name}: {error:.2e}"


def check_conv(
    rows: int, tokens: int, channels: int, taps: int, bias: bool, packed: bool, dtype: torch.dtype, device: str
) -> None:
    x = inside_nan(rows, tokens, channels, dtype=dtype, device=device)
    weight = torch.randn(channels, taps, device=device).to(dtype)
    tensors = [x, weight, *([torch.randn(channels, device=device).to(dtype)] if bias else [])]
    seq_idx = documents(rows, tokens, device) if packed else None
    grad = inside_nan(rows, tokens, channels, dtype=dtype, device=device)
    rest = (seq_idx,) if bias else (None, seq_idx)
    compare(
        "x weight bias" if bias else "x weight", causal_conv, causal_conv_ref, tensors, rest, grad, tolerance(dtype)
    )


def check_norm(rows: int, tokens: int, groups: int, width: int, dtype: torch.dtype, device: str) -> None:
    shape = (rows, tokens, groups * width)
    x, gate, grad = (inside_nan(*shape, dtype=dtype, device=device) for _ in range(3))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    compare("x gate weight", gated_norm, gated_norm_ref, [x, gate, weight], (groups, 1e-5), grad, tolerance(dtype))


def scan_case(
    sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x, dt, A, B, C, D, dt_bias, of decays from slow to so quick that a chunk forgets all, and a gradient of y."""
    rows, tokens, heads, head_dim, groups, state = sizes
    width = heads * head_dim
    wide = inside_nan(rows, tokens, width + 2 * groups * state + heads, dtype=dtype, device=device)
    x, B, C, dt = wide.split([width, groups * state, groups * state, heads], -1)
    tensors = [
        x.unflatten(-1, (heads, head_dim)),
        dt,
        -torch.logspace(-1, 1.5, heads, device=device),
        B.unflatten(-1, (groups, state)),
        C.unflatten(-1, (groups, state)),
        torch.randn(heads, device=device).to(dtype),
        torch.linspace(-4, 1, heads, device=device).to(dtype),
    ]
    return tensors, torch.randn(tensors[0].shape, device=device).to(dtype)


def check_scan(
    sizes: tuple[int, int, int, int, int, int],
    packed: bool,
    limit: tuple[float, float],
    dtype: torch.dtype,
    device: str,
) -> None:
    tensors, grad = scan_case(sizes, dtype, device)
    seq_idx = documents(*sizes[:2], device) if packed else None
    names, rest = "x dt A B C D dt_bias", (limit, seq_idx)
    compare(names, chunk_scan, chunk_scan_ref, tensors, rest, grad, tolerance(dtype))


def scan_by_recurrence(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    seq_idx: torch.Tensor | None,
) -> torch.Tensor:
    """The definition, token by token."""
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (tensor.repeat_interleave(heads_per_group, 2) for tensor in (B, C))
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3])
    out = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        state = state * (dt[:, t] * A).exp()[..., None, None]
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        out.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(out, 1)


MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron_h": (
        "NemotronHMamba2Mixer",
        {
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "chunk_size": 8,
            "layers_block_type": ["linear_attention"],
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridMambaLayer",
        {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    ),
    "bamba": (
        "BambaMixer",
        {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8},
    ),
    "zamba2": (
        "Zamba2MambaMixer",
        {
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_d_state": 16,
            "mamba_ngroups": 2,
            "chunk_size": 8,
            "num_hidden_layers": 54,
        },
    ),
    "mamba2": (
        "Mamba2Mixer",
        {"num_heads": 4, "head_dim": 16, "expand": 2, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon_h1": (
        "FalconH1Mixer",
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_ssm": 64,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
            "mamba_rms_norm": True,
        },
    ),
}
"""Model type to the class of its Mamba-2 layer, and a small configuration."""


def build_mixer(model_type: str, device: str, dtype: torch.dtype) -> Any:
    """A layer whose every parameter is random, with time steps from short to long."""
    from transformers import CONFIG_MAPPING

    class_name, fields = MIXERS[model_type]
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    config = CONFIG_MAPPING[model_type](**{"hidden_size": 32, "num_hidden_layers": 1, **fields})
    mixer = getattr(module, class_name)(config, layer_idx=0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
        mixer.norm.weight.add_(1.0)
        mixer.dt_bias.copy_(torch.linspace(-4, 1, mixer.num_heads))
    if model_type == "falcon_h1":
        mixer.mup_vector = torch.rand(1, 1, mixer.in_proj.out_features, device=device) + 0.5
    return mixer.to(device, dtype)


def mixer_step(
    mixer: Any, x: torch.Tensor, grad: torch.Tensor, forward: Callable[..., torch.Tensor] | None = None, **kwargs: Any
) -> dict[str, torch.Tensor]:
    """Output, and gradients of the input and of every parameter; `forward` takes the place of the layer's own."""
    x = x.detach().requires_grad_()
    out = (forward or mixer)(x, **kwargs)
    parameters = dict(mixer.named_parameters())
    gradients = torch.autograd.grad(out, [x, *parameters.values()], grad)
    return {"out": out.detach(), **dict(zip(["x", *parameters], gradients, strict=True))}


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        error = relative_error(found[name], wanted)
        assert error < limit, f"{name}: {error:.2e}"


def as_model(mixer: Any) -> Any:
    """As much of a model around one layer as the backend looks at."""
    model: Any = torch.nn.Sequential(mixer)
    model.dtype, model.config = mixer.A_log.dtype, SimpleNamespace(model_type="nemotron_h")
    return model


def install(mixer: Any) -> Any:
    """The layer, with our kernels under it."""
    assert use_mamba_kernels(as_model(mixer)) is None and mixer.reads_seq_idx
    return mixer


def check_quick_heads(dtype: torch.dtype, device: str) -> None:
    """Each head's gradient of A by itself, from heads that keep all to heads that keep e^-12 of a token."""
    tensors, grad = scan_case((1, 128, 6, 16, 1, 16), dtype, device)
    tensors[2] = -torch.tensor([0.01, 0.1, 1.0, 4.0, 8.0, 12.0], device=device)
    tensors[6] = torch.full((6,), 0.5413, device=device).to(dtype)  # time steps near 1
    tensors[1] = torch.zeros_like(tensors[1])
    found = gradients_of(chunk_scan, tensors, (), grad)[3]
    expected = gradients_of(chunk_scan_ref, [tensor.double() for tensor in tensors], (), grad.double())[3]
    error = ((found - expected) / expected).abs()
    assert error.max() < 10 * tolerance(dtype), error
