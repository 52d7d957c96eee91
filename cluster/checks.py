"""Checks of what a node has and what its GPUs do; each returns a status and a line. `preflight.py` has the table."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

from cluster.node import (
    CRITICAL,
    FAILED,
    MEASURING_SECONDS,
    OK,
    UNKNOWN,
    WARNING,
    Broken,
    Node,
    Result,
    command,
    nvidia_smi,
    once,
    query,
    why,
)

RATES = Path(__file__).with_name("rates.py")


def check_gpus(node: Node) -> Result:
    """As many GPUs as there should be."""
    names = [row[0] for row in query(node, "gpu", "name")]
    found = f"{len(names)} x {', '.join(sorted(set(names)))}"
    if len(names) != node.limits.gpus:
        return CRITICAL, f"{found}, expected {node.limits.gpus}", {"names": names}
    return OK, found, {"names": names}


def check_ecc(node: Node) -> Result:
    """No uncorrected memory error since the driver was loaded; every bad row of memory is mapped away."""
    errors = [row[0] for row in query(node, "gpu", "ecc.errors.uncorrected.volatile.total")]
    rows = query(node, "remapped-rows", "remapped_rows.pending,remapped_rows.failure")
    bad = [f"GPU {i}: {count} uncorrected errors" for i, count in enumerate(errors) if _is_set(count)]
    bad += [f"GPU {i}: row remapping failed" for i, row in enumerate(rows) if _is_set(row[1])]
    if bad:
        return CRITICAL, "; ".join(bad)
    if waiting := [str(i) for i, row in enumerate(rows) if _is_set(row[0])]:
        return WARNING, f"row remapping waits for a reset of GPU {', '.join(waiting)}"
    if unseen := [str(i) for i, count in enumerate(errors) if not count.isdigit()]:
        return UNKNOWN, f"ECC is off or not reported on GPU {', '.join(unseen)}"
    return OK, f"no uncorrected errors on {len(errors)} GPUs"


DRIVER = "NVRM:"
"""What lines of the driver begin with in the kernel's log; it says so when it is loaded."""
XID_HARDWARE = {
    48: "double-bit memory error",
    63: "row remapping or page retirement",
    64: "row remapping or page retirement failed",
    74: "NVLink error",
    79: "fell off the bus",
    92: "many corrected memory errors",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "the GPU's own processor timed out",
    120: "error of the GPU's own processor",
    140: "unrecovered memory error",
}
"""Xid numbers that speak of the hardware, from NVIDIA's list; the others are mostly a program's mistake."""


def check_xid(node: Node) -> Result:
    """No hardware error in the kernel's log since the machine started."""
    query(node, "gpu", "name")
    found: dict[int, int] = {}
    log = kernel_log()
    if DRIVER not in log:
        return UNKNOWN, "the kernel's log, as far as it can be read here, says nothing of the driver"
    for number in re.findall(DRIVER + r" Xid \(.*?\): (\d+)", log):
        found[int(number)] = found.get(int(number), 0) + 1
    if bad := [f"Xid {n} x{found[n]} ({XID_HARDWARE[n]})" for n in sorted(found) if n in XID_HARDWARE]:
        return CRITICAL, "; ".join(bad), {"xids": found}
    if found:
        return WARNING, "; ".join(f"Xid {n} x{count}" for n, count in sorted(found.items())), {"xids": found}
    return OK, "no Xid since the machine started"


THROTTLE = {0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}
"""Bits of NVML's clock event reasons that slow a healthy GPU down; idle, power cap and settings are not among them."""


def check_clocks(node: Node) -> Result:
    """No GPU is slowed down by heat or by the machine's power supply."""
    try:
        rows = query(node, "gpu", "clocks_event_reasons.active,temperature.gpu")
    except FAILED:  # drivers before 535 know the older name only
        rows = query(node, "gpu", "clocks_throttle_reasons.active,temperature.gpu")
    bad, hottest = [], "?"
    for i, (reasons, temperature) in enumerate(rows):
        mask = int(reasons, 16)
        bad += [f"GPU {i} at {temperature} C: {text}" for bit, text in THROTTLE.items() if mask & bit]
        hottest = max(hottest, temperature, key=lambda text: int(text) if text.isdigit() else -1)
    measured = {"reasons": [row[0] for row in rows], "celsius": [row[1] for row in rows]}
    if bad:
        return CRITICAL, "; ".join(bad), measured
    return OK, f"not throttled, the hottest GPU at {hottest} C", measured


def check_nvlink(node: Node) -> Result:
    """All NVLinks of all GPUs are up."""
    active: list[list[float]] = []
    for line in nvidia_smi(node, "nvlink", "--status").splitlines():
        if line.startswith("GPU"):
            active.append([])
        elif found := re.search(r"Link \d+: ([\d.]+) GB/s", line):
            active[-1].append(float(found[1]))
    if not active:
        return UNKNOWN, "nvidia-smi reports no NVLink status"
    measured = {"links": [len(rates) for rates in active], "gb_per_second": [sum(rates) for rates in active]}
    bad = [f"GPU {i}: {len(rates)} links" for i, rates in enumerate(active) if len(rates) != node.limits.nvlinks]
    if bad:
        return CRITICAL, f"{'; '.join(bad)}; expected {node.limits.nvlinks}", measured
    return OK, f"{node.limits.nvlinks} links of each of {len(active)} GPUs are up", measured


def check_infiniband(node: Node) -> Result:
    """Every adapter of the site file is active at its rate."""
    if not node.infiniband:
        return UNKNOWN, "the site file names no devices"
    bad = []
    for device in node.infiniband:
        port = node.root / "sys/class/infiniband" / device / "ports/1"
        if not port.is_dir():
            bad.append(f"{device} is missing")
            continue
        state, rate = ((port / name).read_text().strip() for name in ("state", "rate"))
        if "ACTIVE" not in state:
            bad.append(f"{device} is {state.partition(': ')[2] or state}")
        elif float(rate.split()[0]) < node.infiniband_gbps:
            bad.append(f"{device} runs at {rate.partition(' (')[0]}")
    if len(bad) == len(node.infiniband) and not (node.root / "sys/class/infiniband").is_dir():
        return UNKNOWN, "this machine has no InfiniBand"
    return (CRITICAL, "; ".join(bad)) if bad else (OK, f"{len(node.infiniband)} at {node.infiniband_gbps:g} Gb/s")


def check_gdrcopy(node: Node) -> Result:
    """GDRCopy's driver is loaded; between nodes, DeepEP's low-latency transport writes through it."""
    if not node.infiniband:
        return UNKNOWN, "the site file names no InfiniBand devices that it would serve"
    query(node, "gpu", "name")
    version = node.root / "sys/module/gdrdrv/version"
    if not (node.root / "dev/gdrdrv").exists():
        return CRITICAL, "/dev/gdrdrv is missing: the gdrdrv module is not loaded, or not mounted into the container"
    return OK, f"gdrdrv {version.read_text().strip()}" if version.is_file() else "/dev/gdrdrv"


def check_disk(node: Node) -> Result:
    """Room and inodes where jobs write."""
    bad, seen, measured = [], [], {}
    for path in node.limits.disk_paths:
        try:
            found = os.statvfs(path)
        except OSError as error:
            bad.append(f"{path}: {error.strerror}")
            continue
        free, inodes = found.f_bavail * found.f_frsize / 1e9, found.f_favail
        seen.append(f"{path} {free:,.0f} GB free")
        measured[path] = {"free_gb": round(free, 1), "free_inodes": inodes}
        if free < node.limits.free_gb:
            bad.append(f"{path} has {free:,.1f} GB free, expected {node.limits.free_gb:,.0f}")
        if found.f_files and inodes < node.limits.free_inodes:  # some file systems count none
            bad.append(f"{path} has {inodes:,} inodes free, expected {node.limits.free_inodes:,}")
    return (CRITICAL, "; ".join(bad), measured) if bad else (OK, ", ".join(seen), measured)


class _Timex(ctypes.Structure):
    """The beginning of the kernel's `struct timex`."""

    _fields_ = (
        *(("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long)),
        *(("maxerror", ctypes.c_long), ("esterror", ctypes.c_long), ("rest", ctypes.c_byte * 256)),
    )


def check_clock(node: Node) -> Result:
    """The kernel's clock is synchronised, and by its own estimate right."""
    timex = _Timex()
    state = ctypes.CDLL(None).adjtimex(ctypes.byref(timex))
    if state < 0:
        return UNKNOWN, "the kernel does not tell"
    error = timex.maxerror / 1e6
    if state == 5:  # TIME_ERROR
        return WARNING, "not synchronised with a time server"
    limit = node.limits.clock_skew_seconds
    text = f"at most {error:.3f} s wrong, expected {limit:g}"
    return OK if error <= limit else CRITICAL, text, {"error_seconds": error}


def check_image(node: Node) -> Result:
    """The image on this node has the hash that all nodes expect."""
    if node.image is None or node.image_sha256 is None:
        return UNKNOWN, "the site file names no image with a hash"
    if not Path(node.image).is_file():
        return CRITICAL, f"{node.image} is missing"
    digest = hashlib.sha256()
    with open(node.image, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
            if time.monotonic() > node.deadline:
                return CRITICAL, f"{node.image} could not be read in time"
    found = digest.hexdigest()
    if found != node.image_sha256:
        return CRITICAL, f"{found[:12]} is not {node.image_sha256[:12]}", {"sha256": found}
    return OK, found[:12], {"sha256": found}


def check_memory(node: Node) -> Result:
    """Bandwidth of each GPU's memory."""
    return _slowest(node, "memory_gb_per_second", "GB/s", node.limits.memory_gb_per_second)


def check_gemm(node: Node) -> Result:
    """Rate of a bf16 matrix product on each GPU."""
    return _slowest(node, "gemm_tflops", "TFLOP/s", node.limits.gemm_tflops)


def kernel_log() -> str:
    """The kernel's messages. Many systems show them to root alone, but to members of a group through the journal, which
    also keeps what the kernel has overwritten."""
    try:
        if DRIVER in (log := command("dmesg")):
            return log
    except FAILED:
        pass
    return command("journalctl", "--dmesg", "--boot", "--no-pager", "--quiet")


@once
def gpu_rates(node: Node) -> list[dict[str, float]]:
    """What torch measures on each GPU of the node; empty where it sees none.

    Raises:
        Broken: it fails on a machine that has GPUs, or does not see them.
        OSError, subprocess.SubprocessError: there is no torch.
    """
    try:
        output = command(sys.executable, str(RATES), "gpus", timeout=node.remaining(MEASURING_SECONDS))
    except FAILED as error:
        raise blame(node, error) from error
    found = json.loads(output)
    rates: list[dict[str, float]] = found["gpus"]
    if not rates and found["cuda"] and node.has_gpus():
        raise Broken(f"torch, built for CUDA {found['cuda']}, sees no GPU")
    return rates


def blame(node: Node, error: Exception) -> Exception:
    """`Broken` where a measurement failed on a machine with GPUs and torch; else the error itself."""
    return Broken(why(error)) if node.has_gpus() and "No module named" not in why(error) else error


def _slowest(node: Node, name: str, unit: str, expected: float) -> Result:
    found = [rates[name] for rates in gpu_rates(node)]
    if not found:
        return UNKNOWN, "no GPU here"
    bad = [f"GPU {i}: {rate:,.0f}" for i, rate in enumerate(found) if rate < expected]
    measured = {name: [round(rate, 1) for rate in found]}
    if bad:
        return CRITICAL, f"{'; '.join(bad)} {unit}, expected {expected:,.0f}", measured
    return OK, f"{min(found):,.0f} to {max(found):,.0f} {unit}", measured


def _is_set(cell: str) -> bool:
    """Whether a count or flag of nvidia-smi is there and not zero."""
    return cell.lower() not in ("0", "no", "n/a", "[n/a]", "[not supported]", "")
