"""A run from Prometheus, by its name: for a login node that sees neither the compute nodes nor the run's folder."""

from __future__ import annotations

import base64
import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from moetrain.top.snapshot import Rank, Snapshot

TIMEOUT_SECONDS = 10.0
WINDOW = "2m"
"""Over which rates are taken: some scrapes, and some steps."""
CURVE_SECONDS, CURVE_POINTS = 3600, 120
AT_ONCE = 6
"""Queries on their way together."""


def _in_steps(counter: str, window: str = WINDOW) -> str:
    """What all ranks counted over the seconds of the steps that counted it, and so exact however few scrapes there are:
    `rate` divides by the whole window, also in the first minutes of a run."""
    seconds = f"sum(increase(moetrain_step_duration_seconds_sum{{%s}}[{window}]))"
    return f"sum(increase({counter}{{%s}}[{window}])) / ({seconds} > 0)"


def _of_late(counter: str) -> str:
    """The same, over an hour where the window holds no step."""
    return f"{_in_steps(counter)} or {_in_steps(counter, '1h')}"


OWN = (
    f'sum by (rank, node) (rate(moetrain_phase_seconds_total{{%s, phase=~"forward_backward|optimizer"}}[{WINDOW}]))'
    f" / sum by (rank, node) (rate(moetrain_step_duration_seconds_count{{%s}}[{WINDOW}]))"
)
"""Own computation of each rank in a step."""
SINGLE = {
    "step": "max(moetrain_step{%s})",
    "total_steps": "max(moetrain_steps_planned{%s})",
    "validation_loss": "max(moetrain_validation_loss{%s})",
    "grad_norm": "max(moetrain_gradient_norm{%s})",
    "lr": "max(moetrain_learning_rate{%s})",
    "speed": _of_late("moetrain_tokens_total"),
    "expected_speed": "max(moetrain_expected_tokens_per_second_per_gpu{%s})",
    "mfu": f"({_of_late('moetrain_model_flops_total')}) / avg(moetrain_gpu_peak_flops{{%s}})",
    "step_seconds": f"1 / ({_of_late('moetrain_step_duration_seconds_count')})",
    "seconds_per_step": "sum(increase(moetrain_phase_seconds_total{%s}[10m]))"
    " / (sum(increase(moetrain_step_duration_seconds_count{%s}[10m])) > 0)",
    "last_step_time": "max(moetrain_last_step_timestamp_seconds{%s})",
    "memory_reserved": 'max(moetrain_gpu_memory_bytes{%s, kind="reserved"})',
    "idle_experts": f"sum(min_over_time(moetrain_idle_experts{{%s}}[{WINDOW}]))",
    "ranks": "count(up{%s})",
    "ranks_up": "sum(up{%s})",
    "median_rank_seconds": f"quantile(0.5, {OWN})",
    "checkpoint_time": "max(moetrain_last_checkpoint_timestamp_seconds{%s})",
    "checkpoint_step": "max(moetrain_last_checkpoint_step{%s})",
    "checkpoint_interval": "max(moetrain_checkpoint_interval_seconds{%s})",
    "checkpoint_failures": "max(increase(moetrain_checkpoint_failures_total{%s}[30m]))",
    "restarts": "max(moetrain_restarts{%s})",
    "nonfinite": "max(increase(moetrain_nonfinite_steps_total{%s}[30m]))",
    "redos_share": "max(increase(moetrain_overflow_redos_total{%s}[30m]))"
    " / max(increase(moetrain_step_duration_seconds_count{%s}[30m]))",
}
"""Queries of one number, by their field; `%s` stands for the run."""
MANY = {
    "memory": 'topk(1, moetrain_gpu_memory_bytes{%s, kind="peak"}'
    " / ignoring(kind) moetrain_gpu_memory_total_bytes{%s})",
    "memory_total": "max(moetrain_gpu_memory_total_bytes{%s})",
    "balance": f"topk(1, avg_over_time(moetrain_expert_load_max_over_mean{{%s}}[{WINDOW}]))",
    "slow_ranks": f"topk(3, {OWN})",
    "phases": f"sum by (phase) (rate(moetrain_phase_seconds_total{{%s}}[{WINDOW}]))",
    "state": "count by (phase) (moetrain_phase{%s} == 1)",
    "alerts": 'ALERTS{%s, alertstate="firing"}',
}
CURVES = {"losses": "max(moetrain_loss{%s})", "speeds": _in_steps("moetrain_tokens_total")}


class Sample(NamedTuple):
    """One series of an answer."""

    labels: dict[str, str]
    value: float


class PrometheusSource:
    """Snapshots of the run `run` from the server at `url`.

    Args:
        url: such as `http://monitor:9090`; a name and a password before the host are sent as basic authentication.

    Raises:
        ValueError: `url` is none.
    """

    def __init__(self, url: str, run: str) -> None:
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--prometheus {url}: give the server's address, such as http://localhost:9090")
        host = parts.netloc.rpartition("@")[2]
        self.name = f"{run} at {host}"
        self._run = run
        self._base = f"{parts.scheme}://{host}{parts.path.rstrip('/')}/api/v1/"
        self._headers = {}
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        quoted = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self._selector = f'run="{quoted}"'

    def read(self) -> Snapshot:
        """What the server knows now. Raises OSError where it does not answer, ValueError where it refuses."""
        now = time.time()
        instant = SINGLE | MANY
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = {name: pool.submit(self._instant, query, now) for name, query in instant.items()}
            curves = {name: pool.submit(self._curve, query, now) for name, query in CURVES.items()}
        found = {name: answer.result() for name, answer in answers.items()}
        return self._snapshot(now, found, {name: curve.result() for name, curve in curves.items()})

    def runs(self) -> list[str]:
        """Names of the runs that the server knows of."""
        answer = self._get("label/run/values", {"match[]": "moetrain_step"})
        return [str(name) for name in answer]

    def _snapshot(self, now: float, found: dict[str, list[Sample]], curves: dict[str, list[float]]) -> Snapshot:
        one = {name: _first(found[name]) for name in (*SINGLE, "memory_total")}
        shot = Snapshot(run=self._run, now=now, losses=curves["losses"], speeds=curves["speeds"])
        for name in ("step", "total_steps", "ranks", "ranks_up", "restarts"):
            setattr(shot, name, 0 if math.isnan(one[name]) else int(one[name]))
        for name in (
            *("validation_loss", "grad_norm", "lr", "speed", "expected_speed", "mfu", "step_seconds"),
            *("last_step_time", "memory_reserved", "memory_total", "idle_experts", "median_rank_seconds"),
            *("checkpoint_time", "checkpoint_step", "checkpoint_interval", "redos_share"),
        ):
            setattr(shot, name, one[name])
        shot.nonfinite, shot.checkpoint_failed = one["nonfinite"] > 0, one["checkpoint_failures"] > 0
        shot.left_seconds = max(shot.total_steps - shot.step, 0) * one["seconds_per_step"]
        for sample in found["memory"]:
            shot.memory, shot.memory_rank = sample.value * shot.memory_total, sample.labels.get("rank", "")
        for sample in found["balance"]:
            shot.balance, shot.balance_layer = sample.value, sample.labels.get("layer", "")
        shot.slow_ranks = [
            Rank(s.labels.get("rank", ""), s.value, s.labels.get("node", "")) for s in found["slow_ranks"]
        ]
        whole = sum(sample.value for sample in found["phases"])
        shot.phases = {s.labels["phase"]: s.value / whole for s in found["phases"]} if whole > 0 else {}
        shot.alerts = sorted({sample.labels.get("alertname", "") for sample in found["alerts"]})
        if found["state"]:
            shot.state = max(found["state"], key=lambda sample: sample.value).labels["phase"]
        shot.ended = shot.state == "done"
        return shot

    def _instant(self, query: str, now: float) -> list[Sample]:
        answer = self._get("query", {"query": query.replace("%s", self._selector), "time": f"{now:.3f}"})
        samples = [Sample(series["metric"], float(series["value"][1])) for series in answer["result"]]
        return [sample for sample in samples if not math.isnan(sample.value)]

    def _curve(self, query: str, now: float) -> list[float]:
        times = {"start": f"{now - CURVE_SECONDS:.3f}", "end": f"{now:.3f}", "step": str(CURVE_SECONDS // CURVE_POINTS)}
        answer = self._get("query_range", {"query": query.replace("%s", self._selector), **times})
        return [float(value) for series in answer["result"][:1] for _, value in series["values"]]

    def _get(self, path: str, parameters: dict[str, str]) -> Any:
        request = urllib.request.Request(
            f"{self._base}{path}?{urllib.parse.urlencode(parameters)}", headers=self._headers
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            if error.code == 401:
                raise ValueError(
                    f"{self._base} asks for a password: put name and password into the address, as in "
                    "http://name:password@host:9090"
                ) from error
            raise ValueError(f"{self._base} answers {error.code} {error.reason} to {path}") from error
        except http.client.HTTPException as error:  # it ended amid an answer
            raise ConnectionError(f"its answer breaks off: {type(error).__name__}") from error
        except ValueError as error:
            raise ValueError(f"{self._base} is no Prometheus: its answer is no JSON") from error
        if not isinstance(answer, dict) or "data" not in answer:
            raise ValueError(f"{self._base} is no Prometheus: its answer has no data")
        return answer["data"]


def _first(samples: list[Sample]) -> float:
    return samples[0].value if samples else math.nan
