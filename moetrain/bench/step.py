"""Tokens per second of a training step at a published model's real shape, with random weights made on the GPUs.

    torchrun --nproc-per-node 8 -m moetrain.bench.step qwen3-30b-a3b [--batch 1] [--gate learned] [--layers N]

The method of NVIDIA's published comparison: TPS per GPU = tokens / (forward + loss + backward), mean of the timed steps
after the warm-up, the optimizer outside the time but run, so that its states count in the memory.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, PretrainedConfig

from moetrain import mesh
from moetrain.auto import AutoModelForCausalLM
from moetrain.config import OptimConfig
from moetrain.loss import install_loss
from moetrain.moe.balance import LoadStats
from moetrain.moe.layer import ep_implementation
from moetrain.moe.router import set_gate
from moetrain.optim import build_optimizer, clip_grad_norm
from moetrain.parallelize import checkpoint_activations

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "tiny": {
        "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64,
        "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip
"""Configurations of the published models; `tiny` is for trying this script on a CPU."""


def bench_step(config: PretrainedConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time the steps; one result, the same on every rank."""
    device, world = mesh.device(), mesh.world_size()
    torch.manual_seed(0)
    layout = mesh.layout(world, args.ep_size or world, 1, ep_implementation(args.dispatch)) if world > 1 else None
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa", distributed_config=layout
    )
    if layout is None:
        model.to(device)
    model.train()
    install_loss(model)
    set_gate(model, args.gate)
    stats = LoadStats.attach(model)
    checkpoint_activations(model, args.activation_checkpointing)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-6, states="bf16_stochastic"))

    generator = torch.Generator().manual_seed(mesh.rank())
    ids = torch.randint(config.vocab_size, (args.batch, args.seq_len), generator=generator).to(device)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    for step in range(args.warmup + args.steps):
        marks = [_now(device)]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        marks.append(_now(device))
        loss.backward()
        marks.append(_now(device))
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(_now(device))
        if step >= args.warmup:
            for name, start, end in zip(times, marks, marks[1:], strict=False):
                times[name].append(end - start)
    load = stats.read()
    seconds = {name: _mean_over_ranks(sum(values) / len(values), device) for name, values in times.items()}
    tokens = args.batch * args.seq_len
    timed = seconds["forward"] + seconds["backward"]
    return {
        "model": args.model,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "world": world,
        "tokens_per_gpu": tokens,
        "gate": args.gate,
        "dispatch": args.dispatch,
        "activation_checkpointing": args.activation_checkpointing,
        "tps_per_gpu": tokens / timed,
        "tps_per_gpu_with_optimizer": tokens / (timed + seconds["optimizer"]),
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        "load_max_over_mean": load.max_over_mean,
        "loss": loss.item(),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _mean_over_ranks(value: float, device: torch.device) -> float:
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item() / dist.get_world_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--batch", type=int, default=1, help="sequences per GPU")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--gate", choices=("learned", "random", "sequential"), default="learned")
    parser.add_argument("--dispatch", default="auto")
    parser.add_argument("--ep-size", type=int, help="default: all ranks")
    parser.add_argument("--activation-checkpointing", choices=("none", "full", "selective"), default="none")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    shape = SHAPES[args.model] | ({"num_hidden_layers": args.layers} if args.layers else {})
    device = mesh.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if mesh.world_size() > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
        )
    result = bench_step(AutoConfig.for_model(**shape), args)
    if mesh.rank() == 0:
        print(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
