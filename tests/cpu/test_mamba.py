"""The Mamba-2 references against Transformers, and when our kernels are put under a model."""

from __future__ import annotations

import ast
import copy
import importlib
from pathlib import Path

import pytest
import torch
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron_h

from moetrain.backends import mamba
from moetrain.kernels.mamba2 import chunk_scan, chunk_scan_ref
from moetrain.kernels.mamba2_conv import causal_conv, causal_conv_ref
from moetrain.kernels.mamba2_norm import gated_norm_ref
from tests import mamba_cases as cases
from tests.families import build
from tests.interpreted import run_interpreted_tests

ROOT = Path(__file__).parents[2]
INF = float("inf")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("limit", [(0.0, INF), (0.05, 1.0)])
@pytest.mark.parametrize("sizes", [(2, 37, 4, 16, 2, 8), (1, 64, 6, 8, 3, 16), (1, 3, 2, 16, 1, 16)])
def test_scan_is_transformers(sizes: tuple[int, int, int, int, int, int], limit: tuple[float, float]) -> None:
    """With chunks of 16 there, which do not divide the row; in fp32, the type of its arithmetic."""
    tensors, grad = cases.scan_case(sizes, torch.float32, "cpu")

    def transformers(x, dt, A, B, C, D, dt_bias):
        plain = nemotron_h.mamba2_chunk_scan.__wrapped__
        return plain(x, dt, A, B, C, 16, D=D, dt_bias=dt_bias, dt_softplus=True, dt_limit=limit)

    found = cases.gradients_of(chunk_scan, tensors, (limit,), grad)
    expected = cases.gradients_of(transformers, tensors, (), grad)
    for result, wanted in zip(found, expected, strict=True):
        assert cases.relative_error(result, wanted) < 3e-5


@pytest.mark.parametrize("packed", [False, True])
def test_scan_is_its_recurrence(packed: bool) -> None:
    sizes = (2, 23, 4, 8, 2, 8)
    tensors, grad = cases.scan_case(sizes, torch.float64, "cpu")
    tensors = [tensor.double() for tensor in tensors]
    rest = ((0.02, 3.0), cases.documents(*sizes[:2], "cpu") if packed else None)
    found = cases.gradients_of(chunk_scan_ref, tensors, rest, grad)
    expected = cases.gradients_of(cases.scan_by_recurrence, tensors, rest, grad)
    for result, wanted in zip(found, expected, strict=True):
        assert cases.relative_error(result, wanted) < 1e-12


@pytest.mark.parametrize("taps", [2, 4])
def test_convolution_is_transformers_on_each_document(taps: int) -> None:
    x, weight, bias = torch.randn(2, 40, 6), torch.randn(6, taps), torch.randn(6)
    seq_idx = cases.documents(2, 40, "cpu")

    def alone(x: torch.Tensor) -> torch.Tensor:
        """[s, C] of one document."""
        plain = nemotron_h.causal_conv1d_fn.__wrapped__
        return plain(x.T[None], weight, bias, activation="silu")[0].T

    rows = [torch.cat([alone(x[row][ids == i]) for i in ids.unique()]) for row, ids in enumerate(seq_idx)]
    torch.testing.assert_close(causal_conv(x, weight, bias, seq_idx), torch.stack(rows))
    torch.testing.assert_close(causal_conv_ref(x, weight, bias)[1], alone(x[1]))


def test_norm_is_transformers() -> None:
    norm = nemotron_h.NemotronHRMSNormGated(24, group_size=8, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x, gate = torch.randn(2, 2, 5, 24).unbind()
    torch.testing.assert_close(gated_norm_ref(x, gate, norm.weight, 3, 1e-5), norm(x, gate))


def test_families_share_their_functions() -> None:
    """What the backend replaces is the same in every family that has it, so that no family is named there."""
    folder = Path(importlib.import_module("transformers").__file__).parent / "models"
    sources: dict[str, dict[str, str]] = {}
    for path in folder.glob("*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if "def mamba2_chunk_scan(" in text:
            functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
            sources[path.parent.name] = {node.name: ast.unparse(node) for node in functions}
    assert sources.keys() == cases.MIXERS.keys()
    for name in ("causal_conv1d_fn", "mamba2_chunk_scan", "mamba2_split_conv1d_scan_combined"):
        assert len({functions[name] for functions in sources.values()}) == 1, name


def test_without_a_gpu_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = cases.as_model(cases.build_mixer("nemotron_h", "cpu", torch.float32))
    assert mamba.use_mamba_kernels(model) is None
    assert "forward" not in vars(model[0]) and "forward" not in vars(model[0].norm)
    assert not mamba.reads_seq_idx(model[0], torch.randn(1, 4, 32))


@pytest.mark.parametrize("model_type", cases.MIXERS)
def test_tensors_on_cpu_take_transformers_path(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, on a machine with a GPU too, and in a copy of the layer."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    mixer = cases.build_mixer(model_type, "cpu", torch.float32)
    x, grad = torch.randn(2, 2, 21, 32).unbind()
    expected = cases.mixer_step(mixer, x, grad)
    model = cases.as_model(mixer)
    assert mamba.mamba2_mixers(model) == [mixer]
    assert mamba.use_mamba_kernels(model) is None
    assert "forward" in vars(mixer) and not mamba.reads_seq_idx(mixer, x)
    for layer in (mixer, copy.deepcopy(mixer)):
        found = cases.mixer_step(layer, x, grad)
        assert all(torch.equal(found[name], wanted) for name, wanted in expected.items())
    assert copy.deepcopy(mixer).forward.__self__ is not mixer
    with pytest.raises(ValueError, match="packed sequences"):  # Transformers' own answer
        mixer(x, seq_idx=torch.zeros(2, 21, dtype=torch.int32))


@pytest.mark.parametrize("case", ["no triton", "activation", "taps", "width"])
def test_slow_layers_on_a_gpu_are_told(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = cases.as_model(cases.build_mixer("nemotron_h", "cpu", torch.bfloat16))
    if case == "no triton":
        monkeypatch.setattr(mamba, "triton", None)
    else:
        monkeypatch.setattr(mamba, "triton", mamba.triton or object())
        field, value = {"activation": ("activation", "gelu"), "taps": ("conv_kernel_size", 5)}.get(
            case, ("head_dim", 12)
        )
        setattr(model[0], field, value)
    sentence = mamba.use_mamba_kernels(model)
    assert sentence is not None and "nemotron_h" in sentence and "install mamba-ssm and causal-conv1d" in sentence
    assert {"no triton": "Triton", "activation": "gelu", "taps": "5", "width": "12"}[case] in sentence
    assert "forward" not in vars(model[0])


def test_other_kernels_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = cases.as_model(cases.build_mixer("nemotron_h", "cpu", torch.float32))
    model.use_kernels = True
    assert mamba.use_mamba_kernels(model) is None and "forward" not in vars(model[0])
    model.use_kernels = False
    monkeypatch.setattr(mamba, "find_spec", lambda name: object())
    assert mamba.use_mamba_kernels(model) is None and "forward" not in vars(model[0])
    assert mamba.reads_seq_idx(model[0], torch.randn(1, 4, 32))


def test_half_an_installation_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm without causal-conv1d: its combined function would fail."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    mixer, x = cases.build_mixer("nemotron_h", "cpu", torch.float32), torch.randn(1, 9, 32)
    expected = mixer(x)

    def fails(*args: object, **kwargs: object) -> None:
        raise TypeError("'NoneType' object is not callable")

    monkeypatch.setattr(nemotron_h, "mamba2_split_conv1d_scan_combined", fails)
    mamba._rewired.cache_clear()
    cases.install(mixer)
    assert torch.equal(mixer(x), expected)
    mamba._rewired.cache_clear()


def test_models_without_mamba_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for family in ("qwen3_moe", "jamba"):  # jamba's is Mamba-1
        model = build(family)
        assert mamba.mamba2_mixers(model) == [] and mamba.use_mamba_kernels(model) is None


def test_kernels_under_the_interpreter() -> None:
    """Triton's interpreter must be switched on before Triton is imported."""
    run_interpreted_tests("tests/cpu/interpreted_mamba.py")
