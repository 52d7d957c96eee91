from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moetrain.config import OptimConfig
from moetrain.optim import build_optimizer, clip_factor, clip_grad_norm, grad_norm
from tests.ranks import run_ranks

LAYOUTS: dict[str, dict[str, int]] = {
    "ep over the world": {"fsdp_size": 4, "ep_size": 4},
    "ep x efsdp": {"fsdp_size": 4, "ep_size": 2},
    "hsdp": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
}
STATES = ["fp32", "master", "bf16_stochastic", "8bit"]
MAX_NORM = 0.5


def test_norm_clipping_and_updates_equal_one_process(tmp_path: Path) -> None:
    """Layouts of experts and dense parameters, uneven and empty shards, plain and sharded parameters together; and
    each kind of state saved, loaded and continued."""
    save_tiny_moe(tmp_path / "model")
    run_ranks(check_rank, 4, tmp_path)


def check_rank(rank: int, world: int, folder: Path) -> None:
    for name, sizes in LAYOUTS.items():
        model, reference = load_sharded(folder / "model", **sizes), load_plain(folder / "model")
        moe_backward(model, reference, rank, world)
        check_against_one_process(name, model, reference, clip_in_step=name == "hsdp")
    check_uneven_shards(rank)
    check_unsharded_parameters(rank)
    for states in STATES:
        check_saved_state(folder, states, "hsdp" if states == "bf16_stochastic" else "ep x efsdp")
    check_replicas_round_alike(folder)


def save_tiny_moe(folder: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=66,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def load_plain(folder: Path) -> Any:
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")


def load_sharded(folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    from transformers import Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig

    return Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", distributed_config=DistributedConfig(**sizes)
    )


def moe_backward(model: Any, reference: Any, rank: int, world: int) -> None:
    """The mean over ranks of a different batch each."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 66, (2, 9), generator=generator) for _ in range(world)]
    model(input_ids=batches[rank], labels=batches[rank]).loss.backward()
    for batch in batches:
        (reference(input_ids=batch, labels=batch).loss / world).backward()


def check_against_one_process(name: str, model: nn.Module, reference: nn.Module, clip_in_step: bool) -> None:
    expected = torch.cat([p.grad.double().flatten() for p in reference.parameters()]).norm().float()
    norm = grad_norm(model.parameters()) if clip_in_step else clip_grad_norm(model.parameters(), MAX_NORM)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0, msg=lambda m: f"{name}: {m}")
    assert expected > MAX_NORM
    norms = [torch.zeros_like(norm) for _ in range(dist.get_world_size())]
    dist.all_gather(norms, norm)
    assert all(torch.equal(norm, other) for other in norms), name

    references = dict(reference.named_parameters())
    for parameter_name, p in model.named_parameters():
        grad = references[parameter_name].grad
        grad.mul_(MAX_NORM / (expected + 1e-6))
        if not clip_in_step:
            torch.testing.assert_close(full(p.grad), grad, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    # steps that differ by rounding errors of the gradient's zeros are no concern here: a large eps hides them
    config = config.model_copy(update={"eps": 1e-3})
    build_optimizer(model, config).step(grad_factor=clip_factor(norm, MAX_NORM) if clip_in_step else None)
    build_optimizer(reference, config).step()
    for parameter_name, p in model.named_parameters():
        torch.testing.assert_close(full(p), references[parameter_name], rtol=1e-4, atol=1e-5)


def check_uneven_shards(rank: int) -> None:
    """5 and 3 rows over 4 ranks: shards of 2, 2, 1, 0 and of 1, 1, 1, 0 rows."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model.load_state_dict(reference.state_dict())
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    fully_shard(model, mesh=mesh)
    assert rank != 3 or all(p.to_local().numel() == 0 for p in model.parameters())
    inputs = torch.randn(4, 7, 6)
    model(inputs[rank]).square().sum().backward()
    (sum(reference(x).square().sum() for x in inputs) / 4).backward()
    check_against_one_process("uneven", model, reference, clip_in_step=True)


def check_unsharded_parameters(rank: int) -> None:
    """A plain parameter beside a sharded one; a rank whose sharded gradient is missing still joins."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    sharded = nn.Linear(8, 8, bias=False)
    fully_shard(sharded, mesh=mesh)
    plain = nn.Parameter(torch.zeros(3))
    plain.grad = torch.full((3,), 2.0)
    if rank != 1:
        local = torch.full((2, 8), float(rank + 1))
        sharded.weight.grad = DTensor.from_local(local, mesh, sharded.weight.placements, run_check=False)
    norm = clip_grad_norm([plain, *sharded.parameters()], None)
    assert norm.item() == pytest.approx((3 * 4 + 16 * (1 + 9 + 16)) ** 0.5)


def check_saved_state(folder: Path, states: str, layout: str) -> None:
    """Two steps, save, two more; and the same two after loading into a new model and optimizer."""
    dtype = torch.float32 if states == "fp32" else torch.bfloat16
    config = OptimConfig(lr=1e-2, states=states)

    def build() -> tuple[Any, Any]:
        model = load_sharded(folder / "model", dtype, **LAYOUTS[layout])
        return model, build_optimizer(model, config)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            for index, p in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(1000 * seed + index)
                p.grad = p.detach().clone()
                # replicas get equal gradients, as after a backward
                local = p.grad.to_local()
                local.copy_(torch.randn(local.shape, generator=generator))
            optimizer.step()

    model, optimizer = build()
    steps(model, optimizer, range(2))
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=folder / states)
    steps(model, optimizer, range(2, 4))

    other, resumed = build()
    template = get_optimizer_state_dict(other, build_optimizer(other, config))
    state = {"model": other.state_dict(), "optimizer": template}
    dcp.load(state, checkpoint_id=folder / states)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, resumed, state["optimizer"])
    steps(other, resumed, range(2, 4))
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local()), (states, name)
        for key, tensor in optimizer.state[p].items():
            assert torch.equal(local_of(tensor), local_of(resumed.state[q][key])), (states, name, key)


def check_replicas_round_alike(folder: Path) -> None:
    model = load_sharded(folder / "model", torch.bfloat16, **LAYOUTS["hsdp"])
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, states="bf16_stochastic"))
    torch.manual_seed(dist.get_rank())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        group = p.device_mesh.get_group("dp_replicate")
        copies = [torch.empty_like(p.to_local()) for _ in range(2)]
        dist.all_gather(copies, p.to_local(), group=group)
        assert torch.equal(*copies), name


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_of(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
