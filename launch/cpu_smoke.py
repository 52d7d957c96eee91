"""Does the cluster run jobs at all? A tiny model from random weights, one rank on each of two nodes, minutes.

python launch/cpu_smoke.py --site cluster/site.toml --dry-run
python launch/cpu_smoke.py --nodes 16 parallel.ep_size=16
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.run import Run
from launch.submit import main

RUN = Run(
    name="cpu_smoke",
    nodes=2,
    gpus_per_node=1,
    time="30",
    config={
        "output_dir": "runs/cpu_smoke",
        "model": {
            "path": "runs/cpu_smoke/start",
            "dtype": "float32",
            "create": {
                "vocab_size": 512,
                "config": {
                    "model_type": "qwen3_moe",
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "intermediate_size": 128,
                    "moe_intermediate_size": 48,
                    "num_experts": 16,
                    "num_experts_per_tok": 2,
                    "max_position_embeddings": 256,
                },
            },
        },
        "parallel": {"ep_size": 2},
        "data": {"train": [{"path": "python:stdlib"}], "seq_len": 64},
        "optim": {"lr": 3e-3},
        "train": {"steps": 10, "eval_rows": 8},
        "checkpoint": {"every": 5},
    },
)

if __name__ == "__main__":
    sys.exit(main(RUN))
