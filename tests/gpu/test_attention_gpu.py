"""Attention on a GPU: numbers against float64, the kernels that ran by their names, and capture without host syncs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, PreTrainedModel

from moetrain.attention import NAME, CausalMask, attention, attention_cases, explain_attention, select_attention
from moetrain.backends.attention import Case, choose_backend
from moetrain.data.isolation import isolate_documents
from moetrain.kernels.attention_triton import document_bounds, document_bounds_ref
from tests.attention_cases import TRITON, Problem, check_attention, check_sink_gradient, cumulative, random_leaves, run
from tests.cpu.test_data_isolation import packed

BF16 = torch.bfloat16
TOLERANCE = 0.02
"""Largest error over the largest value: bf16 keeps 8 bits, and gradients are sums of products of rounded numbers."""

FULL = {
    "qwen3": Problem(1, 1024, 32, 4, 128, 128),
    "ragged length": Problem(2, 777, 8, 2, 128, 128),
    "gpt_oss": Problem(2, 640, 16, 2, 64, 64, sinks=True),
    "one key head": Problem(1, 513, 4, 1, 64, 64),
}
MLA = Problem(1, 513, 8, 8, 192, 128)
LENGTHS = (300, 1, 476, 777, 0, 0)
RAGGED = {
    "window": Problem(2, 777, 8, 2, 64, 64, window=128),
    "window and sinks": Problem(2, 777, 8, 2, 64, 64, window=128, sinks=True),
    "documents": Problem(2, 777, 8, 2, 128, 128, documents=LENGTHS),
    "all": Problem(2, 777, 16, 2, 64, 64, window=100, documents=LENGTHS, sinks=True),
    "documents, MLA": Problem(2, 777, 4, 4, 192, 128, documents=LENGTHS),
    "large heads": Problem(1, 300, 4, 2, 256, 256, window=70),
}


def hopper_cudnn() -> str | None:
    case = Case(torch.device("cuda", 0), BF16, 128, 128)
    return choose_backend(case)[1].get("cudnn") if torch.cuda.is_available() else "no GPU"


needs_cudnn = pytest.mark.skipif(hopper_cudnn() is not None, reason=f"cuDNN: {hopper_cudnn()}")


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_cudnn
@pytest.mark.parametrize("name", FULL)
def test_cudnn(name: str) -> None:
    check_attention(FULL[name], "cudnn", BF16, "cuda", TOLERANCE)


@needs_cudnn
def test_cudnn_with_smaller_values() -> None:
    check_attention(MLA, "cudnn", BF16, "cuda", TOLERANCE)


@pytest.mark.parametrize("name", [*FULL, *RAGGED])
def test_flash(name: str) -> None:
    check_attention((FULL | RAGGED)[name], "flash", BF16, "cuda", TOLERANCE)


@pytest.mark.parametrize("name", [*TRITON, *FULL, *(name for name in RAGGED if RAGGED[name].head_dim <= 128)])
def test_triton(name: str) -> None:
    problem = (TRITON | FULL | RAGGED)[name]
    check_attention(problem, "triton", BF16, "cuda", TOLERANCE)
    check_attention(problem, "triton", torch.float16, "cuda", TOLERANCE)


def test_triton_gives_the_same_bits_twice() -> None:
    problem = RAGGED["all"]
    leaves = random_leaves(problem, BF16, "cuda")
    grad = torch.randn_like(run(problem, leaves, "triton"))
    both = [
        (out.detach(), *torch.autograd.grad(out, leaves, grad))
        for out in (run(problem, leaves, "triton") for _ in range(2))
    ]
    assert all(torch.equal(once, again) for once, again in zip(*both, strict=True))


@pytest.mark.parametrize("documents", [1, 8, 300])
def test_triton_at_bounds_of_documents(documents: int) -> None:
    cuts = torch.randperm(999)[: documents - 1].add(1).sort().values.tolist()
    lengths = tuple(end - start for start, end in itertools.pairwise([0, *cuts, 1000]))
    cu_seqlens = cumulative((*lengths, *lengths, 0, 0, 0), "cuda")
    assert torch.equal(document_bounds(cu_seqlens, 2, 1000), document_bounds_ref(cu_seqlens, 2, 1000))


def test_flash_in_float16_and_with_smaller_values() -> None:
    check_attention(RAGGED["all"], "flash", torch.float16, "cuda", TOLERANCE)
    check_attention(MLA, "flash", BF16, "cuda", TOLERANCE)


@pytest.mark.parametrize("backend", [pytest.param("cudnn", marks=needs_cudnn), "flash", "triton"])
def test_other_layouts(backend: str) -> None:
    """Queries with the heads outermost, keys and values that are slices of one projection, and a gradient that is no
    dense tensor; twice, as torch keeps cuDNN's plans."""
    rows, length, heads, size = 2, 333, 4, 64
    fused = torch.randn(rows, length, 2, heads, size, device="cuda", dtype=BF16)
    q = torch.randn(rows, heads, length, size, device="cuda", dtype=BF16).transpose(1, 2)
    leaves = [q.requires_grad_(), *(part.detach().requires_grad_() for part in fused.unbind(2))]
    grads = [
        torch.randn(rows, length, heads, size, device="cuda", dtype=BF16),
        torch.randn(rows, heads, length, size, device="cuda", dtype=BF16).transpose(1, 2),
        torch.randn(rows, length, heads, 2 * size, device="cuda", dtype=BF16)[..., ::2],
    ]
    problem = Problem(rows, length, heads, heads, size, size)
    exact = [leaf.detach().double().transpose(1, 2).requires_grad_() for leaf in leaves]
    for grad in grads:
        out = run(problem, [leaf.transpose(1, 2) for leaf in leaves], backend)
        expected = torch.autograd.grad(run(problem, exact, None), exact, grad.double())
        for found, right in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
            error = (found.double() - right.transpose(1, 2)).abs().max() / right.abs().max()
            assert error <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_gradient_of_sinks(dtype: torch.dtype) -> None:
    check_sink_gradient("cuda", dtype)


def kernel_names(function: Callable[[], Any]) -> list[str]:
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in events if not event.name.startswith("Memset")]


def layer(query: Tensor, key: Tensor) -> torch.nn.Module:
    module: Any = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, query.shape[1] // key.shape[1]
    return module  # type: ignore[no-any-return]


def as_transformers_calls(problem: Problem, leaves: list[Tensor]) -> Tensor:
    documents = None if problem.documents is None else cumulative(problem.documents, "cuda")
    mask = None if documents is None and problem.window is None else CausalMask(problem.window, documents)
    q, k, v, *sinks = leaves
    out, _ = attention("auto", layer(q, k), q, k, v, mask, scaling=0.1, s_aux=sinks[0] if sinks else None)
    return out


@needs_cudnn
@pytest.mark.parametrize(
    ("name", "kernel"), [*((name, "cudnn") for name in FULL), *((name, "flash") for name in RAGGED)]
)
def test_kernel_by_its_name(name: str, kernel: str) -> None:
    """The one kernel of the forward and the main one of the backward; no product or softmax of scores beside them."""
    problem = (FULL | RAGGED)[name]
    leaves = random_leaves(problem, BF16, "cuda")
    grad = torch.randn_like(as_transformers_calls(problem, leaves))
    forward = kernel_names(lambda: as_transformers_calls(problem, leaves))
    both = kernel_names(lambda: torch.autograd.grad(as_transformers_calls(problem, leaves), leaves, grad))
    forward_name, backward_name = {"cudnn": ("cudnn", "bprop"), "flash": ("flash_fwd", "flash_bwd")}[kernel]
    assert any(forward_name in name for name in forward), forward
    assert any(backward_name in name for name in both), both
    other = "flash_fwd" if kernel == "cudnn" else "cudnn"
    assert not any(word in name.lower() for name in both for word in (other, "gemm", "softmax")), both


@needs_cudnn
def test_nothing_is_copied_on_the_way() -> None:
    """From Transformers' views to a result that the next projection reads as it lies."""
    problem = FULL["qwen3"]
    leaves = random_leaves(problem, BF16, "cuda")
    assert as_transformers_calls(problem, leaves).is_contiguous()
    with torch.no_grad():
        assert len(kernel_names(lambda: as_transformers_calls(problem, leaves))) == 1


@needs_cudnn
@pytest.mark.parametrize("name", ["gpt_oss", "all"])
def test_compiles_without_a_break(name: str) -> None:
    problem = (FULL | RAGGED)[name]
    leaves = random_leaves(problem, BF16, "cuda")
    documents = None if problem.documents is None else cumulative(problem.documents, "cuda")
    mask = None if documents is None else CausalMask(problem.window, documents)
    module = layer(leaves[0], leaves[1])

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return attention("auto", module, q, k, v, mask, scaling=0.1, s_aux=sinks)[0]

    out, compiled = function(*leaves), torch.compile(function, fullgraph=True)(*leaves)
    assert torch.equal(out, compiled)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    for found, right in zip(torch.autograd.grad(compiled, leaves, grad), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=0.01 * right.abs().max().item())  # atomics in dq


def small(config: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3 if parameter.ndim > 1 else 1.0, generator=generator)
    return model


SIZES = {"vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
LLAMA = LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2, pad_token_id=0)
GPT_OSS = GptOssConfig(
    **SIZES,
    intermediate_size=64,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=4,  # all of them: no choice that rounding could turn over
    sliding_window=96,
    layer_types=["sliding_attention", "full_attention"],
    pad_token_id=0,
)
ROWS = ((200, 56), (1, 130, 125))


def logits_and_gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    out = model(**batch, use_cache=False).logits.float()
    weights = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    gradients = torch.autograd.grad((out * weights).sum(), list(model.parameters()))
    return [out.detach(), *(gradient.float() for gradient in gradients)]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("config", [LLAMA, GPT_OSS], ids=["llama", "gpt_oss"])
def test_models_are_as_near_to_float32_as_their_own_attention(config: Any, documents: bool) -> None:
    """Logits and every gradient, those of the sinks included, of bf16 models."""
    _, batch = packed(ROWS)
    batch = {name: tensor.cuda() for name, tensor in batch.items() if documents or name == "input_ids"}
    exact = logits_and_gradients(isolate_documents(small(config)), batch)
    errors = []
    for choose in (lambda model: None, select_attention):
        model = small(config).bfloat16()
        choose(model)
        results = logits_and_gradients(isolate_documents(model, max_documents=4), batch)
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)])
    assert model.config._attn_implementation == NAME
    names = ["logits", *(name for name, _ in model.named_parameters())]
    for name, own, ours in zip(names, *errors, strict=True):
        assert ours <= 1.5 * own + 0.01, f"{name}: {ours:.4f} from float32, Transformers' own {own:.4f}"
    expected = [str(case._replace(documents=documents)) for case, _ in attention_cases(model.model)]
    assert [choice.case for choice in explain_attention(model, documents)] == expected
    assert all(choice.backend in ("cudnn", "flash") for choice in explain_attention(model, documents))


@pytest.mark.parametrize("documents", [False, True])
def test_a_captured_step_follows_new_documents(documents: bool) -> None:
    """Forward and backward without a host sync, captured, and replayed with other documents in the same tensors."""
    model = small(LLAMA).bfloat16()
    select_attention(model)
    isolate_documents(model, max_documents=4)
    batches = []
    for rows in (ROWS, ((256,), (64, 64, 64, 64)), ((255, 1), (17, 239))):
        _, batch = packed(rows)
        batches.append({name: tensor.cuda() for name, tensor in batch.items() if documents or name == "input_ids"})
    static = {name: tensor.clone() for name, tensor in batches[0].items()}
    torch.cuda.set_sync_debug_mode("error")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _step(model, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(model, static)
    for batch in batches:
        for name, tensor in batch.items():
            static[name].copy_(tensor)
        graph.replay()
        expected = _step(model, batch)
        torch.cuda.set_sync_debug_mode("default")
        for found, right in zip(captured, expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=0.02 * right.abs().max().item())  # atomics in dq
        torch.cuda.set_sync_debug_mode("error")


def _step(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    out = model(**batch, use_cache=False).logits
    weights = (batch["input_ids"][..., None] - 64) / 64
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), list(model.parameters()))]
