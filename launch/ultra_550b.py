"""Fine-tune Nemotron-3-Ultra-550B-A55B on 16 nodes of 8 x H100 80GB: experts over 64 ranks, everything in bf16.

python launch/ultra_550b.py --nodes 16 --dry-run
python launch/ultra_550b.py --nodes 16 data.train='[{path: data/mine.jsonl, format: chat}]'
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.run import Run
from launch.submit import main
from moetrain.bench.shapes import LARGE

RUN = Run(
    name="ultra_550b",
    nodes=16,
    time="2-00:00:00",
    config={
        "output_dir": "runs/ultra_550b",
        "model": {
            "path": "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
            "dtype": "bfloat16",
            "activation_checkpointing": "full",
        },
        "parallel": {"ep_size": 64, "timeout_seconds": 1800},  # the first step loads 1.1 TB and compiles kernels
        "data": {
            "train": [{"path": "data/chats.jsonl", "format": "chat"}],
            "seq_len": 4096,
            "batch_size": 2,
        },
        "optim": {"lr": 1e-5, "states": "bf16_stochastic", "warmup_steps": 50},
        "train": {"steps": 2000, "eval_every": 200},
        "checkpoint": {"every": 100, "keep": 2},
    },
    architecture=LARGE["nemotron-3-ultra-550b-a55b"],
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
        "moe_latent_size": 32,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 96,
        "max_position_embeddings": 256,
    },
)

if __name__ == "__main__":
    sys.exit(main(RUN))
