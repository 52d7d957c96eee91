"""`moetrain train` on wrong input: code 2 and one error that says what to mend, and an earlier run's files stay."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moetrain import cli, guard
from moetrain.checkpoint import manifest
from moetrain.config import CreateConfig
from moetrain.create import create_checkpoint
from tests.runs import MODEL, records, tiny_run, write_text

GOOD_LINES = '{"text": "def f(x): return x + 1"}\n' * 30 + '{"text": "# another one, to be held out"}\n' * 2
ANSWERED = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]}\n'
CRITIC = '{"messages": [{"role": "critic", "content": "no"}, {"role": "assistant", "content": "yes"}]}\n'
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('who?') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a model in several shards with checksums, and a finished run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    write_text(folder)
    created = tiny_run(folder, train={"steps": 2, "eval_rows": 2}, checkpoint={"every": 1})
    assert train(folder, created) == 0
    model = folder / "model"
    shutil.copytree(folder / "start", model, ignore=shutil.ignore_patterns("*.safetensors", "SHA256SUMS"))
    AutoModelForCausalLM.from_pretrained(folder / "start").save_pretrained(model, max_shard_size="100KB")
    manifest.write_manifest(model, {file.name: manifest.hash_file(file) for file in model.iterdir()})
    return folder


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("moetrain")
    before = (logger.level, logger.propagate, list(logger.handlers))
    yield
    logger.level, logger.propagate, logger.handlers = before


def train(folder: Path, raw: dict[str, Any], *overrides: str) -> int:
    """`moetrain train` in this process, as one rank."""
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with mock.patch.dict(os.environ, environment, clear=True):
        return cli.main(["train", str(folder / "run.yaml"), *overrides])


def config_of(finished: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration that would train the finished run's model in its output directory."""
    raw = tiny_run(finished, train={"steps": 4, "eval_rows": 2}, checkpoint={"every": 1}, **sections)
    raw["model"] = {"path": str(finished / "model"), "dtype": "float32"} | sections.get("model", {})
    return raw


def digests(output_dir: Path) -> dict[str, str]:
    """Of everything but cached tokens, which every try may add to."""
    files = (path for path in output_dir.rglob("*") if path.is_file() and "data" not in path.parts)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def refuse(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a spoilt configuration; returns the error, after checking that nothing else has happened."""

    def run(raw: dict[str, Any], *overrides: str) -> str:
        before = digests(finished / "out")
        begin = time.monotonic()
        assert train(tmp_path, raw, *overrides) == 2
        assert time.monotonic() - begin < 20
        assert digests(finished / "out") == before
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err and printed.err.startswith("error: ")
        assert "step" not in printed.out, "training had begun"
        return printed.err

    return run


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def remove(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def shard(model: Path, number: int = 1) -> Path:
    return sorted(model.glob("*.safetensors"))[number]


def pickled(model: Path) -> None:
    """The weights as a pickle that leaves a trace when it is loaded."""
    remove(model, "model*")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trace(model / "ran")))


class Trace:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def name_absent_tensor(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.absent.weight": next(iter(weight_map.values()))})


CONFIGURATIONS: dict[str, tuple[str, list[str]]] = {
    "unknown key": ("optim.max_gradnorm=1", ["optim.max_gradnorm: unknown key", "did you mean 'max_grad_norm'"]),
    "unknown section": ("optimizer.lr=1", ["optimizer: unknown key", "did you mean 'optim'"]),
    "wrong type": ("train.steps=many", ["train.steps: ", "integer"]),
    "wrong choice": ("data.on_bad_line=ignore", ["data.on_bad_line: ", "'fail' or 'skip'"]),
    "warm-up": ("optim.warmup_steps=4", ["optim.warmup_steps=4 leaves no step of train.steps=4"]),
    "ep of the world": ("parallel.ep_size=2", ["ep_size=2 does not divide the 1 ranks", "valid: [1]"]),
    "replicas": ("parallel.dp_replicate_size=3", ["dp_replicate_size=3 does not divide the world of 1", "valid: [1]"]),
    "model is nowhere": ("model.path=./no/such/model", ["model.path=./no/such/model: no such directory (looked from"]),
    "model is a file": ("model.path=/dev/null", ["model.path=/dev/null is a file; name the checkpoint's directory"]),
    "attention": ("model.attn_implementation=fast", ["fast", "flash_attention_2", "sdpa"]),
    "attention not installed": (
        "model.attn_implementation=flash_attention_4",
        ["model.attn_implementation=flash_attention_4", "doesn't seem to be installed"],
    ),
    "data is nowhere": ("data.train=[{path: /no/such.jsonl}]", ["no such file or directory: /no/such.jsonl"]),
    "validation is nowhere": ("data.validation=[{path: /no/such.jsonl}]", ["no such file or directory: /no/such.json"]),
    "template is nowhere": ("data.chat_template=/no/such.jinja", ["data.chat_template: no such file: /no/such.jinja"]),
    "output below a file": (
        "output_dir=/dev/null/out",
        ["output_dir /dev/null/out cannot be written: Not a directory"],
    ),
    "output is read-only": ("output_dir=/sys/out", ["output_dir /sys/out cannot be written: "]),
    "cache is read-only": ("data.cache_dir=/sys/cache", ["/sys/cache"]),
    "states": ("model.dtype=bfloat16; optim.states=fp32", ["optim.states=fp32", "choose master, bf16_stochastic"]),
    "other data": ("data.seq_len=16", ["position belongs to other data", "checkpoint.resume=never"]),
    "other seed": ("train.seed=5", ["position belongs to other data", "checkpoint.resume=never"]),
    "other optimizer": ("model.dtype=bfloat16", ["step-00000002 lacks 25 tensor(s)", "optimizer", ".master"]),
    "resume from nowhere": ("checkpoint.resume=/no/such", ["checkpoint.resume: /no/such is not a complete training"]),
    "resume from an export": ("checkpoint.resume=OUT/model", ["checkpoint.resume: ", "does not name state.json"]),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configuration(finished: Path, refuse: Callable[..., str], case: str) -> None:
    overrides, words = CONFIGURATIONS[case]
    message = refuse(config_of(finished), *overrides.replace("OUT", str(finished / "out")).split("; "))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"a: [1", b"- a\n"], ids=["none", "bytes", "yaml", "list"])
def test_configuration_file(tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "my.yaml").write_bytes(content)
    assert cli.main(["train", str(tmp_path / "my.yaml")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (lambda m: shard(m).unlink(), ["lacks 1 file(s)", "model-00002-of-00003.safetensors"]),
    "truncated shard": (lambda m: os.truncate(shard(m), 50_000), ["model-00002-of-00003.safetensors is truncated"]),
    "flip in the header": (lambda m: flip(shard(m), 70), ["model-00002-of-00003.safetensors"]),
    "flip in the data": (lambda m: flip(shard(m), -9), ["model-00002-of-00003.safetensors is corrupt: its SHA-256"]),
    "tensor that is not there": (name_absent_tensor, ["lacks the tensor model.absent.weight"]),
    "pickle": (pickled, ["only as pickles (pytorch_model.bin)", "never opened"]),
    "no weights": (lambda m: remove(m, "model*"), ["holds neither model.safetensors nor"]),
    "adapter": (lambda m: (m / "adapter_config.json").write_text("{}"), ["holds an adapter", "merge it"]),
    "no configuration": (lambda m: (m / "config.json").unlink(), ["config.json"]),
    "torn configuration": (lambda m: (m / "config.json").write_text('{"model_type'), ["config.json", "valid JSON"]),
    "wrong value": (lambda m: edit_json(m / "config.json", num_experts="four"), ["config.json: ", "'num_experts'"]),
    "other family": (lambda m: edit_json(m / "config.json", model_type="gwen"), ["config.json: ", "`gwen`"]),
    "other sizes": (
        lambda m: edit_json(m / "config.json", moe_intermediate_size=16),
        ["do not fit its config.json, 4 tensor(s): ", "experts.down_proj has shape [8, 32, 24], not [8, 32, 16]"],
    ),
    "more layers": (
        lambda m: edit_json(m / "config.json", num_hidden_layers=3),
        ["do not fit its config.json, 11 tensor(s): model.layers.2.input_layernorm.weight is missing"],
    ),
    "no tokenizer": (lambda m: remove(m, "tokenizer*"), ["holds no tokenizer"]),
    "torn tokenizer": (lambda m: (m / "tokenizer.json").write_text('{"a"'), ["the tokenizer of", "cannot be read"]),
    "no vocabulary": (lambda m: (m / "tokenizer.json").write_text('{"added_tokens": []}'), ["cannot be read"]),
    "other tokenizer": (
        lambda m: edit_json(m / "config.json", vocab_size=200),
        ["the tokenizer has ids up to 299, the model has 200 embeddings", "saved beside the model"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_model(finished: Path, tmp_path: Path, refuse: Callable[..., str], case: str) -> None:
    spoil, words = MODELS[case]
    model = tmp_path / "model"
    shutil.copytree(finished / "model", model)
    if case != "flip in the data":
        (model / "SHA256SUMS").unlink()
    spoil(model)
    message = refuse(config_of(finished), f"model.path={model}")
    assert all(word in message for word in words), message
    assert str(model) in message or case == "other tokenizer"
    assert not (model / "ran").exists()


def test_code_of_a_model_runs_only_when_trusted(finished: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    model, trace = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(finished / "model", model)
    (model / "code.py").write_text(f"open({str(trace)!r}, 'w')\nraise ValueError('my code')\n")
    for model_type in ("strange", "qwen3_moe"):
        edit_json(model / "config.json", model_type=model_type, auto_map={"AutoConfig": "code.Config"})
        raw = config_of(finished, data={"seq_len": 16}, model={"path": str(model)})
        assert model_type == "qwen3_moe" or "trust_remote_code=True" in refuse(raw)
        assert "other data" in refuse(raw) or model_type == "strange"  # Transformers' own class serves as well
        assert not trace.exists()
    assert "my code" in refuse(raw, "model.trust_remote_code=true")
    assert trace.exists(), "code that runs would not have been noticed"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def test_hub_id_without_network(finished: Path, refuse: Callable[..., str], no_network: None) -> None:
    message = refuse(config_of(finished), "model.path=nobody/nothing")
    assert "model.path=nobody/nothing: no such directory" in message and "and the hub does not give it" in message


def test_hub_id_in_the_cache_needs_no_network(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_network: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(finished / "model", repository / "snapshots" / ("0" * 40))
    assert train(tmp_path, config_of(finished), "model.path=some/model", "--dry-run") == 0
    assert "in 3 files, headers whole" in capsys.readouterr().out


CREATED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no family": ({"model_type": None}, ["model.create.config needs a model_type", "such as qwen3_moe"]),
    "unknown family": ({"model_type": "qwen3moe"}, ["not 'qwen3moe'; did you mean 'qwen3_moe'?"]),
    "misspelt key": ({"num_expert": 4}, ["model.create.config.num_expert", "did you mean 'num_experts'?"]),
    "wrong value": ({"num_experts": "four"}, ["model.create.config: ", "'num_experts' expected int, got str"]),
}


@pytest.mark.parametrize("case", CREATED)
def test_model_to_create(finished: Path, tmp_path: Path, refuse: Callable[..., str], case: str) -> None:
    values, words = CREATED[case]
    raw = config_of(finished, model={"path": str(tmp_path / "new"), "create": {"config": MODEL | values}})
    message = refuse(raw)
    assert all(word in message for word in words), message
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.tmp").exists()


def test_nothing_is_created_over_other_files(finished: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    raw = config_of(finished, model={"path": str(tmp_path / "mine"), "create": {"config": MODEL}})
    assert "exists but holds no checkpoint" in refuse(raw)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


TEXTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "torn line": (GOOD_LINES + '{"text": \n', {}, [":33: malformed JSON", "data.on_bad_line=skip leaves"]),
    "no such field": ('{"body": "a"}\n', {}, [":1: no field 'text'; there is 'body'; set `text_key`"]),
    "no text": ("", {}, ["no documents in 1 file(s)"]),
    "nothing but bad lines": ("a\nb\n", {"on_bad_line": "skip"}, ["no documents", "2 lines were skipped, the first: "]),
    "too short": ('{"text": "a"}\n', {}, ["no training document has a token that carries loss"]),
    "role": (ANSWERED * 9 + CRITIC, {"template": TEMPLATE}, [":10: ", "role 'critic'", "data.chat_template"]),
    "no chat template": (ANSWERED, {}, ["the tokenizer has no chat template; set data.chat_template"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_data(finished: Path, tmp_path: Path, refuse: Callable[..., str], case: str) -> None:
    text, options, words = TEXTS[case]
    (tmp_path / "bad.jsonl").write_text(text)
    options = {"train": [{"path": str(tmp_path / "bad.jsonl")}]} | options
    if template := options.pop("template", None):
        (tmp_path / "chat.jinja").write_text(template)
        options["chat_template"] = str(tmp_path / "chat.jinja")
    message = refuse(config_of(finished, data=options))
    assert all(word in message for word in words), message
    assert case == "no chat template" or str(tmp_path / "bad.jsonl") in message


def test_skipped_lines_are_counted(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text(GOOD_LINES + "torn\n" + '{"text": 3}\n')
    source = {"train": [{"path": str(tmp_path / "bad.jsonl")}], "on_bad_line": "skip"}
    raw = config_of(finished, data=source) | {"output_dir": str(tmp_path / "out"), "train": {"steps": 1}}
    assert train(tmp_path, raw, "checkpoint.export=false") == 0
    assert f"bad lines skipped: 2, the first: {tmp_path}/bad.jsonl:33: malformed JSON" in capsys.readouterr().out


def test_file_in_place_of_the_output(finished: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "out").write_text("precious")
    assert f"output_dir {tmp_path}/out cannot be written: " in refuse(config_of(finished), f"output_dir={tmp_path}/out")
    assert (tmp_path / "out").read_text() == "precious"


def test_output_of_another_run(finished: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "CLAIM_SECONDS", 0.2)
    with guard.claim(finished / "out"):
        message = refuse(config_of(finished))
    assert f"out is in use by process {os.getpid()} on {socket.gethostname()}; stop that run" in message


def test_password_for_the_metrics_is_missing(finished: Path, refuse: Callable[..., str]) -> None:
    file = finished / "none"
    message = refuse(
        config_of(finished), "metrics.prometheus_port=0", "metrics.username=prom", f"metrics.password_file={file}"
    )
    assert f"metrics.password_file={file} cannot be read: No such file or directory" in message


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "flip": (lambda c: flip(c / "rank-00000.safetensors", -9), ["rank-00000.safetensors is corrupt: its SHA-256"]),
    "truncated": (lambda c: os.truncate(c / "rank-00000.safetensors", 9_000), ["rank-00000.safetensors is truncated"]),
    "unfinished": (lambda c: (c / "SHA256SUMS").unlink(), ["not a complete training checkpoint (no SHA256SUMS)"]),
    "torn state": (lambda c: (c / "state.json").write_text("{"), ["state.json is corrupt"]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_resume_from_a_damaged_checkpoint(
    finished: Path, tmp_path: Path, refuse: Callable[..., str], case: str
) -> None:
    damage, words = DAMAGES[case]
    copy = tmp_path / "step-00000002"
    shutil.copytree(finished / "out" / "checkpoints" / copy.name, copy)
    damage(copy)
    message = refuse(config_of(finished), f"checkpoint.resume={copy}")
    assert all(word in message for word in [str(copy), *words]), message


def test_resume_with_another_model(finished: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    raw = config_of(finished)
    raw["model"] = {"path": str(tmp_path / "new"), "dtype": "float32"}
    raw["model"]["create"] = {"vocab_size": 300, "config": MODEL | {"num_experts": 4}}
    message = refuse(raw)
    assert "step-00000002: model." in message and "F32 [8, 48, 32] there and F32 [4, 48, 32] here" in message


@pytest.mark.parametrize("poisoned", [False, True], ids=["learning rate", "weights"])
def test_a_loss_that_is_no_number_stops_before_the_update(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], poisoned: bool
) -> None:
    model = tmp_path / "model"
    shutil.copytree(finished / "model", model)
    overrides = [f"output_dir={tmp_path}/out", f"model.path={model}", "checkpoint.every=0", "train.steps=6"]
    if poisoned:
        weights = load_file(shard(model))
        for tensor in weights.values():
            tensor.fill_(float("nan"))
        save_file(weights, shard(model), metadata={"format": "pt"})
        (model / "SHA256SUMS").unlink()
    else:
        overrides.append("optim.lr=1e30")
    assert train(tmp_path, config_of(finished), *overrides) == 2
    message = capsys.readouterr().err
    done = max(records(tmp_path), default=0)
    assert done < 6 and (done == 0) == poisoned
    assert f"error: step {done + 1}: the loss is nan" in message and "Traceback" not in message
    assert "Stopped before the optimizer's update" in message and "lower optim.lr" in message
    assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("room", [100, 4_000, 20_000], ids=["settings", "tokenizer", "weights"])
def test_a_full_disk_takes_no_new_model(tmp_path: Path, room: int) -> None:
    """Files may grow to `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write to {tmp_path}: File too large") as raised:
            create_checkpoint(tmp_path / "new", CreateConfig(config=MODEL, vocab_size=300), [GOOD_LINES], seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_was_saved(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files may grow to half a checkpoint; then the disk has room again, and the run goes on."""
    shutil.copytree(finished / "out", tmp_path / "out")
    before = digests(tmp_path / "out" / "checkpoints") | digests(tmp_path / "out" / "model")
    size = (tmp_path / "out" / "checkpoints" / "step-00000002" / "rank-00000.safetensors").stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    raw = config_of(finished) | {"output_dir": str(tmp_path / "out")}
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        assert train(tmp_path, raw) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    message = capsys.readouterr().err
    assert "Traceback" not in message and f"cannot write {tmp_path}/out/checkpoints/step-00000003" in message, message
    after = digests(tmp_path / "out" / "checkpoints") | digests(tmp_path / "out" / "model")
    assert after == before, "nothing of the new checkpoint, everything of the old"
    assert train(tmp_path, raw) == 0
    assert list(records(tmp_path)) == [1, 2, 3, 4]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in again.values())
