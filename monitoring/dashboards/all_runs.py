"""All runs: what runs where, and how does it compare?"""

from __future__ import annotations

from typing import Any

from monitoring.dashboards.page import alerts, page, runs
from monitoring.dashboards.panels import Column, bars, lines, listing, number
from monitoring.dashboards.queries import now, query, rows
from monitoring.dashboards.style import ANY_IS_BAD, Steps, steps

UID = "moetrain-runs"
RUNS = 'run=~"$run"'
UP = f'up{{job="moetrain", {RUNS}}}'
FIRING = 'ALERTS{alertstate="firing", run=~"$run|"}'
"""With those of the hardware, which know no run."""
NONE = "No run answers"
AGAINST_PLAN: Steps = ((None, "red"), (0.8, "orange"), (0.9, "green"))


def dashboard() -> dict[str, Any]:
    """One row a run; its name leads to the run's page."""
    about = "Every run that answers or has answered in this time range. A run's name opens its page."
    sections = [("Now", [*_now(), _table()]), ("Compared", _compared())]
    return page(UID, "All runs", about, sections, [runs()], annotations=[alerts(FIRING)], since="now-6h", refresh="30s")


def _now() -> list[Any]:
    return [
        number(
            "Runs",
            "none",
            now(f"count(count by (run) ({UP} == 1))"),
            about="Runs with at least one rank that answers.",
            empty=NONE,
            decimals=0,
        ),
        number(
            "Ranks",
            "none",
            now(f"sum({UP})", "up"),
            now(f"count({UP} == 0) or 0 * sum({UP})", "down"),
            about="A rank that is down belongs to a run that crashed: its targets stay until it ends cleanly.",
            empty=NONE,
            names=True,
            decimals=0,
        ).override_by_name("down", [steps(ANY_IS_BAD)]),
        number(
            "Tokens/s, all runs",
            "short",
            query(f"sum(run:moetrain_tokens_per_second:sum{{{RUNS}}})"),
            about="What the cluster trains on.",
            empty=NONE,
        ),
        number(
            "Alerts firing",
            "none",
            now(f"count({FIRING}) or vector(0)"),
            about="Of runs and hardware.",
            empty="No rules loaded",
            steps=ANY_IS_BAD,
            decimals=0,
        ),
        number(
            "Runs that stand still",
            "none",
            now(
                f"count(run:moetrain_seconds_since_progress:min{{{RUNS}}} "
                f"> on (run) run:moetrain_stall_limit_seconds:max{{{RUNS}}}) "
                f"or 0 * count(run:moetrain_stall_limit_seconds:max{{{RUNS}}})"
            ),
            about="No step, evaluation or checkpoint for ten of their own steps. See the log of each.",
            empty=NONE,
            steps=ANY_IS_BAD,
            decimals=0,
        ),
        number(
            "Goodput, mean of runs",
            "percentunit",
            query(f"avg(run:moetrain_goodput:ratio{{{RUNS}}})"),
            about="Seconds in steps whose work was kept, over all seconds. Low: restarts, slow checkpoints, long "
            "start-ups.",
            empty=NONE,
            decimals=0,
        ),
    ]


def _table() -> Any:
    to_run = "/d/moetrain-glance?var-run=${__value.text}&${__url_time_range}"
    columns = {
        "run": Column("Run", link=to_run),
        "model": Column("Model"),
        "world_size": Column("Ranks", width=70),
        "ep_size": Column("EP", width=60),
        "Value #B": Column("Step", "none", width=80, decimals=0),
        "Value #C": Column("Of", "none", width=80, decimals=0),
        "Value #D": Column("Since a step", "s", ((None, "text"), (60, "orange"), (300, "red")), width=110),
        "Value #E": Column("Loss", "none", width=80, decimals=3),
        "Value #F": Column("Tokens/s/GPU", "short", width=110),
        "Value #G": Column("Of plan", "percentunit", AGAINST_PLAN, width=80, decimals=0),
        "Value #H": Column("MFU", "percentunit", width=70, decimals=1),
        "Value #I": Column("Goodput", "percentunit", width=85, decimals=0),
        "Value #J": Column("Restarts", "none", ((None, "text"), (1, "orange"), (5, "red")), width=80, decimals=0),
        "Value #K": Column("Alerts", "none", ANY_IS_BAD, width=70, decimals=0),
    }
    speed = f"run:moetrain_tokens_per_second_per_gpu:avg{{{RUNS}}}"
    plan = f"max by (run) (moetrain_expected_tokens_per_second_per_gpu{{{RUNS}}}) > 0"
    alive = f"max by (run) (moetrain_step{{{RUNS}}})"
    return listing(
        "Every run",
        columns,
        rows(f"max by (run, model, world_size, ep_size) (moetrain_run_info{{{RUNS}}})"),
        rows(alive),
        rows(f"max by (run) (moetrain_steps_planned{{{RUNS}}})"),
        rows(f"time() - max by (run) (moetrain_last_step_timestamp_seconds{{{RUNS}}})"),
        rows(f"max by (run) (moetrain_loss{{{RUNS}}})"),
        rows(speed),
        rows(f"run:moetrain_step_tokens_per_second_per_gpu:avg{{{RUNS}}} / on (run) ({plan})"),
        rows(f"max by (run) (run:moetrain_mfu:ratio{{{RUNS}}})"),
        rows(f"max by (run) (run:moetrain_goodput:ratio{{{RUNS}}})"),
        rows(f"max by (run) (moetrain_restarts{{{RUNS}}})"),
        rows(f'count by (run) (ALERTS{{alertstate="firing", {RUNS}}}) or 0 * {alive}'),
        about="Runs that answer now. Red in 'Since a step' or 'Alerts': open the run. Empty cells: not known, such as "
        "the plan, or the MFU on a CPU.",
        empty=NONE,
        width=24,
        height=9,
        sort_by="Tokens/s/GPU",
    )


def _compared() -> list[Any]:
    return [
        lines(
            "Loss",
            "none",
            query(f"max by (run) (moetrain_loss{{{RUNS}}})", "{{run}}"),
            about="Over time. For the same steps side by side: `moetrain report` with several runs.",
            empty=NONE,
            from_zero=False,
        ),
        lines(
            "Validation loss",
            "none",
            query(f"max by (run) (moetrain_validation_loss{{{RUNS}}})", "{{run}}"),
            about="Nats a token. Rising while the training loss falls: overfitting.",
            empty="No evaluation yet",
            from_zero=False,
        ),
        lines(
            "Tokens/s per GPU",
            "short",
            query(f"run:moetrain_tokens_per_second_per_gpu:avg{{{RUNS}}}", "{{run}}"),
            about="Level is good. Comparable only for the same model and row length; MFU compares across models.",
            empty=NONE,
        ),
        lines(
            "MFU",
            "percentunit",
            query(f"run:moetrain_mfu:ratio{{{RUNS}}}", "{{run}}"),
            about="Model FLOPs over the dense bf16 peak.",
            empty="No peak known (CPU)",
        ),
        bars(
            "Goodput",
            "percentunit",
            now(f"sort_desc(run:moetrain_goodput:ratio{{{RUNS}}})", "{{run}}"),
            about="Seconds in steps that were kept, over all since the run's first start.",
            empty=NONE,
            steps=((None, "red"), (0.8, "orange"), (0.9, "green")),
            high=1,
            decimals=0,
        ),
        lines(
            "Ranks up",
            "none",
            query(f"sum by (run) ({UP})", "{{run}}"),
            about="A step down is a crash, or a job that ended where its targets were left.",
            empty=NONE,
            decimals=0,
        ),
    ]
