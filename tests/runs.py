"""A tiny training run for tests: text, a checkpoint and a configuration, all in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moetrain.config import RunConfig, parse_config

MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}


def write_text(folder: Path, documents: int = 40) -> Path:
    """Documents that a tiny model learns from within a few steps."""
    path = folder / "text.jsonl"
    lines = [
        json.dumps({"text": f"def f{i % 7}(x):\n    return x + {i % 5}\n\n" * (3 + i % 4) + f"# end of part {i}\n"})
        for i in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_run(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration as a mapping; `sections` are merged into it."""
    raw: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "model": {
            "path": str(folder / "start"),
            "dtype": "float32",
            "create": {"vocab_size": 300, "config": dict(MODEL)},
        },
        "data": {"train": [{"path": str(folder / "text.jsonl")}], "seq_len": 32, "batch_size": 2},
        "optim": {"lr": 3e-3},
        "train": {"steps": 6, "eval_rows": 4},
    }
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return raw


def tiny_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    return parse_config(tiny_run(folder, **sections))


def records(folder: Path, kind: str = "step") -> dict[int, dict[str, Any]]:
    """The records of metrics.jsonl by step."""
    lines = (folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    parsed = [json.loads(line) for line in lines]
    return {record["step"]: record for record in parsed if record.get("kind") == kind}
