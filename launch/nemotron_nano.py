"""Fine-tune Nemotron-3-Nano-30B-A3B on one node of 8 x H100 80GB, or on more: experts stay inside a node.

python launch/nemotron_nano.py --dry-run
python launch/nemotron_nano.py --nodes 4 data.train='[{path: data/mine.jsonl, format: chat}]'
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.run import Run
from launch.submit import main
from moetrain.bench.shapes import SHAPES

RUN = Run(
    name="nemotron_nano",
    nodes=1,
    time="12:00:00",
    config={
        "output_dir": "runs/nemotron_nano",
        "model": {
            "path": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            "dtype": "bfloat16",
            "activation_checkpointing": "selective",
        },
        "parallel": {"ep_size": 8},
        "data": {
            "train": [{"path": "data/chats.jsonl", "format": "chat"}],
            "seq_len": 4096,
            "batch_size": 4,
        },
        "optim": {"lr": 1e-5, "states": "bf16_stochastic", "warmup_steps": 50},
        "train": {"steps": 2000, "eval_every": 200},
        "checkpoint": {"every": 200, "keep": 2},
    },
    architecture=SHAPES["nemotron-3-nano-30b-a3b"],
    small={
        "hidden_size": 64,
        "hybrid_override_pattern": "ME*ME",
        "num_attention_heads": 4,
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 96,
        "max_position_embeddings": 256,
    },
)

if __name__ == "__main__":
    sys.exit(main(RUN))
