"""The run configuration: strict, typed, documented at the field.

A YAML file is read into `RunConfig`. Unknown keys are errors that name the nearest valid key, and every
value can be overridden on the command line as `section.key=value`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


def _word(value: Any) -> Any:
    """YAML reads `on` and `off` as true and false."""
    return ("on" if value else "off") if isinstance(value, bool) else value


def full_name(value: Any) -> Any:
    """What a short name of a library stands for."""
    return SHORT_NAMES.get(value, value) if isinstance(value, str) else value


SHORT_NAMES = {"te": "transformer_engine", "deepep": "deep_ep"}
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]


class CreateConfig(_Section):
    """Make a new checkpoint (tokenizer, config, random weights) at `model.path` when nothing is there yet."""

    config: dict[str, Any]
    """Transformers configuration as a mapping; `model_type` names the family. The tokenizer fills in `vocab_size`."""
    vocab_size: PositiveInt = 4096
    """Entries of the byte-level BPE tokenizer that is trained on the training text."""


class ModelConfig(_Section):
    path: str
    """Checkpoint directory in Hugging Face format, or a hub id."""
    create: CreateConfig | None = None
    """Set it to start from random weights; without it `path` must hold a checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the parameters and the arithmetic."""
    attn_implementation: str | None = None
    """Name in Transformers' attention registry (`sdpa`, `eager`, `flash_attention_2`, ...); None: the model chooses."""
    kernels: Annotated[Literal["auto", "transformer_engine", "torch"], BeforeValidator(full_name)] = "auto"
    """Attention, projections and norms: `auto` is the fastest kernel of attention that a GPU has, `transformer_engine`
    (or `te`) NVIDIA's library for all three, `torch` what Transformers takes. Attention named above comes first."""
    experts: Literal["auto", "eager"] = "auto"
    """Arithmetic of the experts: `auto` is grouped products and fused kernels, `eager` a loop, their reference."""
    dispatch: Annotated[
        Literal["auto", "local", "alltoall", "allgather", "nvlink", "deep_ep"], BeforeValidator(full_name)
    ] = "auto"
    """How tokens reach the ranks of their experts. `auto` takes `local` on one rank, `nvlink` on GPUs that reach each
    other's memory, else `alltoall`; `deep_ep` (or `deepep`) is DeepEP, where it is installed."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """`full` recomputes each layer in the backward; `selective` does too, but keeps what attention computed
    and combine brought, which is small and dear; the fastest that saves most of the memory."""
    checkpointed_layers: PositiveInt | None = None
    """Of so many decoder layers, the first ones; the others keep everything. None: of all of them. The fewer, the
    faster, as far as memory goes; the last layers' is free again when gradients fill it."""
    trust_remote_code: bool = False
    """Allow Python code from the model directory to run. Never inferred from a model's name."""

    @model_validator(mode="after")
    def _checkpoints_something(self) -> ModelConfig:
        if self.checkpointed_layers is not None and self.activation_checkpointing == "none":
            raise ValueError("checkpointed_layers needs activation_checkpointing: selective or full")
        return self


class ParallelConfig(_Section):
    processes: PositiveInt | None = None
    """Processes to start on this machine; None: one a GPU, or one without GPUs. Ignored under torchrun or Slurm."""
    ep_size: PositiveInt = 1
    """Ranks that hold distinct experts. Divides the number of experts and the ranks of a replica."""
    dp_replicate_size: PositiveInt = 1
    """Replicas of the sharded model (HSDP); the rest of the world is the FSDP axis."""
    keep_gathered: Literal["auto", "always", "never"] = "auto"
    """Whether dense weights stay gathered from a pass's forward to its backward; `auto`: where they take no more than
    8 % of the GPU's memory."""
    timeout_seconds: PositiveInt = 600
    """A collective that takes longer ends the run with a report instead of hanging."""


class Source(_Section):
    """One place that text comes from."""

    path: str
    """File, directory or glob; `python:stdlib` is the source code of the running Python's standard library."""
    format: Literal["auto", "text", "jsonl", "parquet", "arrow", "datasets", "chat", "tokens"] = "auto"
    """`auto` goes by the file's ending; `chat` is JSONL of OpenAI messages; `tokens` of `moetrain data tokenize`."""
    text_key: str = "text"
    """Field that holds the text, for jsonl, parquet, arrow and datasets."""
    messages_key: str = "messages"
    """Field that holds the list of messages, for chat."""
    tools_key: str = "tools"
    """Field that holds the tool schemas, for chat."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of this source relative to the others when several are mixed."""


class DataConfig(_Section):
    train: list[Source] = Field(min_length=1)
    validation: list[Source] | None = None
    """None takes `validation_fraction` of the training documents."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    seq_len: PositiveInt = 4096
    """Tokens in a packed row."""
    batch_size: PositiveInt = 1
    """Rows per rank in one forward pass."""
    packing: bool = True
    """Pack documents into rows of `seq_len`; without it a row is one document, padded or cut."""
    document_mask: bool = True
    """Attention and state-space layers see only their own document inside a packed row."""
    loss_on: Literal["auto", "all", "assistant"] = "auto"
    """Tokens that carry loss: `auto` is every token of text, and the assistant's turns of a chat."""
    on_bad_line: Literal["fail", "skip"] = "fail"
    """What a malformed line does: stop with file and line number, or be skipped and counted."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's."""
    cache_dir: str | None = None
    """Where tokenised data is kept; None means `<output_dir>/data`."""


class OptimConfig(_Section):
    lr: Annotated[float, Field(gt=0)] = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay (AdamW) of matrices; vectors (norms, biases) are not decayed."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; None reports the norm only."""
    states: Literal["auto", "fp32", "master", "bf16_stochastic", "8bit"] = "auto"
    """`fp32`: parameters and states as they are; `master`: fp32 master copy beside bf16 parameters;
    `bf16_stochastic`: bf16 states and stochastic rounding of the update; `8bit`: torchao's 8-bit states.
    `auto` is fp32 for fp32 parameters and master for bf16."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The schedule ends at `lr * min_lr_ratio`."""


class BalanceConfig(_Section):
    aux_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Coefficient of the model's own load-balancing loss; None takes the model configuration's value."""
    bias_update_rate: Annotated[float, Field(ge=0)] = 0.0
    """Step of the auxiliary-loss-free update of the routers' correction bias (DeepSeek-V3); 0 leaves it alone."""
    gate: Literal["learned", "random", "sequential"] = "learned"
    """Benchmarks only: `random` and `sequential` replace the learned routing by balanced ones."""


class CheckpointConfig(_Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between training checkpoints; 0 saves only at the end."""
    keep: PositiveInt = 2
    """Newest training checkpoints that stay."""
    resume: Literal["auto", "never"] | str = "auto"
    """`auto` continues from the newest complete checkpoint of `output_dir`; a path names one."""
    export: bool = True
    """Write a standard Hugging Face checkpoint to `<output_dir>/model` at the end."""


class MetricsConfig(_Section):
    log_every: PositiveInt = 1
    """Steps between lines on the console; every step goes to metrics.jsonl."""
    run_name: Annotated[str, Field(min_length=1)] | None = None
    """Name of the run in monitoring; None is the last part of `output_dir`."""
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of a node's first Prometheus endpoint, its rank r takes port + r, or the next that is free; 0 takes any free
    ones; None is off."""
    prometheus_host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` is all of the machine's."""
    discovery_dir: str | None = None
    """Where the file for Prometheus' `file_sd_configs` goes; None means `<output_dir>/discovery`."""
    username: Annotated[str, Field(min_length=1, pattern="^[^:]*$")] | None = None
    """Ask scrapers for this name and the password of `password_file` (HTTP basic authentication)."""
    password_file: str | None = None
    """File that holds the password and nothing else."""
    tls_certificate: str | None = None
    """PEM file with the endpoint's certificate chain; it then speaks HTTPS."""
    tls_key: str | None = None
    """PEM file with the certificate's private key."""
    tls_client_ca: str | None = None
    """PEM file of the authority that must have signed a scraper's certificate (mutual TLS)."""
    expert_matrix: bool = False
    """Tokens of every expert of every layer as counters on rank 0: layers * experts series."""
    sinks: list[Literal["tensorboard", "wandb"]] = []
    """Where rank 0 also sends every `log_every`-th step, by the library of that name."""

    @model_validator(mode="after")
    def _complete(self) -> MetricsConfig:
        for one, other in (("username", "password_file"), ("tls_certificate", "tls_key")):
            for given, missing in ((one, other), (other, one)):
                if getattr(self, given) is not None and getattr(self, missing) is None:
                    raise ValueError(f"{given} needs {missing} beside it")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key beside it")
        return self


class TrainConfig(_Section):
    steps: PositiveInt
    """Optimizer steps."""
    grad_accum: PositiveInt = 1
    """Forward and backward passes in a step. The loss is divided by the true number of label tokens of the whole
    step over all ranks, so the split into passes and ranks does not change it."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; one is always made before the first step and after the last. 0: only those."""
    eval_rows: PositiveInt = 64
    """Packed rows of an evaluation, over all ranks."""
    seed: int = 0
    loss: Literal["auto", "fused", "plain"] = "auto"
    """`fused` never holds the logits of all tokens; `auto` takes it where the model's head allows."""
    compile: Switch = "auto"
    """Norms, rotary embeddings, routers and sums of each decoder layer fused by torch.compile; `auto` on GPUs."""
    cuda_graph: Switch = "auto"
    """Forward and backward as one CUDA graph: `auto` where model and setting allow it, `on` or an error, `off`."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop, save and export cleanly after this long."""
    sample_prompt: str | None = None
    """Text that the exported model continues at the end of the run, for a look."""


class RunConfig(_Section):
    """One training run."""

    output_dir: str
    """Everything that the run writes goes here."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    balance: BalanceConfig = BalanceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _warmup_fits(self) -> RunConfig:
        if self.optim.warmup_steps >= self.train.steps and self.optim.warmup_steps > 0:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} leaves no step of train.steps={self.train.steps}; "
                "lower it"
            )
        return self


def load_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML file with the sections of a run. Raises ValueError where it is missing or no mapping."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no configuration file at {path}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a mapping with the sections {', '.join(RunConfig.model_fields)}")
    return raw


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML) and validate.

    Raises:
        ValueError: the file is missing or no YAML mapping, an override is malformed, or a key or value is invalid;
            the message names the key, and for an unknown one the nearest that exists.
    """
    raw = load_mapping(path)
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """Validate a mapping. Raises ValueError with one line for each wrong key or value."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(item) for item in error.errors())) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    *parents, leaf = key.split(".")
    node = raw
    for depth, name in enumerate(parents, 1):
        child = node.setdefault(name, {})
        if isinstance(child, list):
            raise ValueError(
                f"override {override!r}: {name} is a list; write it whole, {'.'.join(parents[:depth])}=[...]"
            )
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {name} is not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is no YAML: {' '.join(str(error).split())}") from None


def _explain(item: Any) -> str:
    """One line for a pydantic error; unknown keys get the nearest valid one."""
    location = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] != "extra_forbidden":
        return f"{location}: {item['msg'].removeprefix('Value error, ')}"
    valid = sorted(_fields_at(item["loc"][:-1]))
    nearest = difflib.get_close_matches(str(item["loc"][-1]), valid, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys: {', '.join(valid)}"
    return f"{location}: unknown key; {hint}"


def _fields_at(location: tuple[Any, ...]) -> set[str]:
    """Valid keys of the section at `location`, list positions skipped."""
    section: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        section = _section_of(section.model_fields[part].annotation) or section
    return set(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _section_of(argument):
            return found
    return None
