"""Run at a glance: is it healthy, and how fast is it against its plan?"""

from __future__ import annotations

from typing import Any

from monitoring.dashboards.page import events, nodes, one_run, page
from monitoring.dashboards.panels import Column, heat, lines, listing, number, shares, states
from monitoring.dashboards.queries import FIRING_HERE, RUN, buckets, now, phase_code, query, rows
from monitoring.dashboards.style import ANY_IS_BAD, SEVERITIES, dashed, phase_names, steps, value

UID = "moetrain-glance"
SILENT = "No rank answers"
STEP = f"max(moetrain_step{{{RUN}}})"
PLANNED = f"max(moetrain_steps_planned{{{RUN}}})"
SECONDS = f"sum(increase(moetrain_phase_seconds_total{{{RUN}}}[%s]))"
STEPS = f"sum(increase(moetrain_step_duration_seconds_count{{{RUN}}}[%s]))"
PACE = " or ".join(f"{SECONDS} / ({STEPS} > 0)" % (window, window) for window in ("5m", "1h"))
"""Seconds of a step with all that is done between two, also where a scrape or a step is minutes apart."""
MOVING = f"run:moetrain_seconds_since_progress:min{{{RUN}}} < on (run) run:moetrain_stall_limit_seconds:max{{{RUN}}}"
UP = f'up{{job="moetrain", {RUN}}}'
STEP_SPEED = f"run:moetrain_step_tokens_per_second_per_gpu:avg{{{RUN}}}"
SPEED = f"run:moetrain_tokens_per_second_per_gpu:avg{{{RUN}}}"
SAVED_AGO = f"(time() - max(moetrain_last_checkpoint_timestamp_seconds{{{RUN}}} > 0))"
PLAN = f"max by (run) (moetrain_expected_tokens_per_second_per_gpu{{{RUN}}}) > 0"


def dashboard() -> dict[str, Any]:
    """The page that a run's owner keeps open."""
    about = (
        "Is the run healthy, how fast is it against its plan, and what interrupted it? "
        "Green tiles and no firing alert: nothing to do. Otherwise follow the tile's description."
    )
    sections = [
        ("Now", [*_state(), *_speed(), _course()]),
        ("Learning", _learning()),
        ("Speed", _course_of_speed()),
        ("What holds it up", _health()),
    ]
    return page(UID, "Run at a glance", about, sections, [one_run(), nodes()], annotations=events())


def _state() -> list[Any]:
    state = number(
        "State",
        "none",
        now(f"max({phase_code(RUN)})"),
        about="What the ranks do now. `setup` for more than 30 minutes: look at rank 0's log.",
        empty="Not running",
        width=3,
    ).mappings(phase_names())
    return [
        state,
        number(
            "Step",
            "none",
            now(STEP, "done"),
            now(PLANNED, "planned"),
            about="Optimizer steps done, and `train.steps`.",
            empty=SILENT,
            width=3,
            names=True,
            decimals=0,
        ),
        number(
            "Time left",
            "s",
            now(f"({PLANNED} - {STEP}) * ({PACE}) and on () {MOVING}"),
            about="Steps that are left, at the pace of the last five minutes, with evaluations and checkpoints.",
            empty="Not moving",
            width=3,
        ),
        number(
            "Since the last step",
            "s",
            now(f"time() - max(moetrain_last_step_timestamp_seconds{{{RUN}}})"),
            about="Below ten step times is healthy. Beyond, every other tile shows old values: see State and the log "
            "of "
            "the rank that waits least in 'Ranks and stragglers'.",
            empty="No step yet",
            width=3,
            steps=((None, "green"), (60, "orange"), (300, "red")),
        ),
        number(
            "Ranks",
            "none",
            now(f"sum({UP})", "up"),
            now(f"count({UP} == 0) or 0 * sum({UP})", "down"),
            about="Ranks that answer Prometheus, and those that do not. One down: its node or process died; "
            "read its log, then the node's hardware.",
            empty="No targets",
            width=3,
            names=True,
            decimals=0,
        ).override_by_name("down", [steps(ANY_IS_BAD)]),
        number(
            "Alerts firing",
            "none",
            now(f"count({FIRING_HERE}) or vector(0)"),
            about="Of this run and of the hardware of its nodes. Each alert below names its likely cause and the "
            "first command to run.",
            empty="No rules loaded",
            width=3,
            steps=ANY_IS_BAD,
            decimals=0,
        ),
        number(
            "Steps with NaN or Inf",
            "none",
            now(f"max(increase(moetrain_nonfinite_steps_total{{{RUN}}}[$__range]))"),
            about="Of this time range. Any: lower the learning rate or look at the data of that step.",
            empty=SILENT,
            width=3,
            steps=ANY_IS_BAD,
            decimals=0,
        ),
        number(
            "Restarts",
            "none",
            now(f"max(moetrain_restarts{{{RUN}}})"),
            about="How often the run was resumed. Many within an hour: a restart loop, the last lines of the log "
            "repeat.",
            empty="No rank 0",
            width=3,
            steps=((None, "green"), (1, "orange"), (5, "red")),
            decimals=0,
        ),
    ]


def _speed() -> list[Any]:
    return [
        number(
            "Loss",
            "none",
            query(f"moetrain_loss{{{RUN}}}"),
            about="Of the last step, in nats a token. Flat is not healthy by itself: see Since the last step.",
            empty="No step yet",
            decimals=3,
        ),
        number(
            "Tokens/s per GPU",
            "short",
            query(SPEED),
            about="Mean over the GPUs. A CPU run counts each rank as one.",
            empty="No step yet",
        ),
        number(
            "Against the plan",
            "percentunit",
            query(f"{STEP_SPEED} / on (run) ({PLAN})"),
            about="Speed in steps, evaluations and checkpoints left out, over what `moetrain plan` expected. Below 90 "
            "%: look at the shares of time and at stragglers "
            "before anything else.",
            empty="No plan known",
            steps=((None, "red"), (0.8, "orange"), (0.9, "green")),
            decimals=0,
        ),
        number(
            "MFU",
            "percentunit",
            query(f"run:moetrain_mfu:ratio{{{RUN}}}"),
            about="Model FLOPs, recomputation left out, over the dense bf16 peak. What is good depends on the model "
            "and "
            "its number of active parameters: compare with the plan and with earlier runs.",
            empty="No peak known (CPU)",
            decimals=1,
        ),
        number(
            "Goodput",
            "percentunit",
            query(f"run:moetrain_goodput:ratio{{{RUN}}}"),
            about="Seconds in steps whose work was kept, over all seconds since the run's first start, "
            "with restarts, lost steps and checkpoints. Early in a run the start-up weighs much.",
            empty="No step yet",
            steps=((None, "red"), (0.8, "orange"), (0.9, "green")),
            decimals=1,
        ),
        number(
            "Last checkpoint",
            "s",
            now(SAVED_AGO, "ago"),
            now(f"{SAVED_AGO} / max(moetrain_checkpoint_interval_seconds{{{RUN}}} > 0)", "of interval"),
            about="Work that a crash would lose, and how much of the time between two saves that is. Past two "
            "intervals: "
            "saving fails or hangs; look for `checkpoint` in rank 0's log and at the room on disk.",
            empty="None saved yet",
            names=True,
            decimals=0,
        ).override_by_name(
            "of interval", [value("unit", "percentunit"), steps(((None, "green"), (1.2, "orange"), (2, "red")))]
        ),
    ]


def _course() -> Any:
    down = f"min by (run) ({UP}) == 0"
    return states(
        "What the run did",
        query(f"({down}) or on (run) max by (run) ({phase_code(RUN)})", "{{run}}"),
        phase_names(),
        about="Green is training; goodput is lost in everything else. Red: at least one rank did not answer. A gap: "
        "none was looked for, between two jobs.",
        empty="Not running",
        height=4,
    )


def _learning() -> list[Any]:
    loss = lines(
        "Training and validation loss",
        "none",
        query(f"moetrain_loss{{{RUN}}}", "training"),
        query(f"moetrain_validation_loss{{{RUN}}}", "validation"),
        about="Nats a token. A spike that comes back within some tens of steps is common; one that stays, or NaN, "
        "needs an earlier checkpoint and a lower learning rate. Gaps: nothing was scraped.",
        empty="No step yet",
        from_zero=False,
        height=9,
    ).override_by_name("validation", [value("custom.lineInterpolation", "stepAfter"), value("custom.lineWidth", 2)])
    return [
        loss,
        lines(
            "Gradient norm",
            "none",
            query(f"moetrain_gradient_norm{{{RUN}}}", "before clipping"),
            about="Global L2 norm before clipping. It falls and then stays level; rising for long announces "
            "divergence.",
            empty="No step yet",
            width=6,
            height=9,
        ),
        lines(
            "Learning rate",
            "sci",
            query(f"moetrain_learning_rate{{{RUN}}}", "learning rate"),
            about="As scheduled. A jump after a restart: the schedule was not resumed.",
            empty="No step yet",
            width=6,
            height=9,
        ),
    ]


def _course_of_speed() -> list[Any]:
    return [
        lines(
            "Tokens/s per GPU against the plan",
            "short",
            query(SPEED, "measured"),
            query(STEP_SPEED, "in steps only"),
            query(PLAN, "plan"),
            about="Level and near the plan is good. Saw teeth are evaluations and checkpoints; a step down that stays "
            "is "
            "a straggler, a throttled GPU or another data source.",
            empty="No step yet",
        ).override_by_name("plan", dashed("blue")),
        lines(
            "TFLOP/s per GPU",
            "none",
            query(f"run:moetrain_tflops_per_gpu:avg{{{RUN}}}", "TFLOP/s"),
            about="Model FLOPs, without recomputation.",
            empty="No step yet",
            width=6,
        ),
        lines(
            "MFU over time",
            "percentunit",
            query(f"run:moetrain_mfu:ratio{{{RUN}}}", "MFU"),
            about="Model FLOPs over the dense bf16 peak of the GPUs.",
            empty="No peak known (CPU)",
            width=6,
        ),
        lines(
            "Step time",
            "s",
            query(f"quantile(0.5, rank:moetrain_step_seconds:mean{{{RUN}}})", "median rank"),
            query(f"max(rank:moetrain_step_seconds:mean{{{RUN}}})", "slowest rank"),
            about="Ranks wait for each other, so both lines are close even with a straggler; "
            "'Ranks and stragglers' compares their own compute.",
            empty="No step yet",
        ),
        heat(
            "Step time, steps of all ranks",
            "short",
            buckets(f"sum by (le) (increase(moetrain_step_duration_seconds_bucket{{{RUN}}}[$__rate_interval]))"),
            about="One bright band is good. A second band: some steps wait for data, an evaluation or a checkpoint.",
            empty="No step yet",
            rows_are="step time",
            row_unit="s",
            low=0,
        ),
    ]


def _health() -> list[Any]:
    memory = f"moetrain_gpu_memory_bytes{{{RUN}, "
    columns = {
        "alertname": Column("Alert"),
        "severity": Column("Severity", width=90, words=SEVERITIES),
        "node": Column("Node", width=110),
        "rank": Column("Rank", width=70),
        "layer": Column("Layer", width=70),
    }
    return [
        shares(
            "Where the time goes",
            'run:moetrain_phase:share{%s, phase="%s"}',
            about="Shares of wall time, all ranks. `forward_backward` should be nearly all of it. Much `data_wait`: "
            "more "
            "loader workers; much `collective_wait`: a straggler or a slow link; much `checkpoint`: save less often.",
            empty="No step yet",
        ),
        listing(
            "Firing alerts",
            columns,
            rows(FIRING_HERE),
            about="The alert's annotations in Alertmanager name the likely cause and the first command to run.",
            empty="None: all rules are quiet",
        ),
        lines(
            "GPU memory, fullest rank",
            "bytes",
            query(f'max({memory}kind="allocated"}})', "allocated"),
            query(f'max({memory}kind="reserved"}})', "reserved"),
            query(f'max({memory}kind="peak"}})', "peak"),
            query(f"min(moetrain_gpu_memory_total_bytes{{{RUN}}})", "capacity"),
            about="Peak needs a few percent of room below capacity. Closer: smaller batches, activation checkpointing "
            "or "
            "a wider expert group. On a CPU: the resident set of the process and the machine's memory.",
            empty="No rank answers",
        ).override_by_name("capacity", dashed("red")),
        lines(
            "Busiest expert over the mean, worst layer",
            "none",
            query(f"run:moetrain_expert_imbalance:max{{{RUN}}}", "max / mean"),
            about="1 is perfect; most fine-tunes stay below 4. Rising: see 'Experts and balance'.",
            empty="Not a MoE model, or no step yet",
            decimals=2,
        ),
    ]
