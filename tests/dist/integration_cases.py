"""Hugging Face Trainer, TRL and PEFT runs, each the same on one rank (plain Transformers) and on several (moetrain).

One rank is the reference: the plain model and the whole batch. On W ranks every rank gets 1/W of it, and the model has
expert parallelism. A run's numbers go back to the test, the checkpoints it writes lie in `folder/world<W>/<run>`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from moetrain import AutoModelForCausalLM, DistributedConfig
from tests.families import VOCAB, batch, build

STEPS = 3
GLOBAL_BATCH = 4
EXPERTS = {
    "qwen3_moe": ["experts.gate_up_proj", "experts.down_proj"],
    "gpt_oss": ["experts.gate_up_proj", "experts.down_proj"],
    "nemotron_h": ["experts.up_proj", "experts.down_proj"],
}
"""Experts parameters by family, as PEFT's `target_parameters` takes them."""

Outcome = dict[str, Any]


def run_cases(
    rank: int, world_size: int, folder: str, names: list[str], layouts: list[dict[str, int]]
) -> list[dict[str, Outcome]]:
    """The named runs on each layout; on one rank, where there is no layout, on the plain model."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    return [
        {name: CASES[name](Setup(rank, world_size, Path(folder), name, layout)) for name in names}
        for layout in layouts or [{}]
    ]


class Setup:
    """Where a run takes its model from and where it writes."""

    def __init__(self, rank: int, world_size: int, folder: Path, case: str, layout: dict[str, int]) -> None:
        self.rank, self.world_size, self.layout = rank, world_size, layout
        self.models = folder
        self.output = folder / f"world{world_size}" / case

    def model(self, family: str, dtype: torch.dtype = torch.float32) -> Any:
        path = self.models / family
        if self.world_size == 1:
            return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, distributed_config=DistributedConfig(**self.layout)
        )

    def arguments(self, **kwargs: Any) -> dict[str, Any]:
        return {
            "output_dir": str(self.output),
            "per_device_train_batch_size": GLOBAL_BATCH // self.world_size,
            "per_device_eval_batch_size": GLOBAL_BATCH // self.world_size,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "adam_epsilon": 1e-4,  # Adam would blow up the rounding noise of gradients that are 0 in exact arithmetic
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "bf16": False,  # TRL's default is True
            **kwargs,
        }


def ragged_dataset() -> Dataset:
    """24 rows of 16 tokens whose first labels carry no loss, a different number of them in every row."""
    rows = []
    for seed in range(24):
        tokens = batch(seed, rows=1)["input_ids"][0].tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * (seed % 11) + tokens[seed % 11 :]})
    return Dataset.from_list(rows).with_format("torch")


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{number}" for number in range(VOCAB - 4))]
    backend = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def prompt_dataset() -> Dataset:
    """Prompts and completions of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(f"w{int(word)}" for word in torch.randint(VOCAB - 4, (length,), generator=generator))

    return Dataset.from_list([{"prompt": text(2, 8), "completion": " " + text(3, 12)} for _ in range(24)])


def lora(family: str, **kwargs: Any) -> peft.LoraConfig:
    """LoRA on attention and on the stacks of experts, away from its start (where half of the gradients are 0)."""
    return peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=EXPERTS[family],
        init_lora_weights=False,
        **kwargs,
    )


def adapted(setup: Setup, family: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """The model with an adapter whose weights are the same on every rank."""
    model = setup.model(family, dtype)
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora(family, **kwargs))


def finish(setup: Setup, trainer: Trainer) -> Outcome:
    trainer.train()
    trainer.save_model()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in history],
        "grad_norms": [float(entry["grad_norm"]) for entry in history],
        "folder": str(setup.output),
    }


def trainer_run(setup: Setup, family: str = "qwen3_moe", evaluate_first: bool = False, **kwargs: Any) -> Outcome:
    """Full fine-tuning with the Trainer, and an evaluation."""
    data = ragged_dataset()
    arguments = TrainingArguments(**setup.arguments(**kwargs))
    trainer = Trainer(model=setup.model(family), args=arguments, train_dataset=data, eval_dataset=data.select(range(8)))
    if evaluate_first:
        trainer.evaluate()
    return finish(setup, trainer) | {"eval_losses": [trainer.evaluate()["eval_loss"]]}


def sft_run(setup: Setup, family: str = "qwen3_moe", with_lora: bool = False, **kwargs: Any) -> Outcome:
    """TRL's SFTTrainer on prompts and completions."""
    own = {"max_length": 32, "router_aux_loss_coef": 0.0, "activation_checkpointing": True}
    arguments = SFTConfig(**setup.arguments(**own, **kwargs))
    trainer = SFTTrainer(
        model=setup.model(family),
        args=arguments,
        train_dataset=prompt_dataset(),
        processing_class=tokenizer(),
        peft_config=lora(family) if with_lora else None,
    )
    return finish(setup, trainer)


def lora_run(setup: Setup, family: str = "qwen3_moe", **kwargs: Any) -> Outcome:
    """LoRA with the Trainer; the logits after training, with and without the adapter."""
    model = adapted(setup, family)
    arguments = TrainingArguments(**setup.arguments(learning_rate=1e-2, **kwargs))
    outcome = finish(setup, Trainer(model=model, args=arguments, train_dataset=ragged_dataset()))
    outcome["logits"] = logits(model)
    with model.disable_adapter():
        outcome["base_logits"] = logits(model)
    return outcome


def logits(model: Any) -> Any:
    """Of a fixed batch; as an array, which travels between processes by value."""
    with torch.no_grad():
        return model.eval()(**batch(100)).logits.float().numpy()


def lora_merged(setup: Setup) -> Outcome:
    """The adapter added into the weights for good, and the model saved."""
    model = adapted(setup, "qwen3_moe").merge_and_unload()
    model.save_pretrained(setup.output)
    return {"logits": logits(model), "folder": str(setup.output)}


def lora_on_biases(setup: Setup) -> Outcome:
    config = peft.LoraConfig(r=4, target_parameters=["experts.gate_up_proj_bias"])
    model = peft.get_peft_model(setup.model("gpt_oss"), config)
    if setup.world_size == 1:
        return {}
    try:
        model(**batch(0))
    except ValueError as error:
        return {"error": str(error)}
    return {}


def lora_gradients(setup: Setup, family: str = "qwen3_moe") -> Outcome:
    """Gradient of every adapter parameter, the mean over the ranks."""
    model = adapted(setup, family)
    rows = GLOBAL_BATCH // setup.world_size
    mine = slice(setup.rank * rows, (setup.rank + 1) * rows)
    loss = model(**{name: value[mine] for name, value in batch(0, rows=GLOBAL_BATCH).items()}, use_cache=False).loss
    loss.backward()
    dist.all_reduce(loss.data)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for gradient in gradients.values():
        assert not isinstance(gradient, DTensor)
        dist.all_reduce(gradient)
    return {
        "losses": [loss.item() / setup.world_size],
        "gradients": {name: (gradient / setup.world_size).numpy() for name, gradient in gradients.items()},
    }


CASES: dict[str, Callable[[Setup], Outcome]] = {
    "trainer": trainer_run,
    "trainer-evaluated_first": lambda setup: trainer_run(setup, evaluate_first=True),
    "trainer-nemotron_h": lambda setup: trainer_run(setup, "nemotron_h"),
    "trainer-accumulation": lambda setup: trainer_run(setup, gradient_accumulation_steps=2),
    "trainer-checkpointing": lambda setup: trainer_run(
        setup, activation_checkpointing=True, save_strategy="steps", save_steps=2, save_only_model=True
    ),
    "sft": sft_run,
    "sft-nemotron_h": lambda setup: sft_run(setup, "nemotron_h"),
    "sft-lora": lambda setup: sft_run(setup, with_lora=True),
    "lora": lora_run,
    "lora-accumulation": lambda setup: lora_run(setup, gradient_accumulation_steps=2, activation_checkpointing=True),
    "lora-merged": lora_merged,
    "lora-on_biases": lora_on_biases,
    "lora-gradients": lora_gradients,
    "lora-gradients-gpt_oss": lambda setup: lora_gradients(setup, "gpt_oss"),
    "lora-gradients-nemotron_h": lambda setup: lora_gradients(setup, "nemotron_h"),
}
FAMILIES = sorted(EXPERTS)


def write_models(folder: Path) -> None:
    for family in FAMILIES:
        build(family).save_pretrained(folder / family)
