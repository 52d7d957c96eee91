"""A simulated run: steps, evaluations and checkpoints of all its ranks, in the series that a real rank exports.

Times are seconds since the start of the demo. L layers with E experts each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrain.metrics.records import PHASES, LayerLoads
from moetrain.metrics.series import Series
from monitoring.demo.faults import Fault, active, begun

SETUP, EVALUATION, SAVE, RESTART = 20.0, 12.0, 8.0, 90.0
"""Seconds that each takes; of the last, that pass between two restarts."""
EVALUATE_EVERY, SAVE_EVERY, STEPS = 100, 60, 20_000
TOKENS = 65_536
"""Of a rank in a step: a model with 3 billion active parameters at a third of the GPU's peak."""
FLOPS_PER_TOKEN, PEAK_FLOPS = 2.1e10, 989e12
MEMORY = 141e9
SHARES = {"own": 0.72, "optimizer": 0.05, "data": 0.01, "exchange": 0.2, "other": 0.02}
"""Of a step without trouble."""


@dataclass(frozen=True)
class Shape:
    """What is simulated."""

    name: str
    nodes: int = 16
    gpus: int = 8
    step_seconds: float = 4.0
    layers: int = 24
    experts: int = 64

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def node(self, rank: int) -> str:
        return self.node_names[rank // self.gpus]

    @property
    def node_names(self) -> list[str]:
        return [f"{self.name}-{number:02d}" for number in range(1, self.nodes + 1)]


class Run:
    """A run that is where it should be at each `advance`.

    Args:
        epoch: Unix time of second 0.
        speed: how many times faster than real everything happens, for tests.
    """

    def __init__(self, shape: Shape, faults: Sequence[Fault], epoch: float, speed: float = 1.0, seed: int = 0) -> None:
        self.shape, self.faults = shape, faults
        self.victim = shape.nodes // 2 * shape.gpus + shape.gpus // 2
        """The rank that faults of one rank hit; its node is that which is lost."""
        self._epoch, self._speed = epoch, speed
        self._random = np.random.default_rng([seed, shape.ranks])
        self._popularity_LE = self._random.dirichlet(np.full(shape.experts, 8.0), size=shape.layers)
        self._restarts, self._productive, self._saved_step = 0, 0.0, 0
        self._next_restart = math.inf
        self._steps_made = 0  # of all starts
        self._until = 0.0  # when the ranks are done with what they do
        self._start(0.0)

    def answers(self, rank: int, seconds: float) -> bool:
        """Whether a scrape of a rank gets something."""
        trouble = active(self.faults, seconds)
        if "crash" in trouble:
            return False
        lost = "node-loss" in trouble and self.shape.node(rank) == self.shape.node(self.victim)
        return not (lost or ("rank-down" in trouble and rank == self.victim))

    def discoverable(self, seconds: float) -> bool:
        """Whether the discovery file of this run is there."""
        return "vanish" not in active(self.faults, seconds)

    def page(self, rank: int) -> bytes:
        """The text of a rank's `/metrics`."""
        return self.series[rank].page()

    def advance(self, seconds: float) -> None:
        """Do all that happened until now."""
        trouble = active(self.faults, seconds)
        if "restart-loop" not in trouble:
            self._next_restart = math.inf
        elif seconds >= self._next_restart or self._next_restart == math.inf:
            self._next_restart = seconds + RESTART / self._speed
            self._restarts += 1
            self._start(seconds)
        while seconds >= self._until:
            if self._held(trouble):
                self._until = seconds + 1e-3
                return
            self._finish(self._until, trouble)

    # --- one thing after the other ------------------------------------------------------------------------------------

    def _held(self, trouble: frozenset[str]) -> bool:
        """All ranks wait for one that is not there, or for storage that does not answer."""
        if self._state == "checkpoint":
            return "slow-save" in trouble
        return self._state == "train" and bool(trouble & {"stall", "rank-down", "node-loss", "crash"})

    def _start(self, seconds: float) -> None:
        """New processes: their counters are 0 again."""
        self.series = [Series(whole_run=rank == 0) for rank in range(self.shape.ranks)]
        self._phases = [dict.fromkeys(PHASES, 0.0) for _ in self.series]
        self._step = self._saved_step
        self._describe()
        self._begin("setup", seconds, SETUP)

    def _begin(self, state: str, seconds: float, lasts: float) -> None:
        lasts /= self._speed
        if state == "train":
            self._own = self._own_seconds(active(self.faults, seconds))
            data = SHARES["data"] + (0.45 if "slow" in active(self.faults, seconds) else 0.0)
            self._data = data * self.shape.step_seconds / self._speed
            rest = sum(SHARES[name] for name in ("optimizer", "exchange", "other"))
            lasts = max(self._own) + self._data + rest * self.shape.step_seconds / self._speed
            self._work = [own / lasts / SHARES["own"] for own in self._own]
        self._begun, self._until = seconds, seconds + lasts
        self._state = state  # after what it needs: pages are made meanwhile
        self._publish()

    def _finish(self, seconds: float, trouble: frozenset[str]) -> None:
        """The end of what the ranks do, and the beginning of the next."""
        self._lasts = seconds - self._begun
        if self._state == "train":
            self._finish_step(seconds, trouble)
        elif self._state == "checkpoint":
            self._finish_save(seconds, trouble)
        else:
            self._charge("evaluate" if self._state == "evaluate" else "other", self._lasts)
            if self._state == "evaluate":
                self.series[0].set(validation_loss=self._smooth_loss() + 0.05)
        due = self._state == "train"
        if due and (self._step % SAVE_EVERY == 0 or "slow-save" in trouble) and "no-checkpoint" not in trouble:
            self._begin("checkpoint", seconds, SAVE)
        elif due and self._step % EVALUATE_EVERY == 0:
            self._begin("evaluate", seconds, EVALUATION)
        else:
            self._begin("train", seconds, 0.0)

    def _finish_step(self, seconds: float, trouble: frozenset[str]) -> None:
        self._step += 1
        self._steps_made += 1
        unit = self.shape.step_seconds / self._speed
        optimizer, other = SHARES["optimizer"] * unit, SHARES["other"] * unit
        redo = "overflow" in trouble and self._step % 4 == 0
        for rank, (series, phases, own) in enumerate(zip(self.series, self._phases, self._own, strict=True)):
            spent = {"data_wait": self._data, "forward_backward": own, "optimizer": optimizer, "other": other}
            for name, value in spent.items():
                phases[name] += value
            phases["collective_wait"] += self._lasts - sum(spent.values())
            series.add(tokens=TOKENS, label_tokens=TOKENS * 0.9, model_flops=TOKENS * FLOPS_PER_TOKEN)
            series.add(nonfinite_steps="nan" in trouble, overflow_redos=redo)
            series.observe_step(self._lasts)
            series.set(step=self._step, last_step_seconds=self._lasts)
            series.set(last_step_timestamp_seconds=self._epoch + seconds)
            full = "memory" in trouble and rank == self.victim
            series.memory = (0.61 * MEMORY, (0.98 if full else 0.84) * MEMORY, (0.97 if full else 0.8) * MEMORY)
        self._productive += self._lasts
        self._tell_of_run(trouble)

    def _finish_save(self, seconds: float, trouble: frozenset[str]) -> None:
        first = self.series[0]
        self._charge("checkpoint", self._lasts)
        first.add(checkpoint_seconds=self._lasts)
        if "failed-checkpoint" in trouble:
            first.add(checkpoint_failures=1)
        else:
            self._saved_step = self._step
            first.add(checkpoint_saves=1)
            first.set(last_checkpoint_timestamp_seconds=self._epoch + seconds, last_checkpoint_step=self._step)

    # --- what the series say ------------------------------------------------------------------------------------------

    def _describe(self) -> None:
        shape = self.shape
        for rank, series in enumerate(self.series):
            place = {"dp": rank // shape.gpus, "ep": rank % shape.gpus, "fsdp": rank, "dp_replicate": 0}
            series.inform("rank", {**place, "gpu": rank % shape.gpus, "gpu_name": "NVIDIA H200"})
            series.set(steps_planned=STEPS, step=self._step, gpu_peak_flops=PEAK_FLOPS, gpu_memory_total_bytes=MEMORY)
        first = self.series[0]
        first.inform(
            "run",
            {
                "model": "simulated-30b-a3b",
                "model_type": "qwen3_moe",
                "world_size": shape.ranks,
                "ep_size": shape.gpus,
                "gate": "learned",
                "git": "unknown",
                "config_hash": "0" * 12,
            },
        )
        versions = dict.fromkeys(("moetrain", "torch", "transformers", "cuda", "triton"), "simulated")
        first.inform("version", versions)
        first.layers = {f"{layer}": shape.experts for layer in range(shape.layers)}
        first.experts_LE = np.zeros((shape.layers, shape.experts))
        first.add(productive_seconds=self._productive)
        first.set(restarts=self._restarts, start_timestamp_seconds=self._epoch, resumed_step=self._step)
        self._tell_plan(frozenset())

    def _tell_of_run(self, trouble: frozenset[str]) -> None:
        first = self.series[0]
        loss = self._smooth_loss() + self._random.normal(0, 0.01)
        if "loss-spike" in trouble:
            loss *= 1.6
        warmup, decay = min(1.0, self._step / 100), 0.5 * (1 + math.cos(math.pi * min(1.0, self._step / STEPS)))
        first.set(
            loss=math.nan if "nan" in trouble else loss,
            gradient_norm=math.nan
            if "nan" in trouble
            else 0.4 + 2 / (1 + self._step / 20) + self._random.normal(0, 0.03),
            learning_rate=2e-5 * warmup * decay,
            checkpoint_interval_seconds=SAVE_EVERY * first.mean_step_seconds,
        )
        first.add(productive_seconds=self._lasts)
        self._tell_plan(trouble)
        popularity_LE = self._drifted(trouble)
        tokens = TOKENS * self.shape.ranks * 8
        assert first.experts_LE is not None
        first.experts_LE = first.experts_LE + np.rint(popularity_LE * tokens)
        first.loads = loads_of(popularity_LE)

    def _tell_plan(self, trouble: frozenset[str]) -> None:
        planned = TOKENS / (self.shape.step_seconds / self._speed)
        self.series[0].set(expected_tokens_per_second_per_gpu=planned * (1.5 if "below-plan" in trouble else 1.03))

    def _drifted(self, trouble: frozenset[str]) -> NDArray[np.float64]:
        """Shares of the experts in this step, by layer."""
        noise_LE = self._random.normal(1, 0.02, self._popularity_LE.shape)
        drift_LE = 1 + 0.15 * np.sin(self._step / 50 + np.arange(self._popularity_LE.size).reshape(noise_LE.shape))
        popularity_LE: NDArray[np.float64] = self._popularity_LE * noise_LE * drift_LE
        middle = self.shape.layers // 2
        if "dead-expert" in trouble:
            popularity_LE[middle, 3] = 0.0
        if "busy-expert" in trouble:
            share = min(0.9, 12 / self.shape.experts)
            popularity_LE[middle, 5] = 0.0
            popularity_LE[middle, 5] = popularity_LE[middle].sum() * share / (1 - share)
        popularity_LE /= popularity_LE.sum(axis=1, keepdims=True)
        return popularity_LE

    def _own_seconds(self, trouble: frozenset[str]) -> list[float]:
        """What each rank computes in a step."""
        unit = SHARES["own"] * self.shape.step_seconds / self._speed
        own = (unit * self._random.normal(1.0, 0.006, self.shape.ranks)).tolist()
        if "straggler" in trouble:
            own[self.victim] *= 1.3
        return list(own)

    def _smooth_loss(self) -> float:
        return 1.6 + 1.4 * math.exp(-self._step / 400)

    def _charge(self, phase: str, lasts: float) -> None:
        for phases in self._phases:
            phases[phase] += lasts

    def _publish(self) -> None:
        for series, phases in zip(self.series, self._phases, strict=True):
            series.publish(self._state, phases)

    # --- for the hardware ---------------------------------------------------------------------------------------------

    def busy(self, seconds: float) -> bool:
        """Whether the GPUs have work."""
        return self._state in ("train", "evaluate") and not self._held(active(self.faults, seconds))

    def work(self, rank: int, seconds: float) -> float:
        """Share of the time in which a GPU computes, over that of a step without trouble: ranks that wait for another
        compute less."""
        if self._state != "train" or not self.busy(seconds):
            return float(self.busy(seconds))
        return self._work[rank]

    @property
    def exchanging(self) -> float:
        """Seconds that the steps of all starts would have taken without trouble: what crosses the network grows with
        them."""
        return self._steps_made * self.shape.step_seconds / self._speed

    def begun(self, name: str, seconds: float) -> int:
        return begun(self.faults, name, seconds)


def loads_of(share_LE: NDArray[np.float64]) -> LayerLoads:
    """Balance of each layer, from its experts' shares."""
    relative_LE = share_LE * share_LE.shape[1]
    logs_LE = np.log(np.where(share_LE > 0, share_LE, 1.0))
    return LayerLoads(
        max_over_mean=relative_LE.max(axis=1).tolist(),
        min_over_mean=relative_LE.min(axis=1).tolist(),
        idle_experts=(share_LE == 0).sum(axis=1).tolist(),
        entropy=(-(share_LE * logs_LE).sum(axis=1) / math.log(share_LE.shape[1])).tolist(),
    )
