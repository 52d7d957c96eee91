"""`moetrain train --dry-run`: check all that can be checked before a process starts, and say what would happen."""

from __future__ import annotations

import os
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, cast

from rich import get_console
from rich.markup import escape
from transformers import PreTrainedModel

from moetrain import families, mesh
from moetrain.attention import explain_attention, select_attention
from moetrain.backends import deep_ep
from moetrain.checkpoint import check_checkpoint
from moetrain.config import DataConfig, MetricsConfig, RunConfig, Source
from moetrain.create import check_layout, find_checkpoint, load_model_config, load_tokenizer, meta_model, new_config
from moetrain.data.sources import STDLIB, find_files, total_bytes
from moetrain.data.tokenize import apply_chat_template_file, check_vocabulary, open_beginning, training_texts
from moetrain.data.tokenizer import train_tokenizer
from moetrain.graph import capture_obstacle
from moetrain.launcher import num_processes
from moetrain.metrics.endpoint import check_endpoint
from moetrain.metrics.sinks import check_sinks
from moetrain.moe.dispatch import fastest_dispatch, why_waits
from moetrain.moe.layer import NAME
from moetrain.prepare import check_resume


def dry_run(config: RunConfig) -> None:
    """Check output directory, layout, model files, vocabulary, the first document of each data source and what metrics
    need; print one line for each. Writes nothing that stays.

    Raises:
        ValueError: the first of them that would stop the run.
    """
    world = int(os.environ.get("WORLD_SIZE", "0")) or num_processes(config)
    check_resume(config.checkpoint.resume)
    _say("output", _output(Path(config.output_dir)))
    model, text = _model(config)
    _say("model", text)
    _say("layout", _layout(config, world, model))
    _say("data", _data(config.data, _tokenizer(config)))
    _say("metrics", _metrics(config.metrics))
    rows = world * config.data.batch_size * config.train.grad_accum
    tokens = rows * config.data.seq_len
    _say("step", f"{rows} rows of {config.data.seq_len:,} = {tokens:,} tokens")
    _say("run", f"{config.train.steps:,} steps, {tokens * config.train.steps:,} tokens")


def explain(config: RunConfig) -> list[tuple[str, str]]:
    """What a run would use on this machine, and why: dispatch, attention, how its step runs. Reads no weights.

    Raises:
        ValueError: model or layout do not fit.
    """
    world = int(os.environ.get("WORLD_SIZE", "0")) or num_processes(config)
    model, text = _model(config)
    device = mesh.device()
    dispatch: str = config.model.dispatch
    if dispatch == "auto":
        dispatch = fastest_dispatch(config.parallel.ep_size)
    if config.model.attn_implementation is None:
        select_attention(model, config.model.kernels)
    documents = config.data.packing and config.data.document_mask
    choices = [str(choice) for choice in explain_attention(model, documents, device)]
    model.config.get_text_config()._experts_implementation = "eager" if config.model.experts == "eager" else NAME
    obstacle = "train.cuda_graph=off" if config.train.cuda_graph == "off" else None
    obstacle = obstacle or capture_obstacle(model, device.type, why_waits(dispatch, config.parallel.ep_size))
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    return [
        ("model", text),
        ("layout", _layout(config, world, model)),
        ("dispatch", _dispatch(dispatch, config.parallel.ep_size)),
        *(("attention", choice.removeprefix("attention of ")) for choice in choices),
        ("layers", "compiled" if compiled else "not compiled"),
        ("step", f"eager: {obstacle}" if obstacle else "captured in a CUDA graph, unless its first passes find a sync"),
    ]


def _dispatch(name: str, ep_size: int) -> str:
    reason = deep_ep.obstacle(ep_size) if name == "deep_ep" else None
    return f"{name} cannot be used: {reason}" if reason else name


def _say(name: str, text: str) -> None:
    get_console().print(f"[green]ok[/] [bold]{name:<8}[/]{escape(text)}", highlight=False, soft_wrap=True)


def _output(output_dir: Path) -> str:
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"output_dir {output_dir} cannot be written: {existing} is not a directory that takes files")
    return f"{output_dir} " + ("exists" if output_dir.is_dir() else "will be made")


def _model(config: RunConfig) -> tuple[PreTrainedModel, str]:
    """The model on the meta device, without memory for its weights, and what it says."""
    path = config.model.path
    if config.model.create is not None and not (Path(path) / "config.json").is_file():
        model = meta_model(new_config(config.model.create, vocab_size=config.model.create.vocab_size), config.model)
        return model, f"{path} will be made: {_size(model)}, random weights"
    directory = find_checkpoint(path)
    info = check_checkpoint(directory)
    model_config = load_model_config(directory, config.model)
    check_vocabulary(load_tokenizer(directory, config.model), model_config)
    model = meta_model(model_config, config.model)
    return model, f"{path}: {_size(model)}, {info.nbytes / 2**30:.2f} GiB in {_files(len(info.sizes))}, headers whole"


def _size(model: PreTrainedModel) -> str:
    return f"{model.config.model_type} of {model.num_parameters() / 1e6:,.1f} M parameters"


def _layout(config: RunConfig, world: int, model: PreTrainedModel) -> str:
    parallel = config.parallel
    layout = check_layout(model, world, parallel)
    ranks = "1 process" if world == 1 else f"{world} processes"
    shards = f"{ranks}: dp_replicate {parallel.dp_replicate_size} x fsdp {layout.fsdp_size}"
    if parallel.ep_size == 1:
        return shards
    if reason := families.fallback_reason(model):
        return f"{shards}, no expert parallelism: {reason}"
    counts = {cast(int, module.num_experts) for _, module in families.experts_modules(model)}
    experts = " or ".join(f"{count // parallel.ep_size} of {count}" for count in sorted(counts))
    return f"{shards}, ep {parallel.ep_size}: a rank holds {experts} experts of a layer"


def _tokenizer(config: RunConfig) -> Any:
    """The tokenizer of the run; in the place of one that the run would train, one of the data's first text."""
    create = config.model.create
    if create is None or (Path(config.model.path) / "config.json").is_file():
        return load_tokenizer(find_checkpoint(config.model.path), config.model)
    first = islice(filter(None, training_texts(config.data)), 1)
    with tempfile.TemporaryDirectory() as directory:
        return train_tokenizer(first, create.vocab_size, Path(directory))


def _data(data: DataConfig, tokenizer: Any) -> str:
    apply_chat_template_file(data, tokenizer)
    train = _sources(data.train, data, tokenizer)
    if data.validation is None:
        return f"{train}; {data.validation_fraction:.0%} of it for validation"
    return f"{train}; validation: {_sources(data.validation, data, tokenizer)}"


def _metrics(metrics: MetricsConfig) -> str:
    check_endpoint(metrics)
    check_sinks(metrics.sinks)
    port = metrics.prometheus_port
    ports = "any port" if port == 0 else f"port {port} and the next"
    served = [] if port is None else [f"Prometheus on {metrics.prometheus_host}, {ports}"]
    return ", ".join(["metrics.jsonl", *served, *metrics.sinks])


def _sources(sources: list[Source], data: DataConfig, tokenizer: Any) -> str:
    """What the sources hold, after their first documents were tokenised."""
    for source in sources:
        with tempfile.TemporaryDirectory() as directory:
            open_beginning(source, data, tokenizer, Path(directory), max_tokens=1)
    files = [file for source in sources for file in find_files(source)]
    names = ", ".join("Python's standard library" if source.path == STDLIB else source.path for source in sources)
    return f"{names}: {_files(len(files))}, {total_bytes(files) / 1e6:,.1f} MB"


def _files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"
