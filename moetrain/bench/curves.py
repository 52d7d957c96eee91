"""Loss curves of moetrain and of plain Transformers: same checkpoint, same batches, same schedule.

    python -m moetrain.bench.curves configs/curves.yaml
    torchrun --nproc-per-node 4 -m moetrain.bench.curves configs/curves.yaml data.batch_size=2

moetrain runs the steps of `moetrain train`. Transformers runs on one GPU: bf16 weights and arithmetic, torch's fused
AdamW on an fp32 copy of the weights, as `optim.states: master`. It runs twice, the second time with each batch in two
passes, which is the same arithmetic in another order: how far its two curves lie apart is the noise of bf16, and
moetrain's should lie no further from them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from moetrain import mesh
from moetrain.config import RunConfig, load_config
from moetrain.create import find_checkpoint, load_tokenizer
from moetrain.data import build_data
from moetrain.metrics import FILE_NAME, read_records
from moetrain.optim import build_scheduler
from moetrain.prepare import DTYPES
from moetrain.trainer import count_labels, setup

MOETRAIN, NATIVE, OTHER = "moetrain", "transformers", "transformers, two passes a step"
LAST = 50
"""Steps at the end whose mean losses are compared."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to it")
    parser.add_argument("--out", default="runs/curves", metavar="DIR", help="for curves.json and curves.png")
    args = parser.parse_args(arguments)
    config = load_config(args.config, args.overrides)
    run = setup(config)
    for step in range(1, config.train.steps + 1):
        run.step(step)
    run.close()
    if mesh.rank() == 0:
        records = read_records(Path(config.output_dir) / FILE_NAME)
        curves = {MOETRAIN: [record["loss"] for record in records if record["kind"] == "step"]}
        curves[NATIVE] = native_losses(config, passes=1)
        curves[OTHER] = native_losses(config, passes=2)
        write(Path(args.out), curves, config)
    if dist.is_initialized():
        dist.destroy_process_group()


def native_losses(config: RunConfig, passes: int) -> list[float]:
    """Mean loss over the label tokens of each step, by plain Transformers in this process, on all ranks' batches."""
    directory = find_checkpoint(config.model.path)
    tokenizer = load_tokenizer(directory, config.model)
    device, world = mesh.device(), mesh.world_size()
    train_data = [
        build_data(
            config.data,
            tokenizer,
            dp_rank=rank,
            dp_size=world,
            seed=config.train.seed,
            cache_dir=Path(config.data.cache_dir or Path(config.output_dir) / "data"),
            progress=False,
        ).train
        for rank in range(world)
    ]
    torch.manual_seed(config.train.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[config.model.dtype], attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    model.to(device).train()  # type: ignore[arg-type]
    parameters = list(model.parameters())
    masters = [parameter.detach().float() for parameter in parameters]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [
            {"params": [m for m in masters if m.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [m for m in masters if m.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=device.type == "cuda",
    )
    scheduler = build_scheduler(optimizer, optim, config.train.steps)
    losses = []
    for _ in range(config.train.steps):
        batches = [next(data) for data in train_data for _ in range(config.train.grad_accum)]
        labels = torch.tensor(float(sum(count_labels(batch) for batch in batches)), device=device)
        total = torch.zeros((), device=device)
        for batch in split(batches, passes):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            loss = model(**inputs, num_items_in_batch=labels, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        if optim.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(masters, optim.max_grad_norm)
        optimizer.step()
        scheduler.step()
        torch._foreach_copy_([parameter.detach() for parameter in parameters], masters)
        losses.append(total.item())
    return losses


def split(batches: list[dict[str, torch.Tensor]], passes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Each batch in that many passes. The loss is divided by the labels of the whole step, so they do not change it."""
    for batch in batches:
        parts = {name: tensor.chunk(passes) for name, tensor in batch.items() if name in ARGUMENTS}
        for number in range(len(parts["labels"])):
            yield {name: tensors[number] for name, tensors in parts.items()}


ARGUMENTS = ("input_ids", "labels", "position_ids")
"""What plain Transformers takes of a batch; documents of a packed row it tells by their positions."""


def distances(curves: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How far each curve lies from `NATIVE`'s: mean over all steps, the most, and between means over the last."""
    base = curves[NATIVE]
    found = {}
    for name, losses in curves.items():
        gaps = [abs(a - b) for a, b in zip(losses, base, strict=True)]
        end = statistics.mean(losses[-LAST:]) - statistics.mean(base[-LAST:])
        found[name] = {"mean": statistics.mean(gaps), "most": max(gaps), "end": end, "last_loss": losses[-1]}
    return found


def write(out: Path, curves: dict[str, list[float]], config: RunConfig) -> None:
    """curves.json, curves.png and a table on the console."""
    out.mkdir(parents=True, exist_ok=True)
    apart = distances(curves)
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "ranks": mesh.world_size(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": config.model_dump(mode="json"),
    }
    text = json.dumps({"about": about, "distances": apart, "losses": curves}, indent=1)
    (out / "curves.json").write_text(text + "\n", encoding="utf-8")
    draw(out / "curves.png", curves, mesh.world_size())
    width = max(len(name) for name in curves)
    print(f"{'':{width}}  last loss  from transformers: mean    most  mean of the last {LAST}")
    for name, row in apart.items():
        print(f"{name:{width}}  {row['last_loss']:9.4f}  {row['mean']:23.4f}  {row['most']:6.4f}  {row['end']:+.4f}")


def draw(path: Path, curves: dict[str, list[float]], ranks: int) -> None:
    """The curves above, their differences from `NATIVE`'s below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=(2, 1), layout="constrained", dpi=130
    )
    colors = {MOETRAIN: "#2f6fde", NATIVE: "#24292f", OTHER: "#e8590c"}
    for name, losses in curves.items():
        steps = range(1, len(losses) + 1)
        style = {"color": colors[name], "linewidth": 1.3, "label": name}
        upper.plot(steps, losses, **style)
        if name != NATIVE:
            lower.plot(steps, [a - b for a, b in zip(losses, curves[NATIVE], strict=True)], **style)
    upper.set_ylabel("loss, nats a token")
    upper.set_title(f"moetrain on {ranks} GPU{'s' if ranks > 1 else ''}, plain Transformers on one", loc="left")
    upper.legend(frameon=False)
    lower.axhline(0, color="#8c959f", linewidth=0.8)
    lower.set_ylabel("minus transformers")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(color="#e7eaee")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
