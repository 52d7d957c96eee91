"""Panels of one look: what every panel of a kind shares, so that the dashboards read as lists of questions.

Every panel says what good looks like and what to do (`about`) and what its emptiness means (`empty`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from grafana_foundation_sdk.builders import bargauge, common, heatmap, stat, statetimeline, table, timeseries, xychart
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import heatmap as heatmaps
from grafana_foundation_sdk.models import xychart as xycharts
from grafana_foundation_sdk.models.dashboard import DataTransformerConfig, DynamicConfigValue, FieldColorModeId
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitoring.dashboards.queries import PROMETHEUS, RUN, Target, query
from monitoring.dashboards.style import PLAIN, TIMES, Steps, color, thresholds, value
from monitoring.dashboards.style import steps as thresholds_override

P = TypeVar("P")


@dataclass(frozen=True)
class Column:
    """A column of a table: what a label or value is called, its unit, colours, link and width in pixels."""

    title: str
    unit: str = ""
    steps: Steps = ()
    link: str = ""
    """URL; `${__value.text}` is the cell."""
    width: int | None = None
    decimals: int | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    """Colours of texts."""


def number(
    title: str,
    unit: str,
    *targets: Target,
    about: str,
    empty: str,
    steps: Steps = PLAIN,
    width: int = 4,
    decimals: int | None = None,
    names: bool = False,
) -> stat.Panel:
    """A value in big type, with its course behind it where the query is a range; `names` shows the legends too."""
    panel = (
        _common(stat.Panel(), title, unit, targets, about, empty, width, 4, decimals)
        .thresholds(thresholds(steps))
        .color_scheme(color(FieldColorModeId.THRESHOLDS))
        .color_mode(looks.BigValueColorMode.VALUE)
        .graph_mode(looks.BigValueGraphMode.AREA if targets[0].build().range_val else looks.BigValueGraphMode.NONE)
        .justify_mode(looks.BigValueJustifyMode.AUTO)
        .orientation(looks.VizOrientation.AUTO)
        .text_mode(looks.BigValueTextMode.VALUE_AND_NAME if names else looks.BigValueTextMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    return panel


def lines(
    title: str,
    unit: str,
    *targets: Target,
    about: str,
    empty: str,
    width: int = 12,
    height: int = 8,
    decimals: int | None = None,
    from_zero: bool = True,
    legend: looks.LegendPlacement = looks.LegendPlacement.BOTTOM,
) -> timeseries.Panel:
    """Lines over time. Gaps stay gaps: a scrape that failed is no measurement."""
    panel = (
        _common(timeseries.Panel(), title, unit, targets, about, empty, width, height, decimals)
        .color_scheme(color(FieldColorModeId.PALETTE_CLASSIC))
        .draw_style(looks.GraphDrawStyle.LINE)
        .line_width(1)
        .fill_opacity(8 if len(targets) == 1 and "{{" not in (targets[0].build().legend_format or "") else 0)
        .show_points(looks.VisibilityMode.NEVER)
        .span_nulls(False)
        .legend(_legend(legend))
        .tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING))
    )
    return panel.axis_soft_min(0) if from_zero else panel


def shares(title: str, of: str, *, about: str, empty: str, width: int = 12, height: int = 8) -> timeseries.Panel:
    """Areas that stack to 100 %, one for each of `TIMES`, in its order from the bottom.

    Args:
        of: PromQL with two %s, for the run's selector and a phase.
    """
    targets = [query(of % (RUN, phase), phase) for phase in TIMES]
    panel = (
        lines(title, "percentunit", *targets, about=about, empty=empty, width=width, height=height, decimals=0)
        .stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
        .fill_opacity(70)
        .line_width(0)
        .min(0)
        .max(1)
    )
    for phase, shade in TIMES.items():
        panel = panel.override_by_name(phase, [value("color", {"mode": "fixed", "fixedColor": shade})])
    return panel


def heat(
    title: str,
    unit: str,
    target: Target,
    *,
    about: str,
    empty: str,
    rows_are: str,
    row_unit: str = "none",
    scheme: str = "Oranges",
    low: float | None = None,
    high: float | None = None,
    width: int = 12,
    height: int = 8,
    decimals: int | None = None,
) -> heatmap.Panel:
    """Rows of colour over time. Series must be named by numbers: Grafana sorts only those by value.

    Args:
        rows_are: label of the vertical axis.
        scheme: one of Grafana's; those of one hue are dark for low values in the dark theme.
        low, high: ends of the colour scale; None takes them from the data.
    """
    colors = heatmap.HeatmapColorOptions().mode(heatmaps.HeatmapColorMode.SCHEME).scheme(scheme).steps(64)
    colors = colors.scale(heatmaps.HeatmapColorScale.LINEAR).exponent(0.5).fill("dark-orange").reverse(False)
    colors = colors.min(low) if low is not None else colors
    colors = colors.max(high) if high is not None else colors
    histogram = target.build().format_val == PromQueryFormat.HEATMAP
    layout = looks.HeatmapCellLayout.AUTO if histogram else looks.HeatmapCellLayout.UNKNOWN
    cells = heatmap.CellValues().unit(unit)
    panel = (
        _common(heatmap.Panel(), title, unit, [target], about, empty, width, height, None)
        .calculate(False)
        .color(colors)
        .rows_frame(heatmap.RowsHeatmapOptions().layout(layout))
        .cell_values(cells.decimals(decimals) if decimals is not None else cells)
        .y_axis(heatmap.YAxisConfig().unit(row_unit).axis_label(rows_are).axis_placement(looks.AxisPlacement.LEFT))
        .cell_gap(0)
        .show_value(looks.VisibilityMode.NEVER)
        .show_legend()
        .tooltip(heatmap.HeatmapTooltip().mode(looks.TooltipDisplayMode.SINGLE).show_color_scale(True))
    )
    if histogram:  # an empty bucket is no colour; elsewhere 0 is a value
        panel = panel.filter_values(heatmap.FilterValueRange().le(1e-9))
    return panel


def listing(
    title: str,
    columns: Mapping[str, Column],
    *targets: Target,
    about: str,
    empty: str,
    width: int = 12,
    height: int = 8,
    sort_by: str = "",
) -> table.Panel:
    """A table of the columns named, in their order; `sort_by` is a title, sorted from the highest.

    Args:
        columns: by label, or `Value` (of a lone query), `Value #A`, ... Columns that are not named are left out.
    """
    panel = _common(table.Panel(), title, "none", targets, about, empty, width, height, None)
    panel = panel.show_header(True).cell_height(looks.TableCellHeight.SM).filterable(False)
    panel = panel.thresholds(thresholds(PLAIN)).color_scheme(color(FieldColorModeId.THRESHOLDS))
    if len(targets) > 1:
        panel = panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    keep = {"include": {"names": list(columns)}}
    order = {
        "indexByName": {name: place for place, name in enumerate(columns)},
        "renameByName": {name: column.title for name, column in columns.items()},
    }
    panel = panel.with_transformation(DataTransformerConfig(id_val="filterFieldsByName", options=keep))
    panel = panel.with_transformation(DataTransformerConfig(id_val="organize", options=order))
    for column in columns.values():
        if properties := _properties(column):
            panel = panel.override_by_name(column.title, properties)
    if sort_by:
        panel = panel.sort_by([common.TableSortByFieldState().display_name(sort_by).desc(True)])
    return panel


def grid(
    title: str,
    target: Target,
    *,
    across: str,
    down: str,
    steps: Steps,
    about: str,
    empty: str,
    width: int = 24,
    height: int = 12,
    decimals: int | None = None,
) -> xychart.Panel:
    """A square for each pair of two labels that are numbers, coloured by the value.

    An XY chart, because Grafana's heatmap knows no other horizontal axis than time.
    """
    labels = [{"targetField": name, "destinationType": "number"} for name in (across, down)]
    series = (
        xychart.XYSeriesConfig()
        .frame(xychart.XychartXYSeriesConfigFrame().matcher(_matcher("byIndex", 0)))
        .x(xychart.XychartXYSeriesConfigX().matcher(_matcher("byName", across)))
        .y(xychart.XychartXYSeriesConfigY().matcher(_matcher("byName", down)))
        .color(xychart.XychartXYSeriesConfigColor().matcher(_matcher("byName", "Value")))
    )
    panel = (
        _common(xychart.Panel(), title, "none", [target], about, empty, width, height, None)
        .with_transformation(
            DataTransformerConfig(id_val="convertFieldType", options={"conversions": labels, "fields": {}})
        )
        .thresholds(thresholds(steps))
        .color_scheme(color(FieldColorModeId.THRESHOLDS))
        .mapping(xycharts.SeriesMapping.MANUAL)
        .series([series])
        .show(xycharts.XYShowMode.POINTS)
        .point_shape(xycharts.PointShape.SQUARE)
        .point_size(xychart.XychartFieldConfigPointSize().fixed(10))
        .point_stroke_width(0)
        .fill_opacity(100)
        .legend(common.VizLegendOptions().show_legend(False))
        .tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.SINGLE))
        .override_by_name(across, [value("custom.axisLabel", across), value("decimals", 0)])
        .override_by_name(down, [value("custom.axisLabel", down), value("decimals", 0)])
    )
    return panel.override_by_name("Value", [value("decimals", decimals)]) if decimals is not None else panel


def _matcher(kind: str, option: str | int) -> xychart.MatcherConfig:
    return xychart.MatcherConfig().id(kind).options(option)


def bars(
    title: str,
    unit: str,
    *targets: Target,
    about: str,
    empty: str,
    steps: Steps,
    low: float = 0,
    high: float | None = None,
    width: int = 12,
    height: int = 8,
    decimals: int | None = None,
) -> bargauge.Panel:
    """One horizontal bar a series."""
    panel = (
        _common(bargauge.Panel(), title, unit, targets, about, empty, width, height, decimals)
        .thresholds(thresholds(steps))
        .color_scheme(color(FieldColorModeId.THRESHOLDS))
        .display_mode(looks.BarGaugeDisplayMode.BASIC)
        .value_mode(looks.BarGaugeValueMode.COLOR)
        .orientation(looks.VizOrientation.HORIZONTAL)
        .name_placement(looks.BarGaugeNamePlacement.LEFT)
        .show_unfilled(True)
        .min_viz_height(12)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .min(low)
    )
    return panel.max(high) if high is not None else panel


def states(
    title: str, target: Target, mappings: list[Any], *, about: str, empty: str, width: int = 24, height: int = 8
) -> statetimeline.Panel:
    """One band a series, coloured by what the value stands for."""
    panel = (
        _common(statetimeline.Panel(), title, "none", [target], about, empty, width, height, None)
        .mappings(mappings)
        .color_scheme(color(FieldColorModeId.THRESHOLDS))
        .thresholds(thresholds(PLAIN))
        .show_value(looks.VisibilityMode.NEVER)
        .row_height(0.85)
        .merge_values(True)
        .fill_opacity(80)
        .line_width(0)
        .span_nulls(False)
        .legend(_legend(looks.LegendPlacement.BOTTOM))
        .tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.SINGLE))
    )
    return panel


def _common(
    panel: P,
    title: str,
    unit: str,
    targets: Sequence[Target],
    about: str,
    empty: str,
    width: int,
    height: int,
    decimals: int | None,
) -> P:
    """What every panel has; queries are lettered A, B, ..."""
    made: Any = panel
    made = made.title(title).description(about).no_value(empty).datasource(PROMETHEUS).unit(unit)
    made = made.span(width).height(height)
    for place, target in enumerate(targets):
        made = made.with_target(target.ref_id(chr(ord("A") + place)))
    return cast(P, made if decimals is None else made.decimals(decimals))


def _legend(placement: looks.LegendPlacement) -> common.VizLegendOptions:
    mode = looks.LegendDisplayMode.LIST
    if placement == looks.LegendPlacement.RIGHT:
        mode = looks.LegendDisplayMode.TABLE
    return common.VizLegendOptions().show_legend(True).display_mode(mode).placement(placement).calcs([])


def _properties(column: Column) -> list[DynamicConfigValue]:
    """Overrides that make a table's column look as it says."""
    properties = []
    if column.unit:
        properties.append(value("unit", column.unit))
    if column.decimals is not None:
        properties.append(value("decimals", column.decimals))
    if column.width is not None:
        properties.append(value("custom.width", column.width))
    if column.steps:
        properties.append(thresholds_override(column.steps))
    if column.words:
        options = {word: {"text": word, "color": shade} for word, shade in column.words.items()}
        properties.append(value("mappings", [{"type": "value", "options": options}]))
    if column.steps or column.words:
        properties.append(value("custom.cellOptions", {"type": "color-text"}))
    if column.link:
        link = {"title": "Open", "url": column.link, "targetBlank": False}
        properties.append(value("links", [link]))
    return properties
