"""The configuration: strict, with errors that name what to write instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from moetrain.config import RunConfig, load_config, parse_config
from moetrain.report import config_yaml

MINIMAL = {
    "output_dir": "out",
    "model": {"path": "start"},
    "data": {"train": [{"path": "a.txt"}]},
    "train": {"steps": 3},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


def test_defaults_and_overrides(path: Path) -> None:
    config = load_config(
        path, ["optim.lr=2e-5", "train.steps=7", "model.trust_remote_code=true", "data.cache_dir=null"]
    )
    assert config.optim.lr == 2e-5
    assert config.train.steps == 7
    assert config.model.trust_remote_code is True
    assert config.data.seq_len == 4096
    assert load_config(path).model.trust_remote_code is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "optim.learning_rate: unknown key; valid keys: betas, eps, lr"),
        ("data.seq_length=1", "data.seq_length: unknown key; did you mean 'seq_len'"),
        ("trian.steps=1", "trian: unknown key; did you mean 'train'"),
        ("model.create.vocabsize=9", "did you mean 'vocab_size'"),
        ("train.steps=0", "train.steps: Input should be greater than 0"),
        ("train.steps=many", "train.steps: "),
        ("data.on_bad_line=ignore", "data.on_bad_line: Input should be 'fail' or 'skip'"),
        ("optim.warmup_steps=3", "optim.warmup_steps=3 leaves no step of train.steps=3"),
        ("optim.lr", "'optim.lr' is not of the form section.key=value"),
        ("output_dir.x=1", "output_dir is not a section"),
        ("data.train.0.path=x", "train is a list; write it whole, data.train=[...]"),
        ("optim.lr=[1", "override 'optim.lr=[1': the value is no YAML: while parsing a flow sequence"),
    ],
)
def test_wrong_override(path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(path, [override])


def test_unknown_key_in_a_list_names_the_nearest() -> None:
    raw = MINIMAL | {"data": {"train": [{"path": "a.txt", "txt_key": "t"}]}}
    with pytest.raises(ValueError, match=r"data\.train\.0\.txt_key: unknown key; did you mean 'text_key'"):
        parse_config(raw)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ValueError) as error:
        parse_config({"output_dir": "out", "model": {}, "data": {"train": []}, "train": {"steps": 1}})
    assert "model.path: Field required" in str(error.value)
    assert "data.train: List should have at least 1 item" in str(error.value)


@pytest.mark.parametrize("content", ["- a\n- b\n", "just text", ""])
def test_file_without_a_mapping(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match="must hold a mapping with the sections output_dir, model"):
        load_config(file)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no configuration file at"):
        load_config(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: }")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(broken)


@pytest.mark.parametrize("docs", [True, False])
def test_printed_configuration_reads_back(tmp_path: Path, path: Path, docs: bool) -> None:
    create = "model.create={vocab_size: 512, config: {model_type: qwen3_moe, hidden_size: 64}}"
    config = load_config(
        path, [create, "optim.max_grad_norm=null", "optim.lr=3e-4", "train.sample_prompt='def f():\n'"]
    )
    printed = config_yaml(config, docs=docs)
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert load_config(again) == config
    assert ("# Tokens in a packed row." in printed) == docs


def test_printed_configuration_holds_every_field() -> None:
    printed = yaml.safe_load(config_yaml(parse_config(MINIMAL)))
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert name in printed
        if isinstance(section, type) and issubclass(section, BaseModel):
            assert printed[name].keys() == section.model_fields.keys()
