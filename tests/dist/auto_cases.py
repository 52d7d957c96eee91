"""Ranks' work for the tests of the auto classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, Qwen3Config
from transformers import AutoModelForCausalLM as PlainAutoModelForCausalLM
from transformers.distributed.sharding_utils import DtensorShardOperation

from moetrain import AutoModelForCausalLM, DistributedConfig
from moetrain.parallelize import checkpoint_activations
from tests.families import FAMILIES, batch, build


def save_plain(rank: int, family: str, folder: str, dtype: torch.dtype = torch.float32) -> Any:
    plain = build(family).to(dtype)
    if rank == 0:
        plain.save_pretrained(folder)
    dist.barrier()
    return plain


def load(folder: str, dtype: torch.dtype = torch.float32, **layout: Any) -> Any:
    config = DistributedConfig(**layout)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config).train()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def bytes_read(rank: int, world_size: int, folder: str) -> dict[str, int]:
    """Elements that this rank took from the checkpoint, of experts and of the rest, and those of the whole model."""
    plain = save_plain(rank, "qwen3_moe", folder)
    taken = {"experts": 0, "dense": 0}
    original = DtensorShardOperation.shard_tensor

    def counted(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        piece = original(self, source, *args, **kwargs)
        if piece is not None:
            taken["experts" if "ep" in (self.device_mesh.mesh_dim_names or ()) else "dense"] += piece.numel()
        return piece

    DtensorShardOperation.shard_tensor = counted
    try:
        load(folder, fsdp_size=world_size, ep_size=world_size)
    finally:
        DtensorShardOperation.shard_tensor = original
    sizes = {name: parameter.numel() for name, parameter in plain.named_parameters()}
    taken["all_experts"] = sum(size for name, size in sizes.items() if ".experts." in name)
    taken["all_dense"] = sum(size for name, size in sizes.items() if ".experts." not in name)
    return taken


def random_model(rank: int, world_size: int, family: str, layout: dict[str, Any]) -> dict[str, Any]:
    """A sharded model made from its configuration alone; what its weights look like."""
    torch.manual_seed(3)
    config = FAMILIES[family]()
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, distributed_config=DistributedConfig(**layout)
    )
    loss = model(**batch(rank), use_cache=False).loss
    loss.backward()
    torch.manual_seed(3)
    plain = PlainAutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
    spread = {}
    for name, parameter in model.named_parameters():
        expected, got = plain.get_parameter(name), full(parameter)
        spread[name] = (got.float().std().item(), expected.float().std().item(), got.numel())
    experts = next(p for name, p in model.named_parameters() if "experts" in name and name.endswith("down_proj"))
    return {
        "loss": loss.item(),
        "on_meta": [name for name, tensor in model.state_dict().items() if tensor.is_meta],
        "local": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()),
        "total": sum(p.numel() for p in plain.parameters()),
        "spread": spread,
        "expert_sums": full(experts).flatten(1).sum(1).tolist(),
        "dense_shard_sum": sum(
            p.to_local().double().sum().item() for n, p in model.named_parameters() if "experts" not in n
        ),
        "buffers": {n: (full(b) - plain.get_buffer(n)).abs().max().item() for n, b in model.named_buffers()},
    }


def random_weights(rank: int, world_size: int, families: list[str]) -> dict[str, dict[str, Any]]:
    """Models with tied embeddings, made from their configurations: loss, and the largest weight of a router."""
    results = {}
    for family in families:
        config = FAMILIES[family]()
        config.tie_word_embeddings = True
        layout = DistributedConfig(fsdp_size=world_size, ep_size=world_size)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, distributed_config=layout)
        routers = [full(p) for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
        loss = model(**batch(rank), use_cache=False).loss
        loss.backward()
        results[family] = {
            "loss": loss.item(),
            "routers": [(router.abs().max().item(), router.std().item()) for router in routers],
            "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        }
    return results


def checkpointed(rank: int, world_size: int, family: str, folder: str) -> dict[str, Any]:
    """Gradients and the number of exchanges of each mode of activation checkpointing."""
    save_plain(rank, family, folder)
    exchanges = 0
    original = dist.all_to_all_single

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal exchanges
        exchanges += 1
        return original(*args, **kwargs)

    results = {}
    dist.all_to_all_single = counted
    try:
        for mode in ("none", "full", "selective"):
            model = load(folder, fsdp_size=world_size, ep_size=world_size)
            checkpoint_activations(model, mode)
            exchanges = 0
            model(**batch(rank), use_cache=False).loss.backward()
            grads = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            results[mode] = (exchanges, grads)
    finally:
        dist.all_to_all_single = original
    reference = results["none"][1]
    return {
        mode: (count, max((grads[name] - grad).abs().max().item() for name, grad in reference.items()))
        for mode, (count, grads) in results.items()
    }


def dense_fallback(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """A dense model asked for expert parallelism: gradients against one process, and what was sharded how."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    plain = PlainAutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if rank == 0:
        plain.save_pretrained(folder)
    dist.barrier()
    model = load(folder, fsdp_size=world_size, ep_size=world_size)
    batches = [batch(seed) for seed in range(world_size)]
    plain(**{k: torch.cat([b[k] for b in batches]) for k in batches[0]}, use_cache=False).loss.backward()
    model(**batches[rank], use_cache=False).loss.backward()
    ours = dict(model.named_parameters())
    return {
        "gradients": max((full(ours[n].grad) - p.grad).abs().max().item() for n, p in plain.named_parameters()),
        "sharded": all(isinstance(p, DTensor) for p in ours.values()),
        "ep_size": model.config.distributed_config.ep_size,
    }


def bf16_parity(rank: int, world_size: int, families: list[str], folder: str) -> dict[str, tuple[float, float]]:
    """Distance of sharded bf16 from fp32, and of plain bf16 from fp32: largest relative gradient norm difference."""
    results = {}
    for family in families:
        where = str(Path(folder) / family.replace("+", "_"))
        plain = save_plain(rank, family, where)
        sharded = load(where, torch.bfloat16, fsdp_size=world_size, ep_size=world_size)
        rounded = build(family).to(torch.bfloat16)
        batches = [batch(seed) for seed in range(world_size)]
        whole = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
        for model, inputs in ((plain, whole), (rounded, whole), (sharded, batches[rank])):
            model(**inputs, use_cache=False).loss.backward()
        exact = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        distances = [
            _distance(exact, {n: full(p.grad).float() for n, p in model.named_parameters() if p.grad is not None})
            for model in (sharded, rounded)
        ]
        results[family] = (distances[0], distances[1])
    return results


def _distance(exact: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> float:
    error = sum((got[name] - exact[name]).square().sum().item() for name in exact)
    return float((error / sum(grad.square().sum().item() for grad in exact.values())) ** 0.5)


def refuses(rank: int, world_size: int, folder: str) -> str:
    """The message for an ep_size that does not divide the experts."""
    if rank == 0:
        config = AutoConfig.for_model("qwen3_moe", num_experts=9, num_hidden_layers=1, hidden_size=32, vocab_size=128)
        config.save_pretrained(folder)
        PlainAutoModelForCausalLM.from_config(config).save_pretrained(folder)
    dist.barrier()
    try:
        load(folder, fsdp_size=world_size, ep_size=world_size)
    except ValueError as error:
        return str(error)
    return ""


def dropped_weights(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Load a checkpoint with prediction layers that Transformers does not build, save it, and compare the files."""
    results = {}
    for family, extra in (("nemotron_h", "mtp.layers.0.norm.weight"), ("deepseek_v3", "model.layers.3.eh_proj.weight")):
        where = Path(folder) / family
        save_plain(rank, family, str(where / "source"))
        if rank == 0:
            file = where / "source" / "model.safetensors"
            tensors = load_file(file) | {extra: torch.arange(6.0, dtype=torch.bfloat16).view(2, 3)}
            save_file(tensors, file, metadata={"format": "pt"})
        dist.barrier()
        model = load(str(where / "source"), fsdp_size=world_size, ep_size=world_size)
        model.save_pretrained(where / "saved")
        saved: dict[str, torch.Tensor] = {}
        for path in (where / "saved").glob("*.safetensors"):
            saved |= load_file(path)
        source = load_file(where / "source" / "model.safetensors")
        results[family] = {
            "kept": list(model.dropped_weights.tensors),
            "same": saved.keys() == source.keys() and all(torch.equal(saved[key], source[key]) for key in source),
        }
    return results


def image_text(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """A vision-language MoE with experts over two ranks, fed text: logits against one process, and its save."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    from moetrain import AutoModelForImageTextToText

    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4,
        "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision: dict[str, Any] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    torch.manual_seed(0)
    plain = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision)).float()
    if rank == 0:
        plain.save_pretrained(folder + "/source")
    dist.barrier()
    layout = DistributedConfig(fsdp_size=world_size, ep_size=world_size)
    model = AutoModelForImageTextToText.from_pretrained(
        folder + "/source", dtype=torch.float32, distributed_config=layout
    )
    inputs = batch(rank)
    with torch.no_grad():
        difference = (model(**inputs).logits - plain(**inputs).logits).abs().max().item()
    model.save_pretrained(folder + "/saved")
    again = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder + "/saved", dtype=torch.float32).state_dict()
    return {
        "class": type(model).__name__.removeprefix("FSDP"),
        "logits": difference,
        "same": all(torch.equal(again[name], tensor) for name, tensor in plain.state_dict().items()),
    }
