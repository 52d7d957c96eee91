"""The training loop, to be read from top to bottom.

    train    setup -> resume -> evaluate -> steps -> save -> export
    step     batches -> forward, loss, backward -> clip -> check -> optimizer -> metrics

Loss and gradients of a step are means over the label tokens of all ranks and passes together: each pass returns its
sum of token losses times `dp_size / label_tokens`, and the sharded backward averages over the `dp_size` data ranks.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from moetrain import mesh
from moetrain.attention import explain_attention
from moetrain.checkpoint import (
    check_checkpoint,
    find_latest,
    load_state,
    prune,
    save_hf,
    save_state,
    verify_checksums,
)
from moetrain.config import RunConfig
from moetrain.create import (
    check_layout,
    create_checkpoint,
    find_checkpoint,
    load_model_config,
    load_tokenizer,
    meta_model,
)
from moetrain.data import Data, build_data, check_vocabulary, isolate_documents, training_texts
from moetrain.graph import Passes
from moetrain.guard import Guard, check_writable
from moetrain.loss import without_logits
from moetrain.metrics import EvalRecord, Metrics, StepRecord
from moetrain.moe.balance import BiasUpdate, LoadStats
from moetrain.optim import AdamW, build_scheduler, clip_factor, grad_norm, keep_settings
from moetrain.prepare import (
    build_model,
    check_resume,
    continue_text,
    describe,
    keep_quiet,
    start_process_group,
    step_parts,
)


def train(config: RunConfig) -> bool:
    """Run one training from its configuration, in this process and those that the launcher started with it.

    Returns whether it is done, on every rank: False when a signal stopped it and the same command goes on from there.

    Raises:
        ValueError: the configuration does not fit the model, the data or the machine; nothing has been written yet.
        FloatingPointError: the loss or the gradient norm is not finite; the optimizer has not seen it.
    """
    run = setup(config)
    try:
        step = run.resume()
        if step >= config.train.steps:
            run.metrics.say(f"nothing left to train: {step} steps are done, train.steps is {config.train.steps}")
        elif step == 0:
            run.evaluate(step)
        while step < config.train.steps and not run.should_stop():
            step += 1
            run.step(step)
            if config.train.eval_every and step % config.train.eval_every == 0 and step < config.train.steps:
                run.evaluate(step)
            if config.checkpoint.every and step % config.checkpoint.every == 0 and step < config.train.steps:
                run.save(step)
        if run.guard.signalled:
            run.save(step)  # and nothing else: who sends SIGTERM does not wait long
            run.metrics.say(f"stopped by {run.guard.signalled} after step {step}; the same command goes on from there")
            return False
        if step < config.train.steps:
            run.metrics.say(f"train.max_minutes={config.train.max_minutes} is over after step {step}")
        run.evaluate(step)
        run.save(step)
        if config.checkpoint.export:
            run.export()
        return True
    finally:
        run.close()


@dataclass
class Run:
    """What a step needs. Made by `setup`."""

    config: RunConfig
    device: torch.device
    model: PreTrainedModel
    passes: Passes
    tokenizer: Any
    data: Data
    optimizer: AdamW
    scheduler: torch.optim.lr_scheduler.LambdaLR
    stats: LoadStats
    bias_update: BiasUpdate | None
    guard: Guard
    metrics: Metrics
    started: float = dataclasses.field(default_factory=time.monotonic)
    saved_step: int | None = None
    """Step of the newest training checkpoint."""
    evaluated_step: int | None = None

    def step(self, step: int) -> None:
        """One optimizer step: forward and backward of each pass, clip, check, update, record."""
        begin = time.perf_counter()
        passes = [next(self.data.train) for _ in range(self.config.train.grad_accum)]
        label_tokens = self.global_sum(sum(count_labels(batch) for batch in passes))
        loss = self.forward_backward(passes, label_tokens)
        while self.passes.overflowed():
            self.stats.discard()
            loss = self.forward_backward(passes, label_tokens)
        norm_on_device = grad_norm(self.model.parameters())
        mean_loss, norm = self.mean_over_ranks(loss), norm_on_device.item()
        self.guard.check_finite(step, mean_loss, norm)
        lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step(grad_factor=clip_factor(norm_on_device, self.config.optim.max_grad_norm))
        self.scheduler.step()
        balance = self.stats.read()
        if self.bias_update is not None:
            self.bias_update.step()

        seconds = time.perf_counter() - begin
        seen = sum(batch["input_ids"].numel() for batch in passes) * mesh.world_size()
        self.guard.beat(step)
        self.metrics.step(
            StepRecord(
                step=step,
                loss=mean_loss,
                grad_norm=norm,
                lr=lr,
                tokens=int(label_tokens),
                tokens_per_second=seen / seconds,
                step_seconds=seconds,
                memory_bytes=memory_bytes(),
                expert_load_max_over_mean=balance.max_over_mean,
                idle_experts=balance.idle_experts,
                load_entropy=balance.entropy,
            )
        )

    def forward_backward(self, batches: list[dict[str, Tensor]], label_tokens: float) -> Tensor:
        """Gradients of a step's passes; returns this rank's share of the step's loss."""
        # an empty pass (padding only) still runs: its ranks' collectives belong to everyone
        scale = max(label_tokens, 1.0) / mesh.world_size()
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            loss += self.passes(batch, scale, accumulate=number > 0)
        return loss

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Mean loss over the label tokens of the validation rows, the same rows each time and for any world."""
        if step == self.evaluated_step:
            return
        self.evaluated_step = step
        self.model.eval()
        total, tokens = torch.zeros((), device=self.device), 0
        one = torch.ones((), device=self.device)
        with self.stats.paused(), self.passes.uncut(), without_logits(self.model):
            for batch in self.data.validation.rows(self.config.train.eval_rows):
                total += self.model(**self.to_device(batch), num_items_in_batch=one, use_cache=False).loss
                tokens += count_labels(batch)
        self.model.train()
        all_tokens = self.global_sum(tokens)
        loss = self.global_sum(total.item()) / max(all_tokens, 1.0)
        self.guard.beat(step)
        self.metrics.eval(EvalRecord(step=step, loss=loss, tokens=int(all_tokens)))

    def should_stop(self) -> bool:
        """Whether all ranks stop here: a signal reached one of them, or the time is up."""
        limit = self.config.train.max_minutes
        timed_out = limit is not None and time.monotonic() - self.started > 60 * limit
        return self.guard.should_stop(timed_out)

    def save(self, step: int) -> None:
        """Training checkpoint of all ranks, committed last, then the old ones go."""
        if step == self.saved_step:
            return
        save_state(
            self.checkpoints,
            step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            data_state=self.data.train.state_dict(),
            tokenizer=self.tokenizer,
            dropped=self.model.dropped_weights,
        )
        prune(self.checkpoints, self.config.checkpoint.keep)
        self.saved_step = step
        self.guard.beat(step)

    def resume(self) -> int:
        """Continue from the newest complete checkpoint, or the one that is named; the number of steps done."""
        choice = self.config.checkpoint.resume
        if choice == "never":
            return 0
        path = find_latest(self.checkpoints) if choice == "auto" else Path(choice)
        if path is None:
            return 0
        with keep_settings(self.optimizer, self.scheduler):
            state = load_state(path, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)
        self.data.train.load_state_dict(state.data_state)
        self.metrics.resume(state.step)
        self.metrics.say(f"goes on from {path}, step {state.step} of {self.config.train.steps}")
        self.saved_step = state.step if path.parent == self.checkpoints.absolute() else None
        return state.step

    def export(self) -> None:
        """Standard Hugging Face checkpoint, with its tokenizer."""
        out = self.output_dir / "model"
        save_hf(self.model, out, extra=self.model.dropped_weights, tokenizer=self.tokenizer)
        prompt = self.config.train.sample_prompt
        if prompt is not None and mesh.rank() == 0:
            self.metrics.say(f"\nplain Transformers continues {prompt!r} from {out}:\n")
            self.metrics.say(continue_text(out, prompt))
        barrier()

    def close(self) -> None:
        self.passes.close()
        self.metrics.close()
        self.guard.close()

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def global_sum(self, value: float) -> float:
        """Sum of a number over all ranks."""
        if not dist.is_initialized():
            return float(value)
        tensor = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.item()

    def mean_over_ranks(self, value: Tensor) -> float:
        return self.global_sum(value.item()) / mesh.world_size()


def setup(config: RunConfig) -> Run:
    """Everything before the first step. Cheap checks come first, so that a mistake costs seconds, then the data, whose
    tokens are kept for the next try, then the weights. What an earlier run has left stays untouched."""
    keep_quiet()
    device = start_process_group(config)
    output_dir = Path(config.output_dir)
    mesh.layout(mesh.world_size(), config.parallel.ep_size, config.parallel.dp_replicate_size)
    check_resume(config.checkpoint.resume)
    if mesh.rank() == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        check_writable(output_dir)
        if config.model.create is not None:
            texts = training_texts(config.data)
            create_checkpoint(Path(config.model.path), config.model.create, texts, config.train.seed)
    barrier()
    directory = find_checkpoint(config.model.path)
    checkpoint = check_checkpoint(directory)
    model_config = load_model_config(directory, config.model)
    tokenizer = load_tokenizer(directory, config.model)
    check_vocabulary(tokenizer, model_config)
    check_layout(meta_model(model_config, config.model), mesh.world_size(), config.parallel)
    data = build_data(
        config.data,
        tokenizer,
        dp_rank=mesh.rank(),
        dp_size=mesh.world_size(),
        seed=config.train.seed,
        cache_dir=Path(config.data.cache_dir or output_dir / "data"),
        progress=mesh.rank() == 0,
    )
    metrics = Metrics(
        config.metrics,
        output_dir,
        mesh.rank(),
        config.train.steps,
        info={"vocab_size": len(tokenizer), "world_size": mesh.world_size(), "data": data.summary},
    )

    verify_checksums(checkpoint)
    torch.manual_seed(config.train.seed)
    model = build_model(config, directory)
    if config.data.packing and config.data.document_mask:
        isolate_documents(model, max(data.summary[use]["max_documents_in_row"] for use in ("train", "validation")))
    metrics.say(describe(model, data))
    for choice in explain_attention(model, documents=config.data.packing and config.data.document_mask):
        metrics.say(str(choice))
    parts = step_parts(model, config)
    for note in parts.notes:
        metrics.say(note)
    rate = config.balance.bias_update_rate
    return Run(
        config=config,
        device=device,
        model=model,
        passes=parts.passes,
        tokenizer=tokenizer,
        data=data,
        optimizer=parts.optimizer,
        scheduler=build_scheduler(parts.optimizer, config.optim, config.train.steps),
        stats=parts.stats,
        bias_update=BiasUpdate(model, rate, parts.stats) if rate else None,
        guard=Guard(output_dir, mesh.rank(), hang_seconds=config.parallel.timeout_seconds / 2),
        metrics=metrics,
    )


def count_labels(batch: dict[str, Tensor]) -> int:
    """Tokens that carry loss: the model predicts position i+1 from i, so the first column never does."""
    return int((batch["labels"][:, 1:] != -100).sum())


def memory_bytes() -> int:
    """Peak allocated on the GPU, or the peak resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
