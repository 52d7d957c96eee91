"""A stopped run goes on bit by bit as the one that was not; other layouts read its checkpoint; it becomes a model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from moetrain.checkpoint import (
    check_checkpoint,
    export_run,
    find_dropped,
    find_latest,
    load_state,
    prune,
    save_hf,
    save_state,
    verify_checksums,
)
from moetrain.config import OptimConfig
from moetrain.optim import build_optimizer
from tests.families import VOCAB, build, randomize, tiny
from tests.ranks import run_ranks

LAYOUTS: dict[int, dict[str, Any]] = {2: {"fsdp_size": 2, "ep_size": 2}, 4: {"fsdp_size": 4, "ep_size": 2}}
FAMILY = {2: "qwen3_moe", 4: "deepseek_v3"}
STEPS = 6
# Three experts a rank in two shards, head norms of 6 in four: rows of 2, 1 and 0 on some ranks.
UNEVEN = {"num_experts": 6, "num_local_experts": 6, "head_dim": 6}


class Run:
    """The smallest training loop that draws on every generator there is."""

    def __init__(self, folder: Path, of_ranks: int, seed: int = 0) -> None:
        """The run that `of_ranks` ranks made, on as many ranks as there are now."""
        config = DistributedConfig(**LAYOUTS[dist.get_world_size()])
        self.source = folder / FAMILY[of_ranks]
        # one with bf16 parameters and fp32 copies; the other with torch's AdamW, whose state appears at the first step
        dtype = torch.bfloat16 if of_ranks == 4 else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype, distributed_config=config).train()
        self.optimizer: torch.optim.Optimizer
        if of_ranks == 4:
            self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-2, states="master", weight_decay=0.1))
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.seen = 0
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed + dist.get_rank())

    def step(self) -> float:
        row = random.randrange(3) + int(np.random.randint(3)) + 3
        tokens = torch.randint(3, VOCAB, (2, 4 + row))
        loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.seen += row
        return float(loss.detach())

    def save(self, root: Path, step: int) -> Path:
        return save_state(
            root,
            step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            data_state={"seen": self.seen, "rank": dist.get_rank()},
            dropped=find_dropped(self.model, check_checkpoint(self.source)),
            extra={"steps": STEPS},
        )

    def load(self, path: Path) -> Any:
        state = load_state(path, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)
        self.seen = state.data_state["seen"]
        return state

    def dump(self, path: Path) -> Path:
        """Write every tensor of model and optimizer, whole; the file's path."""
        found = dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            found |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        save_file({name: _whole(tensor) for name, tensor in found.items()}, path)
        return path


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _train_and_save(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    whole = Run(folder, world_size)
    losses = [whole.step() for _ in range(STEPS)]
    first = Run(folder, world_size)
    assert [first.step() for _ in range(STEPS // 2)] == losses[: STEPS // 2]
    root = folder / f"run{world_size}"
    path = first.save(root, STEPS // 2)
    middle = first.dump(folder / f"middle{world_size}-{rank}")
    save_hf(
        first.model, folder / f"export{world_size}", extra=find_dropped(first.model, check_checkpoint(first.source))
    )
    for step in (10, 20, 30):
        first.save(root, step)
    prune(root, keep=2)
    kept = sorted(p.name for p in root.iterdir())
    assert find_latest(root) == root / "step-00000030"
    first.save(folder / f"keep{world_size}", STEPS // 2)
    return {
        "losses": losses,
        "final": whole.dump(folder / f"final{world_size}-{rank}"),
        "middle": middle,
        "kept": kept,
        "path": path.name,
    }


def _resume(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    other = 6 - world_size
    run = Run(folder, world_size, seed=1)  # other random states than the run that it continues
    path = find_latest(folder / f"keep{world_size}")
    assert path is not None
    state = run.load(path)
    assert (state.step, state.extra, state.resharded) == (STEPS // 2, {"steps": STEPS}, False)
    assert state.data_state["rank"] == rank
    losses = [run.step() for _ in range(STEPS // 2)]
    final = run.dump(folder / f"resumed{world_size}-{rank}")

    moved = Run(folder, other, seed=1)
    state = moved.load(folder / f"keep{other}" / f"step-{STEPS // 2:08d}")
    assert state.resharded and state.data_state["rank"] == 0
    tensors, lr = moved.dump(folder / f"moved{world_size}-{rank}"), moved.scheduler.get_last_lr()
    moved.step()
    return {"losses": losses, "final": final, "moved": tensors, "lr": lr}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any], dict[int, Any]]:
    """(folder, what the ranks of each world wrote, what they found again), for worlds of 2 and 4 ranks."""
    folder = tmp_path_factory.mktemp("state")
    build("deepseek_v3").save_pretrained(folder / "deepseek_v3")
    uneven = AutoModelForCausalLM.from_config(tiny("qwen3_moe", **UNEVEN))
    randomize(uneven)
    uneven.save_pretrained(folder / "qwen3_moe")
    written = {world: run_ranks(_train_and_save, world, folder) for world in (2, 4)}
    found = {world: run_ranks(_resume, world, folder) for world in (2, 4)}
    return folder, written, found


@pytest.mark.parametrize("world", [2, 4])
def test_resumed_run_is_bit_equal(runs: Any, world: int) -> None:
    _, written, found = runs
    for before, after in zip(written[world], found[world], strict=True):
        assert after["losses"] == before["losses"][STEPS // 2 :]
        assert_same(after["final"], before["final"])
    # each rank draws its own tokens, so a swap of random states between ranks would show
    assert len({tuple(of_rank["losses"]) for of_rank in written[world]}) == world


@pytest.mark.parametrize("world", [2, 4])
def test_other_layout_reads_the_same_tensors(runs: Any, world: int) -> None:
    _, written, found = runs
    for of_rank in found[world]:
        assert_same(of_rank["moved"], written[6 - world][0]["middle"])
        assert of_rank["lr"] == [pytest.approx(1e-2 / (1 + STEPS // 2))] * len(of_rank["lr"])


@pytest.mark.parametrize("world", [2, 4])
def test_prune_keeps_the_newest(runs: Any, world: int) -> None:
    _, written, _ = runs
    assert all(of_rank["kept"] == ["step-00000020", "step-00000030"] for of_rank in written[world])


@pytest.mark.parametrize("world", [2, 4])
def test_export_of_a_checkpoint_equals_the_export_of_the_run(runs: Any, world: int, tmp_path: Path) -> None:
    folder, _, _ = runs
    export_run(folder / f"keep{world}" / f"step-{STEPS // 2:08d}", tmp_path / "out", max_shard_bytes=50_000)
    expected = check_checkpoint(folder / f"export{world}")
    info = check_checkpoint(tmp_path / "out")
    verify_checksums(info)
    assert info.tensors.keys() == expected.tensors.keys()
    for name in info.tensors:
        assert torch.equal(read(info, name), read(expected, name)), name
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (folder / f"export{world}" / name).read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(parameter).all() for parameter in again.parameters())


def test_one_process_reads_a_sharded_checkpoint(runs: Any) -> None:
    folder, written, _ = runs
    model = AutoModelForCausalLM.from_pretrained(folder / FAMILY[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    state = load_state(folder / "keep2" / f"step-{STEPS // 2:08d}", model=model, optimizer=optimizer)
    assert state.resharded and state.data_state == {"seen": state.data_state["seen"], "rank": 0}
    got = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        got |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    assert_same(got, written[2][0]["middle"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / (1 + STEPS // 2))


def assert_same(got: Path | dict[str, torch.Tensor], expected: Path) -> None:
    ours, theirs = load_file(got) if isinstance(got, Path) else got, load_file(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def read(info: Any, name: str) -> torch.Tensor:
    with safe_open(info.directory / info.tensors[name].file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor
