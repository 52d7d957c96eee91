"""Fine-tune Qwen3-30B-A3B on one node of 8 x H100 80GB, or on more: experts stay inside a node.

python launch/qwen3_30b.py --dry-run
python launch/qwen3_30b.py --nodes 4 parallel.dp_replicate_size=4
python launch/qwen3_30b.py --array optim.lr=1e-5,2e-5,5e-5%2
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.run import Run
from launch.submit import main
from moetrain.bench.shapes import SHAPES

RUN = Run(
    name="qwen3_30b",
    nodes=1,
    time="12:00:00",
    config={
        "output_dir": "runs/qwen3_30b",
        "model": {
            "path": "Qwen/Qwen3-30B-A3B",
            "dtype": "bfloat16",
            "activation_checkpointing": "selective",
        },
        "parallel": {"ep_size": 8},
        "data": {
            "train": [{"path": "data/chats.jsonl", "format": "chat"}],
            "seq_len": 4096,
            "batch_size": 2,
        },
        "optim": {"lr": 1e-5, "states": "bf16_stochastic", "warmup_steps": 50},
        "train": {"steps": 2000, "eval_every": 200},
        "checkpoint": {"every": 200, "keep": 2},
    },
    architecture=SHAPES["qwen3-30b-a3b"],
    small={
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "moe_intermediate_size": 48,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 256,
    },
)

if __name__ == "__main__":
    sys.exit(main(RUN))
