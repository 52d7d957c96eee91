"""The training loop, to be read from top to bottom.

    train    setup -> resume -> evaluate -> steps -> save -> export
    step     batches -> forward, loss, backward -> norm -> readback -> check -> optimizer -> metrics

The host waits for the device once in a step, at the readback; the optimizer's work goes on behind it.

Loss and gradients of a step are means over the label tokens of all ranks and passes together: each pass returns its
sum of token losses times `dp_size / label_tokens`, and the sharded backward averages over the `dp_size` data ranks.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from moetrain import facts, mesh
from moetrain.attention import explain_attention
from moetrain.checkpoint import (
    check_checkpoint,
    load_state,
    prune,
    save_hf,
    save_state,
    set_aside,
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
from moetrain.metrics.device import DeviceTimes
from moetrain.metrics.sinks import check_sinks
from moetrain.moe.balance import BiasUpdate, LoadStats
from moetrain.moe.dispatch.static import forget_exchanges
from moetrain.optim import AdamW, build_scheduler, clip_factor, grad_norm, keep_settings
from moetrain.prepare import (
    begun_by,
    build_model,
    check_resume,
    continue_text,
    describe,
    first_checkpoint,
    keep_quiet,
    start_process_group,
    step_parts,
)
from moetrain.readback import Readback, StepNumbers, copy_to_host, over_ranks


def train(config: RunConfig, expect: facts.Expect | None = None) -> bool:
    """Run one training from its configuration, in this process and those that the launcher started with it.

    Returns whether it is done, on every rank: False when a signal stopped it and the same command goes on from there.

    Args:
        expect: called on rank 0; what monitoring holds the run against.

    Raises:
        ValueError: the configuration does not fit the model, the data or the machine; nothing has been written yet.
        FloatingPointError: the loss or the gradient norm is not finite; the optimizer has not seen it.
    """
    run = setup(config, expect)
    try:
        try:
            step = run.resume()
        except ValueError:
            run.metrics.refuse()
            raise
        if step >= config.train.steps:
            run.metrics.say(f"nothing left to train: {step} steps are done, train.steps is {config.train.steps}")
        elif step == 0:
            run.evaluate(step)
        stop = run.should_stop()
        while step < config.train.steps and not stop:
            step += 1
            stop = run.step(step)
            if step < config.train.steps and run.pause(step):
                stop = run.should_stop()
        if run.guard.signalled:
            run.metrics.event("stop", step, signal=run.guard.signalled)
            run.save(step)  # and nothing else: who sends SIGTERM does not wait long
            run.metrics.say(f"stopped by {run.guard.signalled} after step {step}; the same command goes on from there")
            run.metrics.finish()
            return False
        if step < config.train.steps:
            run.metrics.event("stop", step, signal="time limit")
            run.metrics.say(f"train.max_minutes={config.train.max_minutes} is over after step {step}")
        run.evaluate(step)
        run.save(step)
        run.metrics.done(step)
        if config.checkpoint.export:
            run.export()
        forget_exchanges()
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
    readback: Readback
    times: DeviceTimes
    own_seconds: float = 0.0
    """Own computation of this rank in the step before."""
    started: float = dataclasses.field(default_factory=time.monotonic)
    saved_step: int | None = None
    """Step of the newest training checkpoint."""
    begun: dict[str, str] = dataclasses.field(default_factory=dict)
    """How it began, for its checkpoints to tell."""
    evaluated_step: int | None = None

    def step(self, step: int) -> bool:
        """One optimizer step: forward and backward of each pass, clip, check, update, record. Whether to stop then."""
        begin, own = time.perf_counter(), self.metrics.own_seconds()
        with self.metrics.phase("data_wait"):
            passes = [next(self.data.train) for _ in range(self.config.train.grad_accum)]
        labels, seen = sum(map(count_labels, passes)), sum(map(count_tokens, passes))
        with self.metrics.phase("forward_backward"), self.times.measured():
            numbers, norm, redos = self.exact_gradients(passes, self.readback.count(labels, seen))
        for name, spent in self.times.take().items():
            self.metrics.move(spent, "forward_backward", name)
        self.check_finite(step, numbers)
        lr = float(self.scheduler.get_last_lr()[0])
        with self.metrics.phase("optimizer"), self.times.behind("optimizer", self.device):
            self.optimizer.step(grad_factor=clip_factor(norm, self.config.optim.max_grad_norm))
            self.scheduler.step()
            if self.bias_update is not None:
                self.bias_update.step()

        seconds, before = time.perf_counter() - begin, self.own_seconds
        self.own_seconds = self.metrics.own_seconds() - own
        self.guard.beat(step)
        layers, memory = numbers.layers, facts.read_memory(anew=True)
        self.metrics.step(
            StepRecord(
                step=step,
                loss=numbers.loss,
                grad_norm=numbers.grad_norm,
                lr=lr,
                tokens=numbers.label_tokens,
                tokens_per_second=numbers.seen_tokens / seconds,
                step_seconds=seconds,
                memory_bytes=memory.peak,
                expert_load_max_over_mean=max(layers.max_over_mean) if layers else None,
                idle_experts=sum(layers.idle_experts) if layers else None,
                load_entropy=min(layers.entropy) if layers else None,
                seen_tokens=numbers.seen_tokens,
                layers=layers,
                rank_tokens=seen,
                rank_label_tokens=labels,
                memory=memory,
                redos=redos,
                rank_seconds=numbers.rank_seconds if before else None,
                expert_tokens_LE=numbers.expert_tokens_LE,
            )
        )
        return self.guard.agree(numbers.stop_code)

    def exact_gradients(self, passes: list[dict[str, Tensor]], tokens: Tensor) -> tuple[StepNumbers, Tensor, int]:
        """Gradients of a step's passes, run again until every row has room.

        Returns:
            The step's numbers, the gradient norm on the device, and how often the passes were run again.
        """
        redos = 0
        while True:
            loss = self.forward_backward(passes, tokens[0])
            norm = grad_norm(self.model.parameters())
            stop_code = self.guard.stop_code(self.timed_out())
            numbers = self.readback.read(loss, norm, tokens, self.own_seconds, stop_code)
            if not self.passes.make_room(numbers.rows):
                return numbers, norm, redos
            redos += 1

    def forward_backward(self, batches: list[dict[str, Tensor]], label_tokens: Tensor) -> Tensor:
        """Gradients of a step's passes; returns this rank's share of the step's loss."""
        # an empty pass (padding only) still runs: its ranks' collectives belong to everyone
        scale = (label_tokens.clamp(min=1.0) / mesh.world_size()).float()
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            loss += self.passes(batch, scale, accumulate=number > 0)
        return loss

    def check_finite(self, step: int, numbers: StepNumbers) -> None:
        """Stop before the optimizer touches the parameters when the step's numbers are no numbers."""
        if not (math.isfinite(numbers.loss) and math.isfinite(numbers.grad_norm)):
            watched = torch.tensor(float(self.metrics.watched), device=self.device)
            any_watched = bool(over_ranks(watched, dist.ReduceOp.MAX))
            self.metrics.nonfinite(step, numbers.loss, numbers.grad_norm, any_watched)
        self.guard.check_finite(step, numbers.loss, numbers.grad_norm)

    def pause(self, step: int) -> bool:
        """What is due between two steps; whether there was anything."""
        due = [every and step % every == 0 for every in (self.config.train.eval_every, self.config.checkpoint.every)]
        if due[0]:
            self.evaluate(step)
        if due[1]:
            self.save(step)
        return any(due)

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Mean loss over the label tokens of the validation rows, the same rows each time and for any world."""
        if step == self.evaluated_step:
            return
        self.evaluated_step = step
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # of losses, and label tokens
        one = torch.ones((), device=self.device)
        with self.metrics.phase("evaluate"):
            with self.stats.paused(), self.passes.uncut(), without_logits(self.model):
                for batch in self.data.validation.rows(self.config.train.eval_rows):
                    sums[0] += self.model(**self.to_device(batch), num_items_in_batch=one, use_cache=False).loss
                    sums[1] += count_labels(batch)
            total, tokens = copy_to_host(over_ranks(sums, dist.ReduceOp.SUM)).tolist()
        self.model.train()
        self.guard.beat(step)
        self.metrics.eval(EvalRecord(step=step, loss=total / max(tokens, 1.0), tokens=int(tokens)))

    def should_stop(self) -> bool:
        """Whether all ranks stop here: a signal reached one of them, or the time is up."""
        return self.guard.should_stop(self.timed_out())

    def timed_out(self) -> bool:
        limit = self.config.train.max_minutes
        return limit is not None and time.monotonic() - self.started > 60 * limit

    def save(self, step: int) -> None:
        """Training checkpoint of all ranks, committed last, then the old ones go."""
        if step == self.saved_step:
            return
        with self.metrics.checkpoint(step):
            save_state(
                self.checkpoints,
                step,
                model=self.model,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                data_state=self.data.train.state_dict(),
                tokenizer=self.tokenizer,
                dropped=self.model.dropped_weights,
                extra=self.begun,
            )
            prune(self.checkpoints, self.config.checkpoint.keep)
        self.saved_step = step
        self.guard.beat(step)

    def resume(self) -> int:
        """Continue from a checkpoint, if there is one to continue from; the number of steps done. Checkpoints that lie
        ahead of it are another run's."""
        choice = self.config.checkpoint.resume
        self.begun = begun_by(choice)
        path = first_checkpoint(choice, self.checkpoints)
        done = 0 if path is None else self.load(path)
        own = path is not None and path.absolute().parent == self.checkpoints.absolute()
        self.saved_step = done if own else None
        if aside := set_aside(self.checkpoints, done if own else 0):
            self.metrics.say(f"goes on without {', '.join(path.name for path in aside)}, renamed so")
        return done

    def load(self, path: Path) -> int:
        """Take the state of a checkpoint; its step."""
        with keep_settings(self.optimizer, self.scheduler):
            state = load_state(path, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)
        self.data.train.load_state_dict(state.data_state)
        if self.config.checkpoint.resume == "auto":
            self.begun = state.extra or self.begun
        self.metrics.resume(state.step)
        steps = self.config.train.steps
        left = f"step {state.step} of {steps}" if state.step < steps else f"step {state.step}: nothing is left to train"
        self.metrics.say(f"goes on from {path}, {left}")
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


def setup(config: RunConfig, expect: facts.Expect | None = None) -> Run:
    """Everything before the first step. Cheap checks come first, so that a mistake costs seconds, then the data, whose
    tokens are kept for the next try, then the weights. What an earlier run has left stays untouched."""
    keep_quiet()
    device = start_process_group(config)
    output_dir = Path(config.output_dir)
    mesh.layout(mesh.world_size(), config.parallel.ep_size, config.parallel.dp_replicate_size)
    check_resume(config.checkpoint.resume)
    check_sinks(config.metrics.sinks)
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
    metrics = facts.open_metrics(config, {"vocab_size": len(tokenizer), "data": data.summary})
    try:
        facts.tell_expectation(metrics, config, model_config, expect)
        verify_checksums(checkpoint)
        return make_run(config, device, directory, tokenizer, data, metrics)
    except ValueError:
        metrics.refuse()
        metrics.close()
        raise


def make_run(
    config: RunConfig, device: torch.device, directory: Path, tokenizer: Any, data: Data, metrics: Metrics
) -> Run:
    """The model and what makes it learn."""
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
    layers = dict(zip(facts.layer_names(parts.stats.names), parts.stats.experts, strict=True))
    metrics.describe(layers, facts.infos(config, model.config), config.checkpoint.every)
    rate, times = config.balance.bias_update_rate, DeviceTimes(device)
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
        guard=Guard(config.output_dir, mesh.rank(), hang_seconds=config.parallel.timeout_seconds / 2),
        metrics=metrics,
        readback=Readback(parts.passes, parts.stats, times, device, config.metrics.expert_matrix),
        times=times,
    )


def count_labels(batch: dict[str, Tensor]) -> int:
    """Tokens that carry loss: the model predicts position i+1 from i, so the first column never does."""
    return int((batch["labels"][:, 1:] != -100).sum())


def count_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens that the model sees; packed rows are full but for the last few, and count whole."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
