"""What a trace on the meta device says is held against real tensors and independent formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from moetrain.auto import AutoModelForCausalLM
from moetrain.bench.flops import flop_per_token
from moetrain.bench.shapes import model_config
from moetrain.config import ModelConfig
from moetrain.families import experts_modules
from moetrain.loss import install_loss
from moetrain.moe.dispatch.alltoall import AllToAllDispatcher
from moetrain.moe.layer import moe_forward
from moetrain.plan.operators import cost_of
from moetrain.plan.shapes import meta_builder
from moetrain.plan.simulate import fake_world
from moetrain.plan.spread import spread_experts
from moetrain.plan.trace import KINDS, Step, StepTrace, trace_step
from tests.families import FAMILIES

CANNOT_BE_TRACED = {"qwen4_exp", "qwen4_exp_text"}
SEQ_LEN = 32


def builder(family: str, device: str, **kwargs: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        with torch.device(device):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family](), **kwargs)
        return made

    return build


def kept_at_the_loss(trace: StepTrace) -> int:
    """Bytes kept for the backward when it begins."""
    return next(event for event in trace.events if event.what == "leave" and event.name == "").now["activations"]


class Kept:
    """Bytes of the distinct storages that autograd keeps, beside those given."""

    def __init__(self, *given: Tensor) -> None:
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.storages: dict[int, Any] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.given:
            self.storages[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "granitemoe", "qwen2_moe"])
def test_activations_are_those_that_a_real_forward_keeps(family: str) -> None:
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager"}
    step = Step(batch=2, seq_len=SEQ_LEN, kernels="torch", loss="plain")
    traced = kept_at_the_loss(trace_step(builder(family, "meta", **kwargs), step))

    model = builder(family, "cpu", **kwargs)().train()
    install_loss(model, "plain")
    ids = torch.randint(128, (2, SEQ_LEN))
    kept = Kept(ids, *model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    assert traced == pytest.approx(kept.nbytes(), rel=0.02)


def test_the_dispatcher_keeps_what_it_keeps_over_ranks() -> None:
    tokens, ranks = 48, 4
    with fake_world(rank=1, world=ranks):
        [(_, experts), *_] = experts_modules(builder("qwen3_moe", "cpu", dtype=torch.float32)())
        dispatcher = AllToAllDispatcher(experts.num_experts, dist.group.WORLD)
        for name, parameter in list(experts.named_parameters()):
            local = parameter.detach()[: experts.num_experts // ranks].clone()
            experts._parameters[name] = torch.nn.Parameter(local)
        inputs = (torch.randn(tokens, 32, requires_grad=True), torch.randint(8, (tokens, 2)), torch.rand(tokens, 2))
        kept = Kept(*inputs, *experts.parameters())
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            out = moe_forward(experts, dispatcher, *inputs)
    [(_, planned), *_] = experts_modules(builder("qwen3_moe", "meta", dtype=torch.float32)())
    spread_experts(planned, "alltoall", 1.0)
    given = tuple(tensor.detach().to("meta").requires_grad_(tensor.requires_grad) for tensor in inputs)
    expected = Kept(*given, *planned.parameters())
    with patched_exchange(planned), torch.autograd.graph.saved_tensors_hooks(expected, lambda tensor: tensor):
        planned(*given)
    assert out.shape == (tokens, 32)
    assert expected.nbytes() == pytest.approx(kept.nbytes(), rel=0.02)


def test_allgather_makes_room_for_the_tokens_of_every_rank() -> None:
    """And the rows of its collectives are those that it allocates."""
    peaks = {}
    for ranks in (2, 8):
        trace = trace_step(
            builder("qwen3_moe", "meta", dtype=torch.bfloat16), Step(seq_len=SEQ_LEN, dispatch="allgather", ranks=ranks)
        )
        peaks[ranks] = max(event.peak["dispatch"] for event in trace.events if not event.backward)
        kept = kept_at_the_loss(trace)
    tokens, hidden, top_k = SEQ_LEN, 32, 2
    each = tokens * (hidden * 2 + top_k * 8)  # a token, its choices and its weights
    sums = tokens * hidden * 2
    assert each <= (peaks[8] - peaks[2]) / 6 <= 2 * each + sums
    assert kept > 0


def test_one_stack_holds_the_rows_of_all_layers() -> None:
    build = builder("qwen3_moe", "meta", dtype=torch.bfloat16)
    step = Step(batch=4, seq_len=SEQ_LEN, dispatch="nvlink", rows_over_mean=3.0, kernels="torch")
    apart = trace_step(build, step)
    together = trace_step(build, replace(step, stacked_over_mean=1.5))
    [(_, experts), *_] = experts_modules(build())
    slots, layers = 4 * SEQ_LEN * 2, len(apart.experts)
    row = 2 * (experts.gate_up_proj.shape[2] + experts.gate_up_proj.shape[1])
    saved = layers * 3.0 * slots * row - (1.5 * (layers - 1) + 3.0) * slots * row
    assert layers > 1
    assert kept_at_the_loss(apart) - kept_at_the_loss(together) == pytest.approx(saved, rel=0.02)
    left = together.events[-1].now["activations"] + together.events[-1].now["dispatch"]
    assert left == pytest.approx((1.5 * (layers - 1) + 3.0) * slots * row, rel=0.02), "it stays until the end"
    for key, work in apart.work.items():
        assert together.work[key].flops == work.flops, key


def test_selective_checkpointing_keeps_what_attention_made() -> None:
    build = meta_builder(model_config("qwen3-30b-a3b", 2), ModelConfig(path="qwen3"))
    traces = {
        mode: trace_step(build, Step(seq_len=256, checkpointing=mode, dispatch="nvlink"))
        for mode in ("none", "selective", "full")
    }
    part = "cudnn attention"
    forward, plain = traces["none"].work["forward", part].flops, traces["none"].work["backward", part].flops
    assert traces["full"].work["backward", part].flops == plain + forward
    assert traces["selective"].work["backward", part].flops == plain
    out = 256 * 32 * 128 * 2  # bf16, 32 heads of 128
    kept = kept_at_the_loss(traces["selective"]) - kept_at_the_loss(traces["full"])
    assert kept >= 2 * out, "a layer's each"


def patched_exchange(module: Any) -> Any:
    from moetrain.plan.standins import gpu_kernels

    return gpu_kernels(module)


@pytest.mark.parametrize(
    ("name", "layers"), [("qwen3-30b-a3b", 2), ("nemotron-3-nano-30b-a3b", 6), ("gpt-oss-20b", 2), ("deepseek-v3", 4)]
)
def test_operations_are_those_of_the_formula(name: str, layers: int) -> None:
    config = model_config(name, layers)
    trace = trace_step(meta_builder(config, ModelConfig(path=name)), Step(seq_len=1024))
    flops = sum(work.flops for work in trace.work.values())
    # the backward of attention computes the scores again, which published figures leave out
    flops -= 0.5 * sum(work.flops for (phase, part), work in trace.work.items() if phase == "forward" and "att" in part)
    assert flops / trace.tokens == pytest.approx(flop_per_token(config, 1024), rel=0.005)


@pytest.mark.parametrize("window", [None, 48, 500])
def test_attention_counts_the_scores_that_are_seen(window: int | None) -> None:
    q, k = (torch.empty(3, 256, heads, 64, device="meta") for heads in (8, 2))
    work = cost_of(
        torch.ops.moetrain.attention.default, (q, k, k, None, None, 1.0, window, "flash", False), {}, None, False
    ).work
    position = torch.arange(256)
    distance = position[:, None] - position
    seen = int(((distance >= 0) & (distance < (window or 256))).sum())
    assert work["attention"].flops == pytest.approx(3 * 8 * seen * 2 * (64 + 64), rel=0.01)


def test_checkpointing_keeps_the_borders_of_layers_and_what_was_received() -> None:
    batch, hidden, top_k = 2, 32, 2
    tokens = batch * SEQ_LEN
    kept = {}
    for mode in ("none", "full", "selective"):
        step = Step(batch, SEQ_LEN, mode, "alltoall", kernels="torch")
        trace = trace_step(builder("qwen3_moe", "meta", dtype=torch.bfloat16), step)
        now = next(event for event in trace.events if event.what == "leave" and event.name == "").now
        kept[mode] = sum(now.values()) - now["logits"]
        layers = len(trace.experts)
    rows = tokens * top_k
    received = layers * (rows * (2 * hidden + 4) + rows * 2 * hidden)  # rows and weights there, rows back
    assert kept["selective"] - kept["full"] == pytest.approx(received, rel=0.03)
    borders = (3 + 2) * tokens * hidden * 2  # layers, embedding and the last norm's result
    assert kept["full"] < kept["none"] / 4
    assert kept["full"] == pytest.approx(borders, rel=0.5)


def test_layers_that_are_not_checkpointed_keep_everything() -> None:
    """Of three layers the last two: their share of what is kept, and of what is computed again."""
    found = {}
    for mode, layers in (("none", None), ("full", 1), ("full", None)):
        step = Step(2, SEQ_LEN, mode, "nvlink", rows_over_mean=1.5, stacked_over_mean=1.2, checkpointed_layers=layers)
        trace = trace_step(builder("qwen3_moe", "meta", dtype=torch.bfloat16), step)
        now = next(event for event in trace.events if event.what == "leave" and event.name == "").now
        found[mode, layers] = sum(now.values()) - now["logits"], trace.work["backward", "attention"].flops
    (all_kept, least), (some_kept, some), (none_kept, most) = found.values()
    assert 0.4 < (some_kept - none_kept) / (all_kept - none_kept) < 0.95
    assert some - least == pytest.approx((most - least) / 3)


def test_recomputed_operations_are_counted() -> None:
    build = builder("qwen3_moe", "meta", dtype=torch.bfloat16)
    plain = trace_step(build, Step(seq_len=SEQ_LEN))
    again = trace_step(build, Step(seq_len=SEQ_LEN, checkpointing="full"))
    last = 2 * SEQ_LEN * 48 * 32  # the product that ends the first layer, a dense one: its result is not needed again
    for part, left_out in (("dense", last), ("experts", 0)):
        forward, backward = plain.work["forward", part].flops, plain.work["backward", part].flops
        assert again.work["backward", part].flops == forward + backward - left_out, part


def test_an_estimate_from_one_row_is_near_the_trace() -> None:
    build = meta_builder(AutoConfig.for_model(**FAMILIES["qwen3_moe"]().to_dict()), ModelConfig(path="tiny"))
    estimate = trace_step(build, Step(1, 256, dispatch="nvlink")).scaled(4)
    exact = trace_step(build, Step(4, 256, dispatch="nvlink"))
    assert [event[:3] for event in estimate.events] == [event[:3] for event in exact.events]
    for kind in ("activations", "dispatch", "workspace"):
        highest = max(event.peak[kind] for event in exact.events)
        assert max(event.peak[kind] for event in estimate.events) == pytest.approx(highest, rel=0.05), kind
    for key, work in exact.work.items():
        assert estimate.work[key].flops == pytest.approx(work.flops, rel=1e-6), key
    assert estimate.experts == exact.experts


def test_compiled_layers_keep_less_and_pass_less() -> None:
    build = meta_builder(model_config("qwen3-30b-a3b", 2), ModelConfig(path="qwen3"))
    eager, compiled = (trace_step(build, Step(seq_len=256, compiled=choice)) for choice in (False, True))
    assert kept_at_the_loss(compiled) < 0.85 * kept_at_the_loss(eager)
    for phase in ("forward", "backward"):
        assert compiled.work[phase, "passes"].bytes < 0.6 * eager.work[phase, "passes"].bytes
        for part in ("dense", "experts"):
            assert compiled.work[phase, part].flops == eager.work[phase, part].flops


def test_every_family_can_be_traced() -> None:
    for family in FAMILIES.keys() - CANNOT_BE_TRACED:
        trace = trace_step(builder(family, "meta", dtype=torch.bfloat16), Step(seq_len=16, dispatch="alltoall"))
        left = trace.events[-1].now
        assert set(left) == set(KINDS)
        assert sum(left.values()) < 10_000, f"{family} leaves {left}"
        assert kept_at_the_loss(trace) > 0 and trace.work["backward", "dense"].flops > 0, family
        gradients = [event.name for event in trace.events if event.what == "gradient"]
        assert len(gradients) == len(set(gradients)), f"{family}: a gradient came twice"


@pytest.mark.parametrize("family", sorted(CANNOT_BE_TRACED))
def test_a_model_that_reads_its_tensors_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="depends on what is in its tensors"):
        trace_step(builder(family, "meta", dtype=torch.bfloat16), Step(seq_len=16))
