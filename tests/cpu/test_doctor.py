"""The doctor tells what is there and why not, and nothing about who owns the machine."""

from __future__ import annotations

import getpass
import io
import json
import os
import socket
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from moetrain import doctor


def run(as_json: bool) -> tuple[int, str]:
    text = io.StringIO()
    code = doctor.examine(as_json, Console(file=text, width=200))
    return code, text.getvalue()


def declare(monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: list(requirements))


def test_json_holds_versions_gpus_and_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "torch>=2.11")
    code, text = run(as_json=True)
    found = json.loads(text)
    assert code == 0 and found["problems"] == []
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["deep_ep"] is None or isinstance(found["versions"]["deep_ep"], str)
    assert bool(found["gpus"]) == torch.cuda.is_available()
    assert bool(found["no_gpu_because"]) != torch.cuda.is_available()
    backends = {backend["name"]: backend for backend in found["backends"]}
    assert backends["gloo"]["usable"]
    assert backends["nccl"]["usable"] == torch.cuda.is_available()
    assert all(bool(backend["why"]) != backend["usable"] for backend in backends.values())


def test_table_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torchao" else "1.0")
    code, text = run(as_json=False)
    assert code == 0
    row = next(line for line in text.splitlines() if line.startswith("torchao") and "8-bit" in line)
    assert row.rstrip().endswith("no: not installed; pip install torchao")
    assert "ready to train" in text


@pytest.mark.parametrize(
    ("requirement", "problem"),
    [
        ("transformers<5", f"transformers is {metadata.version('transformers')}; pip install 'transformers<5'"),
        ("no-such-package-here>=2", "no-such-package-here is missing; pip install 'no-such-package-here>=2'"),
        ("no-such-package-here>=2; extra == 'gpu'", None),
        ("no-such-package-here; python_version < '3'", None),
    ],
)
def test_unmet_requirement_is_a_problem(monkeypatch: pytest.MonkeyPatch, requirement: str, problem: str | None) -> None:
    declare(monkeypatch, requirement)
    code, text = run(as_json=False)
    assert code == (1 if problem else 0)
    if problem:
        assert f"problem: {problem}" in text
        assert "ready to train" not in text


def test_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_backend.py").write_text("raise OSError('/home/ann/env/lib/libbroken.so.2: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    found = doctor._package("broken_backend", "tests", "pip install broken")
    assert not found.usable
    assert found.why == "installed, but does not import: OSError: libbroken.so.2: cannot open"


def test_says_nothing_about_the_machine_or_its_owner(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    declare(monkeypatch)
    text = "".join(run(as_json)[1] for as_json in (False, True))
    captured = capfd.readouterr()
    text += captured.out + captured.err
    private = ["hf_secret_value", str(Path.home()) + "/", sys.prefix, os.getcwd(), socket.gethostname()]
    if len(getpass.getuser()) > 4:  # "root" and the like occur in words
        private.append(getpass.getuser())
    for word in private:
        assert len(word) < 3 or word not in text, word


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"smi": False}, "no NVIDIA driver on this machine; training runs on the CPU"),
        ({"smi": True, "cuda": None}, "this torch is built for CPUs only"),
        ({"smi": True, "cuda": "13.0"}, "torch sees no GPU"),
    ],
)
def test_reason_for_no_gpu(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "smi" if found["smi"] else None)
    monkeypatch.setattr(torch.version, "cuda", found.get("cuda"))
    assert doctor.why_no_gpu().startswith(expected)


def test_gpus_and_their_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA Test", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: abs(i - j) == 1)
    found = doctor.gpus()
    assert [gpu["peers"] for gpu in found] == [1, 2, 1]
    assert found[0] == {"name": "NVIDIA Test", "memory_bytes": 80 * 2**30, "capability": "9.0", "peers": 1}
    assert doctor.why_no_gpu() == ""


def test_pins_are_those_of_the_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock = tomllib.loads((Path(doctor.__file__).parents[1] / "containers/versions.lock").read_text(encoding="utf-8"))
    pins = lock["python"] | lock["gpu" if torch.version.cuda else "cpu"]
    found = doctor.pinned()
    assert found["torch"] == pins["torch"]["version"] and found["liger_kernel"] == pins["liger-kernel"]["version"]
    assert found["deep_ep"] == lock["sources"]["deep_ep"]["version"] and "mamba_ssm" not in found
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "moetrain/doctor.py"))
    monkeypatch.chdir(tmp_path)
    assert doctor.pinned() == {}
