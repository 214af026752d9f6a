"""One dashboard: its rows of panels, the choices at its top, and its links to the others."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panel import DATASOURCE, SELECTORS, Panel

TAG = "equipoise"
RUNBOOKS = "/deploy/runbooks"
"""Where runbooks are, unless the dashboard's reader says so: the path in this repository."""

RESTARTS = (
    "changes(process_start_time_seconds{%s}[2m]) > 0 and on (namespace, job, instance) equipoise_server_build_info"
)
_OF_POLICY = {"POLICY", "JOB_POLICY", "TRAINER"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A heading with panels under it."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard.

    Attributes:
        name: of its file, and the end of its uid.
        title: for its readers.
        description: for whom it is, and what it answers.
        rows: from top to bottom.
        hours: what it shows unless told otherwise.
    """

    name: str
    title: str
    description: str
    rows: tuple[Row, ...]
    hours: int = 3

    @property
    def panels(self) -> Iterator[Panel]:
        """All of them."""
        for row in self.rows:
            yield from row.panels

    def json(self) -> str:
        """The dashboard as Grafana imports it."""
        return json.dumps(self._build(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def _build(self) -> models.Dashboard:
        builder = dashboard.Dashboard(f"Equipoise / {self.title}").uid(f"equipoise-{self.name}").tags([TAG])
        builder.description(self.description).time(f"now-{self.hours}h", "now").refresh("30s").timezone("browser")
        builder.readonly().tooltip(models.DashboardCursorSync.CROSSHAIR).link(_to_the_others())
        builder.annotation(_restarts())
        for variable in self._variables():
            builder.with_variable(variable)
        for row in self.rows:
            builder.with_row(dashboard.Row(row.title))
            for panel in row.panels:
                builder.with_panel(panel.builder())
        return builder.build()

    def _variables(
        self,
    ) -> Iterator[dashboard.DatasourceVariable | dashboard.QueryVariable | dashboard.TextBoxVariable]:
        yield dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        info = "equipoise_server_build_info"
        yield _choice("namespace", "Namespace", f"label_values({info}, namespace)")
        yield _choice("job", "Service", f'label_values({info}{{namespace=~"$namespace"}}, job)')
        yield _choice("instance", "Server", f"label_values({info}{{{SELECTORS['JOB']}}}, instance)")
        text = " ".join(query.expression for panel in self.panels for query in panel.queries)
        words = set(text.replace("{", " ").replace("}", " ").replace(",", " ").split())
        if words & _OF_POLICY:
            query = f"label_values(equipoise_server_policy_version{{{SELECTORS['JOB']}}}, policy)"
            yield _choice("policy", "Policy", query)
        if "TENANT" in words:
            yield _choice(
                "tenant", "Tenant", f"label_values(equipoise_server_tenant_calls{{{SELECTORS['JOB']}}}, tenant)"
            )
        note = "URL of deploy/runbooks in your copy of the repository"
        yield dashboard.TextBoxVariable("runbooks").label("Runbooks").description(note).default_value(RUNBOOKS)


def _choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    everything = models.VariableOption(selected=True, text="All", value="$__all")
    variable = dashboard.QueryVariable(name).label(label).query(query).datasource(DATASOURCE)
    variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.NATURAL_ASC)
    return variable.multi(True).include_all(True).all_value(".*").current(everything)


def _to_the_others() -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("Equipoise").type(models.DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.as_dropdown(True).include_vars(True).keep_time(True)


def _restarts() -> dashboard.AnnotationQuery:
    query = dashboard.AnnotationQuery().name("Restarts").datasource(DATASOURCE).enable(True).icon_color("blue")
    return query.expr(RESTARTS % SELECTORS["SERVER"])
