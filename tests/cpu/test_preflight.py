"""Preflight: what each check says of healthy, sick and missing hardware, and what becomes of it as a whole.

Tools are programs on PATH that print what the real ones print; /sys and /dev are a directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cluster import checks, links, node, preflight
from cluster.links import Pair, judge_pairs, measure, partner_of
from cluster.node import CRITICAL, OK, UNKNOWN, WARNING, Limits, Node, Status
from cluster.preflight import CHECKS, SLOW, Finding, examine, overall
from monitoring.stack import reserved_port

ROOT = Path(__file__).parents[2]
GPUS = 2
LINKS = "\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n"
HEALTHY = {
    "--query-gpu=name": "NVIDIA H100 80GB HBM3\n" * GPUS,
    "--query-gpu=ecc.errors.uncorrected.volatile.total": "0\n" * GPUS,
    "--query-remapped-rows=remapped_rows.pending,remapped_rows.failure": "0, 0\n" * GPUS,
    "--query-gpu=clocks_event_reasons.active,temperature.gpu": "0x0000000000000004, 41\n0x0000000000000001, 38\n",
    "nvlink": "".join(f"GPU {i}: NVIDIA H100 (UUID: GPU-0)\n{LINKS}" for i in range(GPUS)),
}
LIMITS = Limits(gpus=GPUS, nvlinks=2, gemm_tflops=500, memory_gb_per_second=2000, disk_paths=("/",), free_gb=0)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a program on PATH that answers by its first argument, with an exit code if it has one; alone on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def install(name: str, answers: dict[str, str], code: int = 0, sleep: float = 0.0) -> None:
        program = folder / name
        program.write_text(
            f"#!{sys.executable} -S\nimport sys, time\ntime.sleep({sleep})\nanswers = {answers!r}\n"
            f"key = sys.argv[1] if len(sys.argv) > 1 else ''\nif key not in answers: sys.exit(2)\n"
            f"sys.stdout.write(answers[key])\nsys.exit({code})\n"
        )
        program.chmod(0o755)

    return install


def ask_anew() -> None:
    for asked in (node.query, checks.gpu_rates, links.node_links):
        asked.cache_clear()


@pytest.fixture(autouse=True)
def _ask_anew() -> None:
    ask_anew()


@pytest.fixture
def machine(tmp_path: Path) -> Node:
    """A machine with GPUs on its bus."""
    root = tmp_path / "root"
    for index, (vendor, kind) in enumerate([("0x10de", "0x030200"), ("0x10de", "0x068000"), ("0x8086", "0x060000")]):
        device = root / f"sys/bus/pci/devices/0000:0{index}:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    return Node(LIMITS, root=root, deadline=time.monotonic() + 60)


def verdict(name: str, where: Node) -> tuple[Status, str]:
    (finding,) = examine(where, [name])
    return finding.status, finding.text


def figures(name: str, where: Node) -> Any:
    (finding,) = examine(where, [name])
    return finding.measured


# --- without GPUs -------------------------------------------------------------------------------------------------


def test_without_gpus_no_check_of_them_says_ok(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "gpu_rates", lambda _: [])
    monkeypatch.setattr(links, "gpu_rates", lambda _: [])
    empty = Node(replace(LIMITS, disk_paths=()), root=tmp_path)
    found = {
        finding.check: finding for finding in examine(empty, [name for name in CHECKS if name not in ("disk", "clock")])
    }
    assert {finding.status for finding in found.values()} == {UNKNOWN}, found
    assert found["gpus"].text == "nvidia-smi is not installed here"
    assert overall(list(found.values())) == UNKNOWN == 3


def test_the_command_line_on_a_machine_without_gpus(tmp_path: Path) -> None:
    """Without site-packages: Python alone is enough."""
    command = [sys.executable, "-S", "-m", "cluster.preflight", "--quick", "--json", "gpus", "infiniband", "image"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert result.returncode == 3, result.stderr
    found = json.loads(result.stdout)
    assert found["status"] == "unknown" and [item["check"] for item in found["findings"]] == [
        "gpus",
        "infiniband",
        "image",
    ]


def test_without_torch_rates_are_unknown(tools: Any, machine: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    tools("python", {}, code=1)
    monkeypatch.setattr(checks, "RATES", machine.root / "rates.py")
    (machine.root / "rates.py").write_text("import a_torch_that_is_not_there")
    assert verdict("gemm", machine) == (UNKNOWN, "ModuleNotFoundError: No module named 'a_torch_that_is_not_there'")
    ask_anew()
    (machine.root / "rates.py").write_text("raise RuntimeError('CUDA error: uncorrectable ECC error encountered')")
    assert verdict("gemm", machine) == (CRITICAL, "RuntimeError: CUDA error: uncorrectable ECC error encountered")


# --- the driver's view --------------------------------------------------------------------------------------------

SICK = [
    ("gpus", {}, OK, "2 x NVIDIA H100 80GB HBM3"),
    ("gpus", {"--query-gpu=name": "NVIDIA H100 80GB HBM3\n"}, CRITICAL, "1 x NVIDIA H100 80GB HBM3, expected 2"),
    ("ecc", {}, OK, "no uncorrected errors on 2 GPUs"),
    ("ecc", {"--query-gpu=ecc.errors.uncorrected.volatile.total": "0\n3\n"}, CRITICAL, "GPU 1: 3 uncorrected errors"),
    ("ecc", {"--query-gpu=ecc.errors.uncorrected.volatile.total": "[N/A]\n0\n"}, UNKNOWN, "not reported on GPU 0"),
    (
        "ecc",
        {"--query-remapped-rows=remapped_rows.pending,remapped_rows.failure": "0, 0\n0, 1\n"},
        CRITICAL,
        "GPU 1: row remapping failed",
    ),
    (
        "ecc",
        {"--query-remapped-rows=remapped_rows.pending,remapped_rows.failure": "Yes, No\nNo, No\n"},
        WARNING,
        "waits for a reset of GPU 0",
    ),
    ("clocks", {}, OK, "not throttled, the hottest GPU at 41 C"),
    (
        "clocks",
        {"--query-gpu=clocks_event_reasons.active,temperature.gpu": "0x0000000000000048, 92\n0x0, 40\n"},
        CRITICAL,
        "GPU 0 at 92 C: hardware slowdown; GPU 0 at 92 C: hardware thermal",
    ),
    ("nvlink", {}, OK, "2 links of each of 2 GPUs are up"),
    (
        "nvlink",
        {"nvlink": f"GPU 0: H100\n\t Link 0: 26.562 GB/s\n\t Link 1: <inactive>\nGPU 1: H100\n{LINKS}"},
        CRITICAL,
        "GPU 0: 1 links; expected 2",
    ),
    ("nvlink", {"nvlink": ""}, UNKNOWN, "reports no NVLink status"),
]


@pytest.mark.parametrize(("check", "answers", "status", "text"), SICK, ids=[f"{c[0]}: {c[3]}" for c in SICK])
def test_what_the_driver_tells(
    tools: Any, machine: Node, check: str, answers: dict[str, str], status: Status, text: str
) -> None:
    tools("nvidia-smi", HEALTHY | answers)
    found = verdict(check, machine)
    assert found[0] == status and text in found[1]


def test_older_drivers_name_throttling_otherwise(tools: Any, machine: Node) -> None:
    answers = {"--query-gpu=clocks_throttle_reasons.active,temperature.gpu": "0x0000000000000080, 50\n0x0, 40\n"}
    tools("nvidia-smi", answers)
    assert verdict("clocks", machine) == (CRITICAL, "GPU 0 at 50 C: power brake")


def test_a_driver_that_fails_or_hangs_on_a_machine_with_gpus_is_critical(
    tools: Any, machine: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = "--query-gpu=name"
    tools("nvidia-smi", {query: "Unable to determine the device handle for GPU0000:1B:00.0: Unknown Error\n"}, code=255)
    assert verdict("gpus", machine) == (
        CRITICAL,
        "nvidia-smi: Unable to determine the device handle for GPU0000:1B:00.0: Unknown Error",
    )
    assert verdict("gpus", replace(machine, root=machine.root / "elsewhere"))[0] == UNKNOWN, "no GPU on the bus"
    monkeypatch.setattr(node, "COMMAND_SECONDS", 0.2)
    monkeypatch.setattr(node.command, "__kwdefaults__", {"timeout": 0.2})
    tools("nvidia-smi", HEALTHY, sleep=5.0)
    ask_anew()
    assert verdict("gpus", machine) == (CRITICAL, "nvidia-smi: no answer within 0 s")


XID = "[ 1.0] NVRM: Xid (PCI:0000:1b:00): {}, pid=1, name=python, Ch 00000008\n"


@pytest.mark.parametrize(
    ("log", "status", "text"),
    [
        ("[ 0.1] NVRM: loading\n", OK, "no Xid"),
        ("[ 0.1] another kernel's log\n", UNKNOWN, "says nothing of the driver"),
        (XID.format(31) * 2 + XID.format(43), WARNING, "Xid 31 x2; Xid 43 x1"),
        (XID.format(31) + XID.format(79), CRITICAL, "Xid 79 x1 (fell off the bus)"),
    ],
    ids=["none", "no driver", "of programs", "of hardware"],
)
def test_xid(tools: Any, machine: Node, log: str, status: Status, text: str) -> None:
    tools("nvidia-smi", HEALTHY)
    tools("dmesg", {"": log})
    tools("journalctl", {"--dmesg": log})
    found = verdict("xid", machine)
    assert found[0] == status and text in found[1]


def test_the_kernel_log_may_be_the_journals(tools: Any, machine: Node) -> None:
    tools("nvidia-smi", HEALTHY)
    tools("dmesg", {"": ""}, code=1)
    assert verdict("xid", machine) == (UNKNOWN, "journalctl is not installed here")
    tools("journalctl", {"--dmesg": XID.format(74)})
    assert verdict("xid", machine)[0] == CRITICAL
    tools("dmesg", {"": "[ 9.9] what came after the driver's lines\n"})  # the kernel keeps the latest only
    assert verdict("xid", machine)[0] == CRITICAL


# --- rates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "rates", "status", "text"),
    [
        ("gemm", [610.0, 640.4], OK, "610 to 640 TFLOP/s"),
        ("gemm", [610.0, 410.0], CRITICAL, "GPU 1: 410 TFLOP/s, expected 500"),
        ("memory", [2900.0, 1500.0], CRITICAL, "GPU 1: 1,500 GB/s, expected 2,000"),
    ],
)
def test_rates_of_the_gpus(
    machine: Node, monkeypatch: pytest.MonkeyPatch, check: str, rates: list[float], status: Status, text: str
) -> None:
    key = {"gemm": "gemm_tflops", "memory": "memory_gb_per_second"}[check]
    (machine.root / "rates.py").write_text(
        f"print({json.dumps(json.dumps({'gpus': [{key: rate} for rate in rates], 'cuda': '13.0'}))})"
    )
    monkeypatch.setattr(checks, "RATES", machine.root / "rates.py")
    assert verdict(check, machine) == (status, text)
    assert figures(check, machine) == {key: rates}


@pytest.mark.parametrize(("cuda", "status"), [("13.0", CRITICAL), (None, UNKNOWN)], ids=["of torch", "torch for CPUs"])
def test_gpus_that_torch_does_not_see(
    machine: Node, monkeypatch: pytest.MonkeyPatch, cuda: str | None, status: Status
) -> None:
    (machine.root / "rates.py").write_text(f"print({json.dumps(json.dumps({'gpus': [], 'cuda': cuda}))})")
    monkeypatch.setattr(checks, "RATES", machine.root / "rates.py")
    for check in ("gemm", "all_reduce", "gpu_pairs", "pairs"):
        assert verdict(check, machine)[0] == status
    assert verdict("gemm", replace(machine, root=machine.root / "elsewhere"))[0] == UNKNOWN, "no GPU on the bus"


def test_gpus_that_hang_are_waited_for_once(machine: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.root / "rates.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(checks, "RATES", machine.root / "rates.py")
    monkeypatch.setattr(checks, "MEASURING_SECONDS", 1.0)
    with mock.patch.object(checks, "command", wraps=checks.command) as asked:
        for check in ("memory", "gemm", "all_reduce", "gpu_pairs", "pairs"):
            assert verdict(check, machine) == (CRITICAL, "no answer within 1 s")
    assert asked.call_count == 1


LINKED = {"bus_gb_per_second": 340.0, "pair_gb_per_second": [[0.0, 310.0], [290.0, 0.0]]}


@pytest.mark.parametrize(
    ("check", "links_do", "status", "text"),
    [
        ("all_reduce", {}, OK, "340 GB/s, expected 300"),
        ("all_reduce", {"bus_gb_per_second": 40.04}, CRITICAL, "40 GB/s, expected 300"),
        ("gpu_pairs", {}, OK, "290 to 310 GB/s between every two"),
        (
            "gpu_pairs",
            {"pair_gb_per_second": [[0.0, 310.0], [21.0, 0.0]]},
            CRITICAL,
            "GPU 1 to 0: 21 GB/s, expected 240",
        ),
    ],
)
def test_links_inside_a_node(
    machine: Node, monkeypatch: pytest.MonkeyPatch, check: str, links_do: dict[str, Any], status: Status, text: str
) -> None:
    monkeypatch.setattr(links, "gpu_rates", lambda _: [{}] * GPUS)
    asked = []

    def measured(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments[:4])
        return LINKED | links_do

    monkeypatch.setattr(links, "measure", measured)
    assert verdict(check, machine) == (status, text)
    assert verdict("all_reduce", machine)[0] in Status and asked == [("links", 2, 0, 2)], "measured once for both"
    assert figures("gpu_pairs", machine)["gb_per_second"] == (LINKED | links_do)["pair_gb_per_second"]


def test_one_gpu_has_no_links_inside_a_node(machine: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "gpu_rates", lambda _: [{}])
    for check in ("all_reduce", "gpu_pairs"):
        assert verdict(check, machine) == (UNKNOWN, "1 GPU here")


def test_every_pair_of_ranks_is_measured() -> None:
    """Over gloo: rows are senders, columns receivers, and nobody sends to itself."""
    with reserved_port(0) as port:
        found = measure("links", 3, 0, 3, "127.0.0.1", port, 120.0)
    assert 0.001 < found["bus_gb_per_second"] < 1000
    rates = found["pair_gb_per_second"]
    assert all((0.001 < rates[i][j] < 1000) == (i != j) for i in range(3) for j in range(3)), rates


def test_an_all_reduce_over_two_nodes_is_measured() -> None:
    """Over gloo, one rank on each."""
    found: dict[int, dict[str, float]] = {}

    def one(first: int, port: int) -> None:
        found[first] = measure("all-reduce", 1, first, 2, "127.0.0.1", port, 120.0)

    with reserved_port(0) as port:
        threads = [threading.Thread(target=one, args=(first, port)) for first in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found[0].keys() == found[1].keys() == {"bus_gb_per_second", "clock_skew_seconds"}
    assert 0.001 < found[0]["bus_gb_per_second"] < 1000 and 0 <= found[0]["clock_skew_seconds"] < 1


def test_a_partner_that_does_not_come_is_not_waited_for_long() -> None:
    begin = time.monotonic()
    with reserved_port(0) as port, pytest.raises(subprocess.TimeoutExpired):
        measure("all-reduce", 1, 0, 2, "127.0.0.1", port, 0.5)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("count", range(2, 18))
def test_everyone_meets_everyone_once(count: int) -> None:
    rounds = count - 1 + count % 2
    met: dict[int, list[int | None]] = {
        index: [partner_of(index, count, n) for n in range(rounds)] for index in range(count)
    }
    for index, partners in met.items():
        assert sorted(partner for partner in partners if partner is not None) == [i for i in range(count) if i != index]
        assert partners.count(None) == count % 2
        for number, partner in enumerate(partners):
            assert partner is None or met[partner][number] == index


@pytest.mark.parametrize(
    ("pairs", "status"),
    [
        ([Pair("b", 200.0, 0.1), Pair("c", 190.0, 0.2)], OK),
        ([Pair("b", 20.0, 0.1), Pair("c", 190.0, 0.2)], WARNING),
        ([Pair("b", failure="no answer within 40 s"), Pair("c", 190.0, 0.2)], WARNING),
        ([Pair("b", 20.0, 0.1), Pair("c", 21.0, 0.2)], CRITICAL),
        ([Pair("b", 200.0, 7.0), Pair("c", 200.0, 7.0)], CRITICAL),
        ([None, Pair("c", 20.0, 0.2)], CRITICAL),
        ([Pair("b", 200.0, 0.1), None], OK),
    ],
    ids=["healthy", "slow partner", "dead partner", "slow here", "clock wrong here", "odd and slow", "odd"],
)
def test_a_bad_node_is_told_from_a_bad_partner(pairs: list[Pair | None], status: Status) -> None:
    assert judge_pairs(pairs, Node(LIMITS))[0] == status


# --- network, disk, clock, image ----------------------------------------------------------------------------------


def adapter(root: Path, name: str, state: str = "4: ACTIVE", rate: str = "400 Gb/sec (4X NDR)") -> None:
    port = root / "sys/class/infiniband" / name / "ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "rate").write_text(f"{rate}\n")


def test_infiniband(machine: Node) -> None:
    wanted = replace(machine, infiniband=("mlx5_0", "mlx5_3"))
    assert verdict("infiniband", wanted) == (UNKNOWN, "this machine has no InfiniBand")
    adapter(machine.root, "mlx5_0")
    assert verdict("infiniband", wanted) == (CRITICAL, "mlx5_3 is missing")
    adapter(machine.root, "mlx5_3")
    assert verdict("infiniband", wanted) == (OK, "2 at 400 Gb/s")
    adapter(machine.root, "mlx5_4", state="1: DOWN")
    adapter(machine.root, "mlx5_5", rate="100 Gb/sec (4X EDR)")
    wanted = replace(machine, infiniband=("mlx5_4", "mlx5_5"))
    assert verdict("infiniband", wanted) == (CRITICAL, "mlx5_4 is DOWN; mlx5_5 runs at 100 Gb/sec")


def test_gdrcopy(tools: Any, machine: Node) -> None:
    tools("nvidia-smi", HEALTHY)
    assert verdict("gdrcopy", machine)[0] == UNKNOWN, "no InfiniBand that it would serve"
    machine = replace(machine, infiniband=("mlx5_0",))
    assert verdict("gdrcopy", machine)[0] == CRITICAL
    (machine.root / "dev").mkdir()
    (machine.root / "dev/gdrdrv").touch()
    (machine.root / "sys/module/gdrdrv").mkdir(parents=True)
    (machine.root / "sys/module/gdrdrv/version").write_text("2.5\n")
    assert verdict("gdrcopy", machine) == (OK, "gdrdrv 2.5")


def test_disk(machine: Node) -> None:
    def at(**limits: Any) -> tuple[Status, str]:
        return verdict("disk", replace(machine, limits=replace(LIMITS, **limits)))

    assert at()[0] == OK
    assert at(free_gb=1e9)[0] == CRITICAL and "expected 1,000,000,000" in at(free_gb=1e9)[1]
    assert at(disk_paths=("/nowhere",)) == (CRITICAL, "/nowhere: No such file or directory")
    if os.statvfs("/").f_files:
        assert "inodes free" in at(free_inodes=10**15)[1]


def test_clock_is_asked_of_the_kernel(machine: Node) -> None:
    status, text = verdict("clock", machine)
    assert (status, text) == (WARNING, "not synchronised with a time server") or "s wrong" in text


def test_image(machine: Node, tmp_path: Path) -> None:
    image = tmp_path / "image.sqsh"
    digest = hashlib.sha256(b"squashed").hexdigest()
    there = replace(machine, image=str(image), image_sha256=digest)
    assert verdict("image", machine)[0] == UNKNOWN
    assert verdict("image", there) == (CRITICAL, f"{image} is missing")
    image.write_bytes(b"squashed")
    assert verdict("image", there) == (OK, digest[:12])
    image.write_bytes(b"squashed by another")
    assert verdict("image", there)[0] == CRITICAL


# --- the whole ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "worst"),
    [
        ([OK, OK], 0),
        ([OK, WARNING, UNKNOWN], 1),
        ([UNKNOWN, WARNING, CRITICAL, OK], 2),
        ([OK, UNKNOWN], 3),
        ([], 3),
    ],
)
def test_exit_code_is_the_worst_as_nagios_has_it(statuses: list[Status], worst: int) -> None:
    assert overall([Finding("x", status, "") for status in statuses]) == worst


def test_what_is_not_reached_in_time_is_critical(machine: Node) -> None:
    late = replace(machine, deadline=time.monotonic() - 1)
    assert verdict("disk", late)[0] == CRITICAL and "not reached" in verdict("disk", late)[1]


def test_output_that_nobody_expects_is_unknown(tools: Any, machine: Node) -> None:
    tools("nvidia-smi", HEALTHY | {"--query-gpu=clocks_event_reasons.active,temperature.gpu": "busy\n"})
    assert verdict("clocks", machine)[0] == UNKNOWN


def test_text_and_json_say_the_same(
    tools: Any, machine: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tools("nvidia-smi", HEALTHY)
    site = tmp_path / "site.toml"
    site.write_text("[preflight]\ngpus = 3\nnvlinks = 2\n")
    monkeypatch.setenv("SLURMD_NODENAME", "h100-05")
    assert preflight.main(["--site", str(site), "gpus", "nvlink"]) == 2
    text = capsys.readouterr().out.splitlines()
    assert text == [
        "CRITICAL gpus       2 x NVIDIA H100 80GB HBM3, expected 3",
        "OK       nvlink     2 links of each of 2 GPUs are up",
        "CRITICAL h100-05",
    ]
    assert preflight.main(["--json", "--site", str(site), "gpus", "nvlink"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["node"] == "h100-05" and found["status"] == "critical"
    assert [(item["check"], item["status"]) for item in found["findings"]] == [("gpus", "critical"), ("nvlink", "ok")]
    assert found["findings"][1]["measured"] == {"links": [2, 2], "gb_per_second": [53.124, 53.124]}


def test_quick_leaves_out_what_takes_long() -> None:
    assert set(CHECKS) > SLOW == {"image", "memory", "gemm", "all_reduce", "gpu_pairs", "pairs"}


@pytest.mark.parametrize("flags", [["no_such_check"], ["--site", "/nowhere.toml"]])
def test_wrong_flags_are_told(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        preflight.main(flags)
    assert exit.value.code == UNKNOWN, "it is no verdict on the node"
    assert "no_such_check" in (error := capsys.readouterr().err) or "/nowhere.toml cannot be read" in error
