"""Every number of a plan that is not counted, with where it comes from.

Rates are shares of the datasheet's: measured on an H200 (docs/measured.md), taken to other GPUs by their datasheets.
"""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30

# --- memory -----------------------------------------------------------------------------------------------------------

FRAGMENTATION_CAPTURED = 0.25
"""What a captured step takes from the GPU beyond its peak and `OUTSIDE_ALLOCATOR`: 22 to 26 % in four runs of
Qwen3-30B-A3B (4 H200: 89.5 GiB at a peak of 69.2, 82.9 at 66.0). A graph's pool gives nothing back, and a gradient does
not fit into the gaps that activations leave."""
FRAGMENTATION = 0.10
"""The same of an eager step. An allowance: eager runs took 24 % more as well, but on GPUs with room to spare, where
nothing makes torch give back the blocks that it keeps for reuse."""
OUTSIDE_ALLOCATOR = int(2.5 * GIB)
"""CUDA's context, libraries' workspaces and NCCL's buffers. An allowance, not a measurement."""
LOAD = {"learned": 1.25, "random": 1.02, "sequential": 1.0}
"""Rows of the fullest rank of a layer over the mean, by `balance.gate`. `learned` is an assumption for trained routers,
between `random` and random weights (`RANDOM_WEIGHTS`). A dispatcher of static shape lays out `moetrain.graph.MARGIN`
times as many."""
ALL_LAYERS = 1.1
"""The same at most for the rows of all layers together, which `alltoall` keeps: those of a rank stay within 10 % of the
mean (4 H200, docs/perf-notes.md, section 6)."""
RANDOM_WEIGHTS = 1.33
"""`LOAD` where a learned gate has random weights, the fullest of 8 passes, mean over layers: 1.66 times the mean were
laid out with a margin of 1.25 (Qwen3-30B-A3B, 4 H200, batch 1, docs/perf-notes.md, section 6)."""

# --- time -------------------------------------------------------------------------------------------------------------

DENSE = 660 / 989
"""qkv 647, o_proj 680 TFLOP/s (4,096 tokens, H200)."""
HEAD = 725 / 989
"""4,096 x 2,048 x 151,936."""
EXPERTS = ((192, 400 / 989), (256, 478 / 989), (512, 548 / 989), (2048, 630 / 989))
"""Rows of an expert and the mean over the six grouped products of a layer (docs/measured.md: nemotron-3-nano,
qwen3-30b-a3b, gpt-oss-20b, qwen3-30b-a3b-ep8); in between by straight lines."""
CUDNN_ATTENTION = {"forward": 517 / 989, "backward": 441 / 989}
"""cuDNN, causal, 32 heads of 128, 4,096 tokens."""
FLASH_ATTENTION = {"forward": 258 / 989, "backward": 237 / 989}
"""Flash attention 2 at the same shape, which takes windows and documents; kernels that read masks are not faster."""
RECURRENT = 0.25
"""Products of a scan. Not measured: a chunk's matrices are 64 to 128 wide, where tensor cores reach about a quarter."""
FP32_TFLOPS = 67.0
"""CUDA cores of Hopper (datasheet); torch keeps fp32 products off the tensor cores."""
PASSES = 0.76
"""Of the datasheet's memory rate: the expert layer's passes run at 79 to 96 % of a copy, which reaches 89 %."""
UPDATE = 3310 / 4800
"""AdamW and the gradients' norm, 7.6 B parameters of 16 bytes in 36.9 ms, waiting for the norm included (4 H200,
docs/measured.md)."""
GAP_SECONDS = 6.2e-3 / 1789
"""What the GPU is idle in a captured step for each kernel that a trace counts: 259.3 of 265.5 ms were busy (4 H200,
Qwen3-30B-A3B, docs/measured.md)."""
LAUNCH_SECONDS = 10.8e-6
"""One operator issued by the host (H200's host, eager)."""

ALL_TO_ALL = 289 / 450
"""NCCL's all_to_all_single, 32,768 rows of 4 KB, of NVLink's rate in one direction (8 H200)."""
DEEP_EP = 337 / 450
"""DeepEP's kernels in a node, as its users report for GPUs with Hopper's NVLink (H20, its issue 16). Not measured."""
NVLINK_PUSH = 320 / 450
"""`push tokens` and `push sums` (docs/measured.md)."""
COLLECTIVES = 330 / 450
"""NCCL's all-gather and reduce-scatter: 303 to 345 GB/s."""
HIDDEN = 0.45
"""Of what FSDP2 gathers and reduces, behind computation, at most. Transformers with FSDP2 alone, Qwen3-30B-A3B on 8
H200: 818 ms a pass, 690 of them with collectives running, beside about 430 of computation."""
NETWORK = 45 / 50
"""Of a 400 Gb/s port. DeepEP's kernels reach 49 to 51 GB/s at EP=64, 40 to 47 through torch (its README, and that of
its hybrid-ep branch)."""

# --- goodput ----------------------------------------------------------------------------------------------------------

GPU_HOURS_PER_STOP = 16_384 * 54 * 24 / 419
"""Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4)."""
RESTART_SECONDS = 300.0
"""From a stop to the first step, beside reading the checkpoint: requeue, containers, process groups, compilation. An
assumption; a plan says so."""
STORAGE_GB_S = 2.0
"""Written by each node to shared storage. An assumption; measure yours (`dd`, `fio`) and pass `--storage`."""


class Gpu(NamedTuple):
    """A kind of GPU in a node of eight, all joined by NVLink, with one network port each. Rates of the datasheet."""

    memory_bytes: int
    """As `nvidia-smi` shows it."""
    bf16_tflops: float
    """Dense."""
    memory_gb_s: float
    nvlink_gb_s: float
    """In one direction."""
    network_gb_s: float
    """Of its port, in one direction."""
    source: str


GPUS = {
    "h100-80gb": Gpu(
        81_559 * 2**20, 989, 3350, 450, 50, "NVIDIA H100 SXM datasheet; rates scaled from the H200's, same tensor cores"
    ),
    "h200": Gpu(143_771 * 2**20, 989, 4800, 450, 50, "NVIDIA H200 SXM datasheet; rates measured, docs/measured.md"),
    "b200": Gpu(
        183_359 * 2**20,
        2250,
        7700,
        900,
        50,
        "NVIDIA HGX B200 datasheet; rates scaled from the H200's, never run on one",
    ),
}
"""Kinds that `--gpu` knows."""
