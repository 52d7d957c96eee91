"""The benchmark's arithmetic: shapes, FLOP, what a step's clock counts, a trace taken apart, and what is printed."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from moetrain import cli
from moetrain.bench import compare, output, profile
from moetrain.bench.commands import PARTS, name_part
from moetrain.bench.flops import flop_per_token
from moetrain.bench.isolate import Failure
from moetrain.bench.shapes import SHAPES, LayerShape, experts_module, find_shape, layer_shape, model_config
from moetrain.bench.step import Clock, Subject, random_batches, run_passes, time_steps
from moetrain.bench.systems import Case, systems_of
from moetrain.families import experts_modules
from moetrain.moe.balance import Load

ROOT = Path(__file__).parents[2]
# Billions, as the models' cards have them.
PUBLISHED = {
    "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.09,
    "nemotron-3-nano-30b-a3b": 31.58,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
    "deepseek-v3": 671.03,
}
TINY = [name for name in SHAPES if name.startswith("tiny")]


def meta_model(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


# shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_number(name: str) -> None:
    parameters = sum(parameter.numel() for parameter in meta_model(model_config(name)).parameters())
    assert round(parameters / 1e9, 2) == PUBLISHED[name]


def test_every_large_shape_has_a_published_number() -> None:
    assert set(SHAPES) == set(PUBLISHED) | set(TINY)


@pytest.mark.parametrize(
    ("name", "layers", "with_experts"),
    [("qwen3-30b-a3b", 8, 8), ("nemotron-3-nano-30b-a3b", 7, 3), ("gpt-oss-20b", 3, 3), ("deepseek-v3", 5, 2)],
)
def test_a_model_is_cut_to_its_first_layers(name: str, layers: int, with_experts: int) -> None:
    model = meta_model(model_config(name, layers))
    assert len(model.model.layers) == layers
    assert len(experts_modules(model)) == with_experts


@pytest.mark.parametrize("layers", [0, 49])
def test_a_model_is_not_cut_to_what_it_does_not_have(layers: int) -> None:
    with pytest.raises(ValueError, match="qwen3-30b-a3b has 48 layers"):
        model_config("qwen3-30b-a3b", layers)


def test_layer_shapes() -> None:
    assert layer_shape("qwen3-30b-a3b-ep8") == LayerShape("qwen3-30b-a3b", 4096, 8, 16, 2048, 768)
    assert layer_shape("gpt-oss-20b", 512) == LayerShape("gpt-oss-20b", 512, 4, 32, 2880, 2880)
    assert layer_shape("nemotron-3-nano-30b-a3b") == LayerShape("nemotron-3-nano-30b-a3b", 4096, 6, 128, 2688, 1856)
    with pytest.raises(ValueError, match="7 ranks cannot share 128 experts"):
        layer_shape("qwen3-30b-a3b-ep7")


@pytest.mark.parametrize("name", TINY)
def test_an_experts_module_is_the_models_own(name: str) -> None:
    shape = layer_shape(f"{name}-ep2", 16)
    torch.manual_seed(0)
    module = experts_module(shape, "cpu")
    assert module.num_experts == 4 == next(module.parameters()).shape[0]
    x_TH = torch.randn(16, shape.hidden).bfloat16()
    index_TK = torch.rand(16, 4).topk(shape.top_k).indices
    weights_TK = torch.rand(16, shape.top_k).bfloat16()
    out_TH = module(x_TH, index_TK, weights_TK)
    module.config._experts_implementation = "eager"
    torch.testing.assert_close(out_TH, module(x_TH, index_TK, weights_TK), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("words", ["qwen3-30b", "layer qwen3-30b", "kernels qwen3-30b"])
def test_an_unknown_model_gets_the_nearest_names(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words.split()]) == 2
    printed = capsys.readouterr().err
    assert "did you mean qwen3-30b-a3b or qwen3-235b-a22b?" in printed and "gpt-oss-120b" in printed


# floating-point operations


def test_flop_of_qwen3_by_hand() -> None:
    """NVIDIA's formula (NeMo AutoModel's flops_utils.py), and the router that it leaves out."""
    h, layers, s, heads, kv, hd, inter, top_k, vocab, experts = 2048, 48, 4096, 32, 4, 128, 768, 8, 151936, 128
    attention = 6 * layers * h**2 * (hd * heads / h) * ((kv / heads * 2 + 1) + (s / h * 2 * 0.5) + 1)
    theirs = attention + 6 * layers * h * 3 * inter * top_k + 6 * h * vocab
    assert theirs == pytest.approx(23.006e9, rel=1e-4)
    ours = flop_per_token(model_config("qwen3-30b-a3b"), s)
    assert ours == pytest.approx(theirs + 6 * layers * h * experts, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "gflop", "tolerance"),
    [
        ("gpt-oss-20b", 22.91, 0.005),
        ("gpt-oss-120b", 32.63, 0.005),
        ("deepseek-v3", 249.6, 0.005),
        # theirs counts attention at the hidden size, 2,688, for heads of 4,096 in all
        ("nemotron-3-nano-30b-a3b", 19.72 + 6 * 6 * 1408 * (2 * 2688 + 4096) / 1e9, 0.005),
    ],
)
def test_flop_beside_nvidias(name: str, gflop: float, tolerance: float) -> None:
    assert flop_per_token(model_config(name), 4096) / 1e9 == pytest.approx(gflop, rel=tolerance)


@pytest.mark.parametrize("name", ["tiny", "tiny-gpt-oss", "tiny-deepseek-v3"])
def test_flop_beside_a_counted_forward(name: str) -> None:
    """torch counts the products of a forward, whole score matrices and all; ours count the half, or the window."""
    config, length = model_config(name), 48
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(config.vocab_size, (1, length)), use_cache=False)
    widths = getattr(config, "qk_head_dim", config.head_dim) + getattr(config, "v_head_dim", config.head_dim)
    counted = counter.get_total_flops() / length
    for layer in range(config.num_hidden_layers):
        window = 16 if name == "tiny-gpt-oss" and layer == 0 else length
        keys = window - window**2 / (2 * length)
        counted -= 2 * config.num_attention_heads * widths * (length - keys)
    rotary = 2 * config.head_dim // 2  # positions by frequencies is a product too
    assert flop_per_token(config, length) / 3 == pytest.approx(counted, abs=rotary)


# a step's clock


class Time:
    """A clock that only moves when work is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Stats:
    """Stands in for the counts of the experts' load; notes when it counts."""

    def __init__(self) -> None:
        self.reads, self.pauses, self.discards = 0, 0, 0

    def read(self) -> Load:
        self.reads += 1
        return Load(float(self.reads), 0, 1.0, [])

    def discard(self) -> None:
        self.discards += 1

    def paused(self) -> Any:
        self.pauses += 1
        return torch.no_grad()


def subject(clock: Time, overflows: list[bool], status: str, counts: bool = True) -> Subject:
    """Forward 1 s, backward 2 s, asking for an overflow 0.25 s, optimizer 0.5 s; the first step is slower by 100."""
    model: Any = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    model.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + 1.0))
    calls: list[int] = []

    def passes(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        model(torch.zeros(1))
        clock.now += 2.0 + (100.0 if len(calls) == 1 else 0.0)
        return torch.tensor(float(len(calls)))

    def overflowed() -> bool:
        clock.now += 0.25
        return overflows.pop(0)

    def update() -> None:
        clock.now += 0.5

    return Subject(model, passes, overflowed, update, lambda: status, Stats(), counts)


def test_times_of_an_eager_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = subject(Time(monkeypatch), [False, False, True, False, False], "eager: as asked")
    timings = time_steps(step, [{}] * 4, warmup=1)
    # the second timed step runs twice: both runs and both questions count, but its host and forward are the first's
    assert timings.forward_backward == [3.25, 6.5, 3.25]
    assert timings.forward == [1.0, 1.0, 1.0]
    assert timings.host == [3.0, 3.0, 3.0]
    assert timings.optimizer == [0.5, 0.5, 0.5]
    assert (timings.redone, timings.loss) == (1, 5.0)
    assert step.stats.discards == 1 and step.stats.pauses == 0
    assert timings.load is not None and timings.load.max_over_mean == 4.0  # the last step's


def test_a_captured_step_has_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = time_steps(subject(Time(monkeypatch), [False] * 3, "captured in a CUDA graph"), [{}] * 3, warmup=1)
    assert timings.forward == [] and timings.forward_backward == [3.25, 3.25]


def test_load_that_is_counted_in_the_warm_up_only(monkeypatch: pytest.MonkeyPatch) -> None:
    step = subject(Time(monkeypatch), [False] * 4, "eager", counts=False)
    timings = time_steps(step, [{}] * 4, warmup=2)
    assert step.stats.pauses == 1 and step.stats.reads == 2
    assert timings.load is not None and timings.load.max_over_mean == 2.0


def test_run_passes_says_when_the_first_run_is_issued(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    step, issued = subject(clock, [True, True, False], "eager"), []
    loss, redone = run_passes(step, {}, lambda: issued.append(clock.now))
    assert (loss.item(), redone, issued) == (3.0, 2, [103.0])


def test_clock_without_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    now, clock = Time(monkeypatch), Clock(torch.device("cpu"))
    clock.start()
    clock.mark_forward()
    clock.start()
    now.now += 1.5
    assert clock.stop() == 1.5 and clock.forward is None


def test_batches_differ_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = random_batches(50, 2, 8, 3)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 8)] * 3
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    monkeypatch.setenv("RANK", "1")
    assert not torch.equal(batches[0]["input_ids"], random_batches(50, 2, 8, 3)[0]["input_ids"])


# the systems


@pytest.mark.parametrize("name", TINY)
def test_both_systems_train_the_same_model(name: str) -> None:
    """The same weights, tokens and loss; nothing of it is worth a time here."""
    case = Case(name, seq_len=64, warmup=3, steps=1)
    native, ours = (compare.measure(system, case) for system in systems_of(case, 1, against=True))
    assert ours.loss == pytest.approx(native.loss, abs=3e-3)
    assert 5.5 < native.loss < 7.0  # ln 512 is 6.24
    assert ours.load_max_over_mean == pytest.approx(native.load_max_over_mean, abs=1.0)
    for result in (native, ours):
        assert result.tps_per_gpu == pytest.approx(64e3 / result.forward_backward_ms)
        with_optimizer = 64e3 / (result.forward_backward_ms + result.optimizer_ms)
        assert result.tps_per_gpu_with_optimizer == pytest.approx(with_optimizer)
        assert result.forward_ms + result.backward_ms == pytest.approx(result.forward_backward_ms)
        assert result.tflops_per_gpu == pytest.approx(result.tps_per_gpu * result.flop_per_token / 1e12)
        assert len(result.step_ms) == 1 and result.step_ms[0] == pytest.approx(result.forward_backward_ms)


@pytest.mark.parametrize(
    ("world", "ep_size", "against", "expected"),
    [
        (8, 8, False, ["moetrain"]),
        (1, 1, True, ["transformers", "moetrain"]),
        (8, 8, True, ["transformers fsdp2", "transformers ep", "moetrain"]),
        (8, 1, True, ["transformers fsdp2", "moetrain"]),
    ],
)
def test_systems_of(world: int, ep_size: int, against: bool, expected: list[str]) -> None:
    assert systems_of(Case("tiny", ep_size=ep_size), world, against) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ep_size": 3}, "ep_size=3 does not divide the 8 ranks"),
        ({"model": "tiny-gpt-oss", "ep_size": 16}, "ep_size=16 does not divide"),
        ({"dispatch": "carrier"}, "unknown dispatch 'carrier'; valid: auto, local, alltoall"),
        ({"warmup": 2}, "--warmup 2 is too short"),
        ({"layers": 9}, "tiny has 2 layers"),
    ],
)
def test_a_case_that_cannot_be_measured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compare.check_case(dataclasses.replace(Case("tiny"), **changes), 8)


def test_largest_ep_size() -> None:
    assert compare.largest_ep_size("qwen3-30b-a3b", 8) == 8
    assert compare.largest_ep_size("gpt-oss-20b", 24) == 8
    assert compare.largest_ep_size("tiny", 1) == 1


# the profile


def event(name: str, begin: float, end: float, category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin}


def test_a_trace_beside_a_count_of_microseconds(tmp_path: Path) -> None:
    """Random kernels in two steps; a bit for each microsecond says what overlaps."""
    draw = random.Random(0)
    names = {
        "ncclDevKernel_AllGather_RING_LL": "communication",
        "_push_tokens": "communication",
        "nvjet_tst_128x256": "dense GEMM",
        "_rows_by_weights": "grouped GEMM",
        "void at::native::vectorized_elementwise_kernel<4, MulFunctor>": "elementwise and sums",
    }
    spans = [(0, 1000), (1500, 2600)]
    events = [event(profile.PASSES, *span, "user_annotation") for span in spans]
    events += [event(profile.PASSES, *span, "gpu_user_annotation") for span in spans]  # counts for nothing
    events += [event(profile.OPTIMIZER, 1000, 1500, "user_annotation"), event("multi_tensor_apply_kernel", 1100, 1300)]
    seen: dict[str, set[int]] = {"communication": set(), "rest": set()}
    sums: dict[str, float] = dict.fromkeys(names.values(), 0.0)
    for _ in range(300):
        name, (first, last) = draw.choice(list(names)), draw.choice(spans)
        begin = draw.randrange(first, last - 60)
        end = begin + draw.randrange(1, 60)
        events.append(event(name, begin, end))
        sums[names[name]] += (end - begin) / 2e3
        seen["communication" if names[name] == "communication" else "rest"].update(range(begin, end))
    events += [event("cudaLaunchKernel", 10, 12, "cuda_runtime"), event("cudaGraphLaunch", 20, 30, "cuda_runtime")]
    events += [event("cudaLaunchKernel", 1200, 1210, "cuda_runtime"), {"ph": "M", "name": "process_name"}]
    draw.shuffle(events)
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = profile.summarise(profile.read_trace(tmp_path / "trace.json.gz"))

    assert found["steps"] == 2 and found["span_ms"] == pytest.approx(1.05)
    assert found["busy_ms"] == pytest.approx(len(seen["communication"] | seen["rest"]) / 2e3)
    assert found["communication_ms"] == pytest.approx(len(seen["communication"]) / 2e3)
    assert found["exposed_communication_ms"] == pytest.approx(len(seen["communication"] - seen["rest"]) / 2e3)
    assert found["host_launches"] == 1.0
    assert found["optimizer_kernel_ms"] == pytest.approx(0.1)
    assert {part: value["ms"] for part, value in found["parts"].items()} == pytest.approx(sums)
    assert sum(value["kernels"] for value in found["parts"].values()) == pytest.approx(150)
    assert list(found["parts"]) == sorted(found["parts"], key=lambda part: -found["parts"][part]["ms"])
    assert sum(kernel["ms"] for kernel in found["slowest_kernels"]) == pytest.approx(sum(sums.values()))


def test_a_trace_without_kernels() -> None:
    found = profile.summarise([event(profile.PASSES, 0, 100, "user_annotation")])
    assert found["busy_ms"] == found["exposed_communication_ms"] == 0.0 and found["parts"] == {}


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)", "communication"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("triton_tem_fused_flex_attention_backward_0", "attention"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<GroupProblemShape<...>>>", "grouped GEMM"),
        ("nvjet_tst_192x192_64x3_2x1_v_bz_coopB_TNT", "dense GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "dense GEMM"),
        ("liger_cross_entropy_kernel", "loss"),
        ("_chunk_scan_fwd_kernel", "Mamba"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused_add_mul_silu_3", "elementwise and sums"),
        ("triton_red_fused__to_copy_mean_mul_pow_rsqrt_1", "norms and rotary"),
        ("void at::native::sbtopk::gatherTopK<float>", "routing and permutation"),
        ("something_else", "other"),
    ],
)
def test_part_of_a_kernel(kernel: str, part: str) -> None:
    assert profile.part_of(kernel) == part


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("_push_tokens", "communication"),
        ("_sum_partials", "routing and permutation"),
        ("_rows_by_weights", "grouped GEMM"),
        ("_place_slots", "routing and permutation"),
        ("_activate_backward", "expert activation and bias"),
    ],
)
def test_part_of_our_kernels(kernel: str, part: str) -> None:
    assert profile.part_of(kernel) == part
    assert profile.part_of(f"{kernel}_of_somebody_else") != "communication"


# what is printed and written


def measurement(**changes: Any) -> compare.Measurement:
    values: dict[str, Any] = {
        "status": "eager",
        "tps_per_gpu": 5000.0,
        "tps_per_gpu_with_optimizer": 4000.0,
        "forward_backward_ms": 819.2,
        "forward_ms": 300.0,
        "backward_ms": 519.2,
        "optimizer_ms": 204.8,
        "host_ms": 700.0,
        "step_ms": [819.2],
        "redone_steps": 0,
        "peak_gib": 60.0,
        "device_gib": 70.0,
        "flop_per_token": 23.1e9,
        "tflops_per_gpu": 115.5,
        "limit_tflops": 790.0,
        "share_of_limit": 0.1462,
        "load_max_over_mean": 1.5,
        "idle_experts": 3,
        "loss": 12.1,
        "environment": {"gpu": "cpu", "versions": {}},
    }
    return compare.Measurement(**values | changes)


CAPTURED = {"status": "captured in a CUDA graph", "forward_ms": None, "backward_ms": None, "redone_steps": 2}


def printed(results: dict[str, Any]) -> str:
    text = io.StringIO()
    output.show(Case("tiny"), 8, results, Console(file=text, width=100))
    return text.getvalue()


def test_the_ratio_is_over_the_faster_native_system() -> None:
    results = {
        "transformers fsdp2": measurement(tps_per_gpu=5000.0, tps_per_gpu_with_optimizer=4000.0, peak_gib=60.0),
        "transformers ep": measurement(tps_per_gpu=4500.0, tps_per_gpu_with_optimizer=4200.0, peak_gib=30.0),
        "moetrain": measurement(tps_per_gpu=20000.0, tps_per_gpu_with_optimizer=16000.0, peak_gib=45.0),
    }
    assert output.ratio(results) == {
        "against": "transformers fsdp2",
        "tps": 4.0,
        "tps_with_optimizer": 4.0,
        "peak_memory": 0.75,
    }
    assert output.ratio({"moetrain": results["moetrain"]}) is None
    assert output.ratio({"transformers ep": results["transformers ep"]}) is None


def test_the_table() -> None:
    profiled: dict[str, Any] = {"steps": 2, "span_ms": 200.0, "busy_ms": 190.0, "communication_ms": 30.0}
    profiled |= {
        "exposed_communication_ms": 12.5,
        "host_launches": 1.0,
        "parts": {"attention": {"ms": 47.0, "kernels": 96.0}},
    }
    text = printed(
        {
            "transformers fsdp2": measurement(),
            "transformers ep": Failure("out of memory (wanted 2.32 GiB more)", 3, "Traceback ..."),
            "moetrain": measurement(tps_per_gpu=20000.0, peak_gib=45.0, profile=profiled, **CAPTURED),
        }
    )
    lines = [line.split() for line in text.splitlines()]
    assert ["TPS/GPU", "5,000", "out", "of", "memory", "20,000"] in lines
    assert ["peak", "memory,", "GiB", "60.0", "-", "45.0"] in lines
    assert ["backward,", "ms", "519.2", "-", "-"] in lines
    assert "transformers ep: out of memory (wanted 2.32 GiB more), on rank 3" in text
    assert "captured in a CUDA graph; 2 runs again after an overflow" in text
    assert "4.00 x the tokens per second of transformers fsdp2" in text and "0.75 x its memory" in text
    assert "limit: 790 TFLOP/s, 34,199 TPS/GPU" in text
    assert "attention" in text and "12.5 ms of it beside no other kernel" in text.replace("\n", " ")


def test_a_row_that_nobody_has_is_left_out() -> None:
    text = printed({"moetrain": measurement(device_gib=None, limit_tflops=None, share_of_limit=None)})
    assert "taken from the GPU" not in text and "of the limit" not in text and "peak memory" in text


def test_files(tmp_path: Path) -> None:
    results = {"transformers": measurement(), "moetrain": measurement(tps_per_gpu=9000.0)}
    case = Case("tiny", layers=1, batch=2, seq_len=64, gate="random")
    stem = tmp_path / "out" / output.stem(case, 4)
    assert stem.name == "tiny-1layers-4x2x64-random"
    report = {"systems": {name: dataclasses.asdict(result) for name, result in results.items()}}
    output.write(stem, report, case, 4, results)
    read = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
    assert read["systems"]["moetrain"]["tps_per_gpu"] == 9000.0
    assert Path(f"{stem}.png").read_bytes()[:4] == b"\x89PNG"


# the command


@pytest.mark.parametrize("part", [part for part in PARTS if part != "model"])
def test_help_of_a_part(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", part, "--help"])
    assert end.value.code == 0
    assert f"examples:\n  moetrain bench {part}" in re.sub(r"torchrun .*-m ", "", capsys.readouterr().out)


def test_help_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "qwen3-30b-a3b", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: moetrain bench [-h]") and "--activation-checkpointing" in text


@pytest.mark.parametrize("words", [["bench"], ["bench", "tiny", "--steps", "0"], ["bench", "tiny", "--gate", "best"]])
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2 and "usage: moetrain bench" in capsys.readouterr().err


def test_a_models_name_stands_where_a_part_may() -> None:
    assert name_part(["bench", "tiny", "--steps", "3"]) == ["bench", "model", "tiny", "--steps", "3"]
    assert name_part(["bench", "layer", "tiny"]) == ["bench", "layer", "tiny"]
    assert name_part(["bench", "--help"]) == ["bench", "--help"]
    assert name_part(["train", "tiny"]) == ["train", "tiny"]
    assert find_shape("tiny")["num_experts"] == 8


def test_one_process_end_to_end(tmp_path: Path) -> None:
    command = ["bench", "tiny", "--seq-len", "64", "--warmup", "3", "--steps", "2", "--against", "transformers"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-m", "moetrain", *command, "--processes", "1", "--profile", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "x the tokens per second of transformers" in result.stdout
    report = json.loads((tmp_path / "tiny-1x1x64-learned.json").read_text(encoding="utf-8"))
    native, ours = report["systems"]["transformers"], report["systems"]["moetrain"]
    assert report["command"].startswith("moetrain bench tiny --seq-len 64")
    assert report["ratio"]["tps"] == pytest.approx(ours["tps_per_gpu"] / native["tps_per_gpu"])
    assert ours["loss"] == pytest.approx(native["loss"], abs=3e-3)
    assert len(ours["step_ms"]) == 2 and ours["environment"]["versions"]["torch"] == torch.__version__
    assert ours["profile"]["steps"] == 2 and ours["profile"]["span_ms"] > 0
    assert native["profile"] is None
    assert profile.read_trace(tmp_path / "tiny-1x1x64-learned.trace.json.gz")
