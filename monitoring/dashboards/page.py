"""What the dashboards share around their panels: variables, annotations, links, and numbers that Grafana needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableRefresh,
    VariableSort,
)

from monitoring.dashboards.queries import FIRING_HERE, PROMETHEUS, RUN, query

TAG = "moetrain"
Section = tuple[str, Sequence[Any]]
"""A row's title and its panels."""


def page(
    uid: str,
    title: str,
    about: str,
    sections: Sequence[Section],
    variables: Sequence[dashboard.QueryVariable],
    *,
    annotations: Sequence[dashboard.AnnotationQuery] = (),
    since: str = "now-1h",
    refresh: str = "10s",
) -> dict[str, Any]:
    """A dashboard as Grafana's JSON model.

    Args:
        uid: last part of its address, `/d/UID`.
        since: start of the time range that it opens with; the end is now.
    """
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(about)
        .tags([TAG])
        .editable()
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time(since, "now")
        .refresh(refresh)
        .version(1)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .link(_to_the_others())
    )
    for variable in variables:
        made = made.with_variable(variable)
    for annotation in annotations:
        made = made.annotation(annotation)
    for name, panels in sections:
        made = made.with_row(dashboard.Row(name))
        for panel in panels:
            made = made.with_panel(panel)
    return mended(json.loads(json.dumps(made.build(), cls=JSONEncoder)))


def mended(model: dict[str, Any]) -> dict[str, Any]:
    """The model without two habits of the library: it gives panels no id and every row id 0, and it moves links and
    marks from above the panels into a menu (`placement`, whose only value that is)."""
    for place, panel in enumerate(model["panels"], 1):
        panel["id"] = place
    for item in (*model["links"], *model["annotations"]["list"]):
        item.pop("placement", None)
    return model


def one_run() -> dashboard.QueryVariable:
    """The run shown."""
    variable = _variable("run", "Run", "label_values(moetrain_step, run)", "Newest names first.")
    return variable.sort(VariableSort.ALPHABETICAL_DESC)


def runs() -> dashboard.QueryVariable:
    """Any number of runs."""
    about = "Runs to compare."
    return _many(_variable("run", "Run", "label_values(moetrain_step, run)", about)).all_value(".+")


def nodes() -> dashboard.QueryVariable:
    """Nodes of the run. All is their list, so that it also picks the run's nodes from hardware metrics."""
    return _many(_variable("node", "Node", f"label_values(moetrain_step{{{RUN}}}, node)", "Nodes of the run."))


def ranks() -> dashboard.QueryVariable:
    """Ranks of the run on the chosen nodes."""
    about = "Ranks on the chosen nodes."
    variable = _variable("rank", "Rank", f'label_values(moetrain_step{{{RUN}, node=~"$node"}}, rank)', about)
    return _many(variable).all_value(".*")


def layers() -> dashboard.QueryVariable:
    """One MoE layer of the model."""
    about = "MoE layer for the panels that show its experts one by one."
    variable = _variable("layer", "Layer", f"label_values(moetrain_expert_load_max_over_mean{{{RUN}}}, layer)", about)
    return variable.sort(VariableSort.NUMERICAL_ASC)


def events(firing: str = FIRING_HERE) -> list[dashboard.AnnotationQuery]:
    """Marks for checkpoints, restarts and alerts of the run. Checkpoints carry their own time, so theirs is exact."""
    saved = f"moetrain_last_checkpoint_timestamp_seconds{{{RUN}}}"
    restarts = f"moetrain_restarts{{{RUN}}}"
    return [
        _mark("Checkpoints", "blue", f"1000 * ({saved} > $__from / 1000)", "checkpoint").use_value_for_time(True),
        # The first minute after one: more restarts than a minute ago.
        _mark(
            "Restarts",
            "purple",
            f"max by (run) ({restarts}) > max by (run) (max_over_time({restarts}[6h] offset 1m))",
            "restarted",
        ),
        alerts(firing),
    ]


def alerts(firing: str) -> dashboard.AnnotationQuery:
    """Marks for as long as an alert fires."""
    mark = _mark("Alerts", "red", firing, "{{alertname}}")
    return mark.text_format("{{node}} rank {{rank}}").tag_keys("severity")


def _variable(name: str, label: str, values: str, about: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .description(about)
        .datasource(PROMETHEUS)
        .query(values)
        .definition(values)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(False)
        .include_all(False)
    )


def _many(variable: dashboard.QueryVariable) -> dashboard.QueryVariable:
    return variable.multi(True).include_all(True).sort(VariableSort.NATURAL_ASC)


def _mark(name: str, color: str, expr: str, title: str) -> dashboard.AnnotationQuery:
    # Both places of the query: Grafana's editor writes the target, older versions read the expression beside it.
    return (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(PROMETHEUS)
        .enable(True)
        .hide(False)
        .icon_color(color)
        .expr(expr)
        .target(query(expr).ref_id(name))
        .title_format(title)
    )


def _to_the_others() -> dashboard.DashboardLink:
    """The other dashboards, with the time range and the chosen run kept."""
    return (
        dashboard.DashboardLink("moetrain")
        .type(DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(False)
        .include_vars(True)
        .keep_time(True)
        .icon("external link")
        .tooltip("The other dashboards, for the same run and time")
        .target_blank(False)
        .url("")
    )
