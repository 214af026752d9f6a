"""One panel of a dashboard: what it asks Prometheus, how it is drawn, and what a reader is told."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

SELECTORS: Mapping[str, str] = {
    "SERVER": 'namespace=~"$namespace", job=~"$job", instance=~"$instance"',
    "JOB": 'namespace=~"$namespace", job=~"$job"',
    "POLICY": 'namespace=~"$namespace", job=~"$job", instance=~"$instance", policy=~"$policy"',
    "JOB_POLICY": 'namespace=~"$namespace", job=~"$job", policy=~"$policy"',
    "TENANT": 'namespace=~"$namespace", job=~"$job", instance=~"$instance", tenant=~"$tenant"',
    "TRAINER": 'namespace=~"$namespace", policy=~"$policy"',
    "RATE": "$__rate_interval",
}
"""Words of a panel's queries, and what they stand for: the choices at the top of the dashboard.

A server without Kubernetes has no namespace; the choice "All" is `.*`, which matches that, too.
"""

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"


class Kind(Enum):
    """How a panel is drawn."""

    LINES = "lines"
    STACKED = "stacked"
    """Lines on top of each other: their sum means something."""
    VALUE = "value"
    """One large number, the newest."""
    TABLE = "table"
    """The newest values, one line for each set of labels."""


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked.

    Attributes:
        expression: PromQL with the words of `SELECTORS`.
        legend: name of each series, with `{{label}}`.
    """

    expression: str
    legend: str = ""

    @property
    def resolved(self) -> str:
        """The expression with the dashboard's choices in it."""
        words = "|".join(sorted(SELECTORS, key=len, reverse=True))
        return re.sub(rf"\b({words})\b", lambda found: SELECTORS[found[1]], self.expression)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        title: a few words.
        description: what it shows, what is well, and what to think when it is not.
        unit: of Grafana's units, such as `s`, `decbytes`, `percentunit`, `short`.
        queries: what is asked.
        kind: how it is drawn.
        runbooks: alerts whose pages it links to.
        thresholds: values from which on a number or line is of a colour.
        most: of the axis, if it has a natural end.
        logarithmic: whether the axis is.
        empty: what stands there where nothing is found, if that is well.
        width: of 24.
        height: in rows of Grafana's grid.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    runbooks: tuple[str, ...] = ()
    thresholds: tuple[tuple[float, str], ...] = ()
    most: float | None = None
    logarithmic: bool = False
    empty: str = ""
    width: int = 8
    height: int = 7

    def builder(self) -> stat.Panel | table.Panel | timeseries.Panel:
        """The panel for the dashboard's builder."""
        match self.kind:
            case Kind.VALUE:
                panel: stat.Panel | table.Panel | timeseries.Panel = self._value()
            case Kind.TABLE:
                panel = self._table()
            case _:
                panel = self._lines()
        panel.title(self.title).description(self.description).unit(self.unit).datasource(DATASOURCE)
        panel.span(self.width).height(self.height).links([_link(name) for name in self.runbooks])
        if self.most is not None:
            panel.max(self.most)
        if self.empty:
            panel.no_value(self.empty)
        for place, query in enumerate(self.queries):
            panel.with_target(self._target(query, chr(ord("A") + place)))
        return panel

    def _target(self, query: Query, ref_id: str) -> prometheus.Dataquery:
        target = prometheus.Dataquery().expr(query.resolved).ref_id(ref_id).datasource(DATASOURCE)
        if query.legend:
            target.legend_format(query.legend)
        if self.kind is Kind.TABLE:
            return target.instant().format("table")  # type: ignore[arg-type]
        return target.range()

    def _lines(self) -> timeseries.Panel:
        legend = (
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        panel = timeseries.Panel().legend(legend).line_width(1).show_points(common_models.VisibilityMode.NEVER)
        panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        panel.fill_opacity(0).axis_soft_min(0).span_nulls(False)
        if self.unit == "short" and not self.logarithmic:
            panel.axis_soft_max(1)  # else an axis of zeros alone goes to 100
        if self.kind is Kind.STACKED:
            panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL)).fill_opacity(30)
        if self.logarithmic:
            scale = common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10)
            panel.scale_distribution(scale).axis_soft_min(None)  # type: ignore[arg-type]
        if self.thresholds:
            style = common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED)
            panel.thresholds(self._steps(base="transparent")).thresholds_style(style)
        return panel

    def _value(self) -> stat.Panel:
        reduce = common.ReduceDataOptions().calcs(["lastNotNull"])
        panel = stat.Panel().reduce_options(reduce).graph_mode(common_models.BigValueGraphMode.AREA)
        color = common_models.BigValueColorMode.VALUE
        return panel.color_mode(color).no_value("–").thresholds(self._steps(base=GREEN if self.thresholds else BLUE))

    def _table(self) -> table.Panel:
        hidden = {"Time": True, "__name__": True, "Value": self.unit == "none"}
        organize = models.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
        return table.Panel().with_transformation(organize)

    def _steps(self, *, base: str) -> dashboard.ThresholdsConfig:
        steps = [
            models.Threshold(color=base),
            *(models.Threshold(value=at, color=color) for at, color in self.thresholds),
        ]
        return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _link(alert: str) -> dashboard.DashboardLink:
    return dashboard.DashboardLink(f"Runbook: {alert}").url(f"${{runbooks}}/{alert}.md").target_blank(True)
