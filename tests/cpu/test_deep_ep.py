"""What moetrain needs of DeepEP, how it chooses an interface, and what it says where there is none."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from moetrain import cli, doctor, graph, launcher
from moetrain.backends import deep_ep, deep_ep_links
from moetrain.backends.deep_ep import BufferLink, ElasticLink, Sizes, obstacle, why_waits
from moetrain.config import parse_config
from moetrain.moe import dispatch
from moetrain.moe.dispatch import Dispatcher, build_dispatcher
from moetrain.moe.layer import ep_implementation
from tests import deep_ep_fake

QWEN3 = Sizes(hidden=2048, top_k=8, num_local=16, dtype=torch.bfloat16)
GPT_OSS = Sizes(hidden=2880, top_k=4, num_local=4, dtype=torch.bfloat16)


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call it with interfaces, and ranks of a node, to have a deep_ep that offers them."""

    def offered(*interfaces: str, node: int = 8) -> Any:
        module = deep_ep_fake.Module(*interfaces)
        monkeypatch.setattr(deep_ep, "_module", lambda: module)
        monkeypatch.setattr(deep_ep, "missing", lambda: None)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
        deep_ep._choose.cache_clear()
        return module

    yield offered
    deep_ep._choose.cache_clear()


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def chosen(ranks: int, sizes: Sizes) -> Any:
    return deep_ep._choose(ranks, 8, sizes)[0]


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is not None, reason="DeepEP is installed")
def test_without_it_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = obstacle(8)
    assert reason is not None and reason.startswith("DeepEP is not installed; build") and "\n" not in reason
    group = SimpleNamespace(group_name="", size=lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(
        ValueError, match=r"dispatch='deep_ep' cannot be used: .* not installed.*; use 'nvlink', 'alltoall'"
    ):
        build_dispatcher("deep_ep", 8, group)  # type: ignore[arg-type]


def test_installed_without_a_gpu_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert deep_ep.missing.__wrapped__() == "DeepEP needs GPUs"

    def fails(name: str) -> None:
        raise AssertionError("Duplicate NCCL runtime found\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(deep_ep.importlib, "import_module", fails)
    assert deep_ep.missing.__wrapped__() == "DeepEP does not import: AssertionError: Duplicate NCCL runtime found"


def test_interface_is_chosen_by_what_is_there(offer: Any) -> None:
    offer("ElasticBuffer", "Buffer")
    assert chosen(8, QWEN3) is ElasticLink
    assert chosen(8, GPT_OSS) is BufferLink, "2880 is no multiple of 256"
    offer("Buffer")
    assert chosen(8, QWEN3) is BufferLink
    offer()
    assert obstacle(8) == "this deep_ep has no ElasticBuffer; this deep_ep has no Buffer"


def test_an_interface_that_lacks_a_parameter_is_not_taken(offer: Any) -> None:
    module = offer("ElasticBuffer", "Buffer")
    module.ElasticBuffer = type("ElasticBuffer", (deep_ep_fake.ElasticBuffer,), {"dispatch": lambda self, x, handle: x})
    assert chosen(8, QWEN3) is BufferLink
    del module.Buffer
    deep_ep._choose.cache_clear()
    reason = obstacle(8)
    assert reason is not None and reason.startswith("ElasticBuffer.dispatch of this deep_ep takes no do_cpu_sync, num_")


@pytest.mark.parametrize(
    ("ranks", "node", "reason"),
    [
        (8, 8, None),
        (4, 8, None),
        (16, 8, None),
        (3, 6, "no setting for 3 ranks"),
        (8, 4, "within a node, and a node has 4"),
        (16, 4, "needs 8 ranks on each node for an expert group of 16, and a node has 4"),
    ],
)
def test_layouts_of_buffer(offer: Any, ranks: int, node: int, reason: str | None) -> None:
    offer("Buffer", node=node)
    found = obstacle(ranks)
    assert found is None if reason is None else found is not None and reason in found
    offer("ElasticBuffer", node=node)
    assert obstacle(ranks) is None


@pytest.mark.parametrize(
    ("change", "elastic", "buffer"),
    [
        ({}, None, None),
        ({"hidden": 2880}, "hidden size 2880 is no multiple of 256", None),
        ({"hidden": 2056}, "no multiple of 256", "no multiple of 16"),
        ({"hidden": 8192}, None, "up to 8176"),
        ({"top_k": 33}, "33 experts of a token are more than 32", "33 experts"),
        ({"dtype": torch.float32}, "tokens are float32, not bfloat16", "float32"),
        ({"num_local": 129}, None, "129 experts on a rank are more than 128"),
        ({"num_local": 256}, None, "256 experts on a rank are more than 128"),
        ({"num_local": 257}, "257 experts on a rank are more than 256", "257 experts on a rank"),
    ],
)
def test_sizes(offer: Any, change: dict[str, Any], elastic: str | None, buffer: str | None) -> None:
    for name, wanted in (("ElasticBuffer", elastic), ("Buffer", buffer)):
        offer(name)
        found = obstacle(8, QWEN3._replace(**change))
        assert found is None if wanted is None else found is not None and wanted in found, (name, found)
    if elastic and buffer:
        offer("ElasticBuffer", "Buffer")
        group = SimpleNamespace(size=lambda: 8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "get_world_size", lambda group=None: 8)
            with pytest.raises(ValueError, match=r"does not take this model: .*; use 'nvlink', 'alltoall' or 'auto'"):
                deep_ep.link_for(group, QWEN3._replace(**change))  # type: ignore[arg-type]


def test_between_nodes_only_wide_enough_steps_of_hidden(offer: Any) -> None:
    offer("Buffer")
    assert obstacle(16, QWEN3) is None and obstacle(16, GPT_OSS) is not None and obstacle(8, GPT_OSS) is None


def test_no_more_experts_than_elastic_buffer_counts(offer: Any) -> None:
    offer("ElasticBuffer")
    assert obstacle(16, QWEN3._replace(num_local=128)) is None
    reason = obstacle(16, QWEN3._replace(num_local=129))
    assert reason is not None and "2064 experts are more than 2048" in reason


def test_multiprocessors_where_no_speed_can_be_read() -> None:
    def fails(num_experts: int, top_k: int) -> int:
        raise ZeroDivisionError

    for answer, wanted in ((lambda *_: 14, 14), (lambda *_: 4, 20), (fails, 20)):
        assert deep_ep_links._count_sms(SimpleNamespace(get_theoretical_num_sms=answer), 128, 8) == wanted


def test_network_is_left_out_in_a_node_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, needed, inside in ((None, False, "1"), (None, True, None), ("0", False, "0")):
        if before is None:
            monkeypatch.delenv("EP_DISABLE_GIN", raising=False)
        else:
            monkeypatch.setenv("EP_DISABLE_GIN", before)
        with deep_ep_links._network(needed):
            assert os.environ.get("EP_DISABLE_GIN") == inside
        assert os.environ.get("EP_DISABLE_GIN") == before


def test_deterministic_algorithms(offer: Any, deterministic: None) -> None:
    """DeepEP takes them where torch does not fill new tensors, and between nodes it then waits for the host."""
    offer("ElasticBuffer")
    assert why_waits(8) is None and "deterministic order" in str(why_waits(16))
    group: Any = SimpleNamespace(size=lambda: 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_world_size", lambda group=None: 8)
        with pytest.raises(ValueError, match=r"needs torch\.utils\.deterministic\.fill_uninitialized_memory = False"):
            deep_ep.link_for(group, QWEN3)


def test_what_waits_for_the_host(offer: Any) -> None:
    offer("ElasticBuffer")
    assert why_waits(8) is None and why_waits(16) is None
    module = offer("Buffer")
    assert why_waits(8) is None and why_waits(16) is None
    module.Buffer = type("Buffer", (deep_ep_fake.Buffer,), {"internode_dispatch": lambda self, x, handle=None: x})
    deep_ep._choose.cache_clear()
    reason = why_waits(16)
    assert why_waits(8) is None and reason is not None and "takes no num_worst_tokens between nodes" in reason
    assert dispatch.why_waits("deep_ep", 16) == reason and dispatch.why_waits("nvlink", 16) is None
    assert "alltoall reads" in str(dispatch.why_waits("alltoall", 16)) and dispatch.why_waits("local", 1) is None


def test_a_waiting_dispatcher_keeps_the_step_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(Dispatcher):
        waits = "it reads a count"
        dispatch = combine = None  # type: ignore[assignment]

    model: Any = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(graph, "dispatchers_of", lambda model: [("a", Waiting(4))])
    monkeypatch.setattr(graph, "experts_modules", lambda model: iter(()))
    assert graph.capture_obstacle(model) == "it reads a count"
    monkeypatch.setattr(graph, "dispatchers_of", lambda model: [])
    assert graph.capture_obstacle(model) is None
    assert graph.capture_obstacle(model, waits="it will read a count") == "it will read a count"


@pytest.mark.parametrize("name", ["Buffer", "ElasticBuffer"])
def test_fake_takes_what_the_real_one_takes(name: str) -> None:
    """Same names, in the same order, with the same defaults."""
    if deep_ep.missing():
        pytest.skip(str(deep_ep.missing()))
    real_class = getattr(deep_ep._module(), name, None)
    if real_class is None:
        pytest.skip(f"this deep_ep has no {name}")
    fake_class = getattr(deep_ep_fake, name)
    for call in ("__init__", *(call for call in vars(fake_class) if not call.startswith("_"))):
        if not inspect.isfunction(getattr(fake_class, call)) or not hasattr(real_class, call):
            continue
        real = inspect.signature(getattr(real_class, call)).parameters
        fake = inspect.signature(getattr(fake_class, call)).parameters
        names = [p for p in fake if p in real or p != "num_worst_tokens"]  # its lack is asked for
        assert [p for p in real if p in fake] == names, call
        assert all(real[p].default == fake[p].default for p in names), call


def test_names_that_a_user_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = {
        "output_dir": "out",
        "model": {"path": "x", "kernels": "te", "dispatch": "deepep"},
        "data": {"train": [{"path": "y"}]},
        "train": {"steps": 1},
    }
    model = parse_config(raw).model
    assert (model.kernels, model.dispatch) == ("transformer_engine", "deep_ep")
    with pytest.raises(ValueError, match=r"model\.dispatch: .*'deep_ep'"):
        parse_config({**raw, "model": {"path": "x", "dispatch": "deep"}})

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**raw, "model": {"path": "x"}}))
    launched: list[list[str]] = []

    def launch(config: str, overrides: list[str]) -> int:
        launched.append(overrides)
        return 0

    monkeypatch.setattr(launcher, "launch", launch)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["train", str(file), "--kernels", "te", "--dispatch", "deepep", "optim.lr=1"]) == 0
    assert sorted(launched[0]) == ["model.dispatch=deepep", "model.kernels=te", "optim.lr=1"]
    assert cli.main(["train", str(file), "--dispatch", "deepep", "--print-config"]) == 0
    assert "dispatch: deep_ep" in capsys.readouterr().out
    assert ep_implementation("deep_ep") == "moetrain_deep_ep"


def test_bench_takes_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from moetrain.bench import compare

    cases: list[Any] = []

    def bench_model(case: Any, *_: Any) -> int:
        cases.append(case)
        return 0

    monkeypatch.setattr(compare, "bench_model", bench_model)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert cli.main(["bench", "tiny", "--kernels", "te", "--dispatch", "deepep"]) == 0
    assert (cases[0].kernels, cases[0].dispatch) == ("transformer_engine", "deep_ep")
    assert cases[0].run_config().model.kernels == "transformer_engine"


def test_doctor_names_both_backends() -> None:
    found = {backend.name: backend for backend in doctor.backends()}
    for name, option in (("transformer_engine", "--kernels te"), ("deep_ep", "--dispatch deepep")):
        assert option in found[name].gives and bool(found[name].why) != found[name].usable
    assert "deepseek-ai/DeepEP" in found["deep_ep"].why or found["deep_ep"].usable or torch.cuda.is_available()
