"""What the benchmark prints and writes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from moetrain.bench import compare, output
from moetrain.bench.isolate import Failure
from moetrain.bench.rows import ON_CPU
from moetrain.bench.systems import Case


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
    assert text.rstrip().endswith(ON_CPU)
    on_gpu = printed({"moetrain": measurement(environment={"gpu": "NVIDIA H200", "versions": {}})})
    assert "4,000" in on_gpu and "CPU" not in on_gpu
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
