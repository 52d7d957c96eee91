"""The command line: verbs, errors without tracebacks, the printed configuration and the dry run."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import moetrain
from moetrain import cli, launcher
from moetrain import dry_run as module
from moetrain.config import CreateConfig, RunConfig, load_config
from moetrain.create import create_checkpoint

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
TEXT = "def add(a, b):\n    return a + b\n" * 50


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run that would create its model."""
    (tmp_path / "text.txt").write_text(TEXT)
    raw = {
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(tmp_path / "start"), "create": {"config": QWEN3_MOE, "vocab_size": 300}},
        "data": {"train": [{"path": str(tmp_path / "text.txt")}], "seq_len": 32, "batch_size": 2},
        "train": {"steps": 5, "grad_accum": 3},
        "parallel": {"processes": 4, "ep_size": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "start"
    create_checkpoint(path, CreateConfig(config=QWEN3_MOE, vocab_size=300), [TEXT], seed=0)
    return path


@pytest.fixture(autouse=True)
def _not_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MOETRAIN_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def failing(error: Exception) -> Callable[..., int]:
    def launch(*_: Any) -> int:
        raise error

    return launch


@pytest.mark.parametrize(
    "words",
    ["", "train", "export", "data", "data preview", "data tokenize", "top", "report", "doctor"],
    ids=lambda w: w or "all",
)
def test_help(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*words.split(), "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: moetrain" in printed
    if words not in ("", "data"):
        assert f"examples:\n  moetrain {words}" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"moetrain {moetrain.__version__}\n"


@pytest.mark.parametrize("words", [[], ["trian"], ["train"], ["train", "a.yaml", "--fast"], ["report"]])
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "usage: moetrain" in capsys.readouterr().err


def test_train_launches_with_its_overrides(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def launch(*args: Any) -> int:
        calls.append(args)
        return 7

    monkeypatch.setattr(launcher, "launch", launch)
    assert cli.main(["train", str(config_file), "optim.lr=1e-4", "train.steps=2"]) == 7
    assert calls == [(str(config_file), ["optim.lr=1e-4", "train.steps=2"])]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("first line\nsecond [bold] line"), "error: first line\nsecond [bold] line\nMOETRAIN_DEBUG=1"),
        (FloatingPointError("step 3: the loss is nan"), "error: step 3: the loss is nan\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device\n"),
        (OSError(errno.EACCES, "Permission denied", "runs/mine"), "error: runs/mine: Permission denied\n"),
        (OSError("nobody/nothing is not a local folder"), "error: nobody/nothing is not a local folder\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_that_the_user_can_mend(
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    text: str,
) -> None:
    monkeypatch.setattr(launcher, "launch", failing(error))
    assert cli.main(["train", str(config_file)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(text) and "Traceback" not in printed.err
    assert printed.out == ""
    monkeypatch.setenv("MOETRAIN_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["train", str(config_file)])


@pytest.mark.parametrize(
    "error", [KeyError("x"), AssertionError("x"), RuntimeError("x"), ConnectionResetError(104, "x")]
)
def test_other_errors_keep_their_traceback(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(launcher, "launch", failing(error))
    with pytest.raises(type(error)):
        cli.main(["train", str(config_file)])


def test_print_config(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # an override behind the option counts too
    assert cli.main(["train", str(config_file), "train.steps=9", "--print-config", "optim.lr=1e-4"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    config: RunConfig = load_config(again)
    assert config == load_config(config_file, ["train.steps=9", "optim.lr=1e-4"])
    assert not (tmp_path / "out").exists()


def test_unknown_key_names_the_nearest(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(config_file), "optim.max_norm=1"]) == 2
    assert "optim.max_norm: unknown key; did you mean 'max_grad_norm'?" in capsys.readouterr().err


def test_report_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "error: no metrics.jsonl in" in capsys.readouterr().err


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) in (0, 1)
    assert "torch" in json.loads(capsys.readouterr().out)["versions"]


def test_doctor_says_what_a_run_would_use(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["parallel.processes=2", "parallel.ep_size=2"]
    assert cli.main(["doctor", str(config_file), *arguments, "--json"]) in (0, 1)
    run = dict(json.loads(capsys.readouterr().out)["run"])
    assert run["dispatch"] == "alltoall" and run["step"] == "eager: CUDA graphs need a GPU"
    assert cli.main(["doctor", str(config_file), "train.cuda_graph=off"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "eager: train.cuda_graph=off" in printed and "layout" in printed


def test_data_verbs(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "preview", str(config_file), "--rows", "1", "data.seq_len=48"]) == 0
    printed = capsys.readouterr().out
    assert "def add" in printed and "48" in printed
    assert cli.main(["data", "tokenize", str(config_file), "--out", str(tmp_path / "corpus")]) == 0
    (written,) = (tmp_path / "corpus").glob("*.tokens")
    assert str(written) in capsys.readouterr().out.replace("\n", "")


def dry_run(config_file: Path, *overrides: str) -> int:
    return cli.main(["train", str(config_file), "--dry-run", *overrides])


def test_dry_run_of_a_model_to_create(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(config_file) == 0
    printed = capsys.readouterr().out
    assert "4 processes: dp_replicate 1 x fsdp 4, ep 2: a rank holds 3 of 6 experts of a layer" in printed
    assert "24 rows of 32 = 768 tokens" in printed
    assert "5 steps, 3,840 tokens" in printed
    assert not (tmp_path / "out").exists() and not (tmp_path / "start").exists()


def test_dry_run_of_a_checkpoint(config_file: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(config_file, f"model.path={checkpoint}", "model.create=null") == 0
    assert "in 1 file, headers whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.ep_size=4", "ep_size=4 does not divide the model's 6 experts; valid on 4 ranks: [1, 2]"),
        ("parallel.dp_replicate_size=3", "dp_replicate_size=3 does not divide the world of 4 ranks; valid: [1, 2, 4]"),
        ("data.train=[{path: /nowhere/at/all.txt}]", "no such file or directory: /nowhere/at/all.txt"),
        ("output_dir=/dev/null/out", "output_dir /dev/null/out cannot be written"),
        ("model.create.config={hidden_size: 16}", "model.create.config needs a model_type"),
        ("model.create.vocab_size=257", "256 bytes and 2 special tokens need 258"),
        ("data.chat_template=nope.jinja", "data.chat_template: no such file: nope.jinja"),
        ("checkpoint.resume=nonex", "checkpoint.resume: nonex is not a complete training checkpoint"),
        ("data.loss_on=assistant", "data.loss_on=assistant needs chats, but"),
    ],
)
def test_dry_run_finds(config_file: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(config_file, override) == 2
    assert message in capsys.readouterr().err


DOCUMENTS = {
    "empty": ("", "a.jsonl: no documents in 1 file(s)", "no text to train a tokenizer on"),
    "bad line": ('{"txt": "x"}\n', "a.jsonl:1: no field 'text'", "a.jsonl:1: no field 'text'"),
    "chat": (
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n',
        "the tokenizer has no chat template; set data.chat_template",
        "the tokenizer has no chat template; set data.chat_template",
    ),
}


@pytest.mark.parametrize("case", DOCUMENTS)
@pytest.mark.parametrize("use", ["train", "validation"])
def test_dry_run_reads_the_first_document(
    config_file: Path, checkpoint: Path, tmp_path: Path, case: str, use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, of_a_checkpoint, of_one_to_create = DOCUMENTS[case]
    (tmp_path / "a.jsonl").write_text(content)
    sources = f"data.{use}=[{{path: {tmp_path / 'a.jsonl'}}}]"
    assert dry_run(config_file, sources, f"model.path={checkpoint}", "model.create=null") == 2
    assert of_a_checkpoint in capsys.readouterr().err
    assert dry_run(config_file, sources) == 2
    assert (of_one_to_create if use == "train" else of_a_checkpoint) in capsys.readouterr().err
    template = tmp_path / "a.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' }}")
    if case == "chat":
        assert dry_run(config_file, sources, f"data.chat_template={template}") == 0
    assert not (tmp_path / "out").exists() and not (tmp_path / "start").exists()


def test_dry_run_of_token_files(
    config_file: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_checkpoint = [f"model.path={checkpoint}", "model.create=null"]
    assert cli.main(["data", "tokenize", str(config_file), *from_checkpoint, "--out", str(tmp_path / "c")]) == 0
    (tokens,) = (tmp_path / "c").glob("*.tokens")
    (tmp_path / "b.txt").write_text(TEXT)
    sources = f"data.train=[{{path: {tmp_path / 'b.txt'}}}, {{path: {tokens}}}]"
    assert dry_run(config_file, sources, *from_checkpoint) == 0
    assert dry_run(config_file, sources) == 2
    assert f"{tokens} is tokenised already; a new tokenizer needs the text" in capsys.readouterr().err
    content = bytearray(tokens.read_bytes())
    content[5000] ^= 4
    tokens.write_bytes(content)
    assert dry_run(config_file, sources, *from_checkpoint) == 2
    assert f"{tokens} is damaged" in capsys.readouterr().err


def test_dry_run_colours_no_numbers(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard")
    monkeypatch.setattr(module, "get_console", lambda: console)
    assert dry_run(config_file) == 0
    assert "\x1b[1mstep    \x1b[0m24 rows of 32 = 768 tokens\n" in out.getvalue()


def test_dry_run_finds_a_truncated_shard(
    config_file: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    assert dry_run(config_file, f"model.path={broken}", "model.create=null") == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_dry_run_finds_a_foreign_tokenizer(
    config_file: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    model_config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(model_config | {"vocab_size": model_config["vocab_size"] - 1}))
    assert dry_run(config_file, f"model.path={other}", "model.create=null") == 2
    assert "this is not the model's tokenizer" in capsys.readouterr().err
