"""A run in a few words and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from moetrain.metrics import bytes_text
from moetrain.report.curves import FloatArray
from moetrain.report.history import ENDS, History, Record
from moetrain.report.text import clock, duration, loss_text, number, share

EVENTS_SHOWN = 200


def headline(history: History) -> str:
    """`validation loss 8.51 to 3.20 in 300 steps, 1 min 52 s`."""
    losses = history.eval_losses_V
    if len(losses) > 1 and np.isfinite(losses[[0, -1]]).all():
        change = f"validation loss {losses[0]:.2f} to {losses[-1]:.2f}"
    elif len(history.steps_S):
        change = f"training loss {loss_text(history['loss'][-1])}"
    else:
        change = f"validation loss {loss_text(losses[-1])}"
    if not len(history.steps_S):
        return change
    return f"{change} in {history.steps_S[-1]:,} steps, {duration(float(np.nansum(history['step_seconds'])))}"


def tiles(history: History) -> list[tuple[str, str, str]]:
    """Name, number and remark of what one looks at first."""
    found = []
    if len(history.steps_S):
        loss = history["loss"]
        found.append(("training loss", loss_text(loss[-1]), f"{loss_text(loss[0])} at first"))
    if len(history.eval_losses_V):
        best = np.nanmin(history.eval_losses_V) if np.isfinite(history.eval_losses_V).any() else math.nan
        found.append(("validation loss", loss_text(history.eval_losses_V[-1]), f"best {loss_text(float(best))}"))
    if len(history.steps_S):
        speed = median(history["tokens_per_second"]) / history.ranks
        planned = history.expected_tps
        against = f"{share(speed / planned)} of the {number(planned)} planned" if planned > 0 else "median of the steps"
        found.append(("tokens/s per GPU", number(speed), against))
        if math.isfinite(history.mfu):
            found.append(("MFU", share(history.mfu), "model FLOP/s over the peak"))
        found.append(("step time", f"{number(median(history['step_seconds']))} s", "median of the steps"))
        peak, total = top(history["memory_bytes"]), top(history["memory_total_bytes"])
        of = f"of {bytes_text(total)}, rank 0" if total > 0 else "rank 0"
        if math.isfinite(peak):
            found.append(("peak memory", bytes_text(peak), of))
        balance = history["expert_load_max_over_mean"]
        if np.isfinite(balance).any():
            found.append(("busiest expert", f"{number(median(balance), 3)} x", "of the mean load, median of the steps"))
    return found


def summary(history: History) -> dict[str, str]:
    """Rows of the table. Speed and time of a step are medians: the first step compiles and warms up."""
    rows = dict(_steps_rows(history)) if len(history.steps_S) else {}
    losses = history.eval_losses_V
    if len(losses):
        change = (
            f", {losses[-1] - losses[0]:+.3f} nats" if len(losses) > 1 and np.isfinite(losses[[0, -1]]).all() else ""
        )
        rows["validation loss"] = f"{loss_text(losses[0])} at first, {loss_text(losses[-1])} at last{change}"
    size = history.vocab_size
    if size:
        rows["ln(vocabulary)"] = f"{math.log(size):.3f} for {size:,} entries: the loss of a blind guess"
    if len(history.starts) > 1:
        rows["starts"] = f"{len(history.starts)}, the newest after step {history.about.get('start_step', 0)}"
    return rows


def _steps_rows(history: History) -> Iterator[tuple[str, str]]:
    loss, speed = history["loss"], median(history["tokens_per_second"])
    total = history.total_steps
    yield "steps", f"{history.steps_S[-1]:,}" + (f" of {total:,}" if total else "")
    yield "end", end(history)
    yield "label tokens", f"{np.nansum(history['tokens']):,.0f}"
    yield "training loss", f"{loss_text(loss[0])} at first, {loss_text(loss[-1])} at last"
    lost = int((~np.isfinite(loss)).sum())
    if lost:
        yield "steps without a finite loss", f"{lost:,}"
    yield "speed", f"{number(speed, 3)} tokens/s (median)" if math.isfinite(speed) else "-"
    if history.ranks > 1:
        yield "ranks", f"{history.ranks}, {number(speed / history.ranks)} tokens/s each"
    if math.isfinite(history.mfu):
        yield "MFU", f"{share(history.mfu)} of the GPU's peak, at the median speed"
    if history.expected_tps > 0:
        yield "planned speed", f"{number(history.expected_tps)} tokens/s per GPU"
    yield "step time", f"{median(history['step_seconds']):.3f} s (median)"
    yield "time in steps", duration(float(np.nansum(history["step_seconds"])))
    times = history["time"][np.isfinite(history["time"])]
    if len(times):
        yield "first and last step", f"{clock(float(times[0]))} to {clock(float(times[-1]))} UTC"
    memory, reserved = top(history["memory_bytes"]), top(history["memory_reserved_bytes"])
    if math.isfinite(memory):
        yield "memory, rank 0", bytes_text(memory) + " at its peak"
    if math.isfinite(reserved):
        yield "memory reserved, rank 0", bytes_text(reserved) + " at its peak"
    balance = history["expert_load_max_over_mean"]
    if np.isfinite(balance).any():
        yield "expert load", f"busiest over mean {median(balance):.2f} (median of the steps)"


def end(history: History) -> str:
    """How the newest start ended. A run that is killed cannot say so."""
    begun = _time(history.about)
    ends = [record for record in history.events if record.get("event") in ENDS and _time(record) >= begun]
    first = ends[0] if ends else {}  # a run that is out of time is done after it says so
    if first.get("event") == "stop":
        return f"stopped by {first.get('signal', 'a signal')}"
    if first.get("event") == "nonfinite":
        return f"step {first.get('step')} was not finite"
    if first or history.total_steps == history.steps_S[-1]:
        return "done"
    return "none written: it goes on, failed, or was killed"


def events(history: History) -> list[tuple[str, str, str]]:
    """Time, step and what happened, in the order of time; of a long list the newest."""
    rows = []
    for record in sorted(history.starts + history.events, key=_time):
        rows.append((clock(_time(record)), str(record.get("step", record.get("start_step", ""))), event_text(record)))
    return rows[-EVENTS_SHOWN:]


def event_text(record: Record) -> str:
    """What an event says, with its details."""
    if record["kind"] == "run":
        step = record.get("start_step")
        return f"goes on after step {step}" if step else "starts"
    what = str(record.get("event", "event")).replace("_", " ")
    hidden = {"kind", "time", "event", "step"}
    more = ", ".join(_detail(name, value) for name, value in record.items() if name not in hidden)
    return f"{what}: {more}" if more else what


def restarts(history: History) -> list[int]:
    """Steps after which a process took over."""
    return [step for record in history.starts if isinstance(step := record.get("start_step"), int) and step > 0]


def median(values: FloatArray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def top(values: FloatArray) -> float:
    known = values[np.isfinite(values)]
    return float(known.max()) if len(known) else math.nan


def _time(record: Record) -> float:
    time = record.get("time")
    return float(time) if isinstance(time, int | float) else 0.0


def _detail(name: str, value: object) -> str:
    text = number(value) if isinstance(value, float) else str(value)
    return f"{text} s" if name == "seconds" else f"{name.replace('_', ' ')} {text}"
