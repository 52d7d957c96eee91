"""A trace taken apart: steps, parts, communication that nothing hides."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from moetrain.bench import profile


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
