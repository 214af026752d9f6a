"""Who uses how much? Only where a tokens file names tenants."""

from deploy.grafana.board import Board, Row
from deploy.grafana.panel import YELLOW, Kind, Panel, Query


def _limited(title: str, what: str, description: str) -> Panel:
    return Panel(
        title=title,
        description=description,
        unit="percentunit",
        most=1,
        queries=(
            Query(
                f"max by (tenant) (equipoise_server_tenant_{what}{{TENANT}}"
                f" / (equipoise_server_tenant_{what}_limit{{TENANT}} > 0))",
                "{{tenant}}",
            ),
        ),
        thresholds=((0.9, YELLOW),),
        runbooks=("EquipoiseTenantNearLimit",),
    )


_USE = Row(
    title="What each tenant does",
    panels=(
        Panel(
            title="Steps a second",
            description="Steps and reads of each tenant. Tenants take turns at the device.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(
                Query("sum by (tenant) (rate(equipoise_server_tenant_updates_total{TENANT}[RATE]))", "{{tenant}}"),
            ),
        ),
        Panel(
            title="Rows a second",
            description="Rows of these: the work that each tenant asks for.",
            unit="short",
            kind=Kind.STACKED,
            queries=(
                Query("sum by (tenant) (rate(equipoise_server_tenant_examples_total{TENANT}[RATE]))", "{{tenant}}"),
            ),
        ),
        Panel(
            title="Bytes under way",
            description="Of the steps of each tenant that wait or are being worked on (max_tenant_inflight_bytes).",
            unit="decbytes",
            queries=(Query("sum by (tenant) (equipoise_server_tenant_inflight_bytes{TENANT})", "{{tenant}}"),),
        ),
    ),
)

_ROOM = Row(
    title="What each tenant takes, and may take",
    panels=(
        Panel(
            title="Calls",
            description="Calls of each tenant under way, streams included.",
            unit="short",
            queries=(Query("sum by (tenant) (equipoise_server_tenant_calls{TENANT})", "{{tenant}}"),),
            runbooks=("EquipoiseTenantNearLimit",),
        ),
        _limited("Calls, share of the limit", "calls", "At 1 a tenant's next call is refused with QUOTA_CALLS."),
        Panel(
            title="Streams",
            description="Streams of each tenant that are open.",
            unit="short",
            queries=(Query("sum by (tenant) (equipoise_server_tenant_streams{TENANT})", "{{tenant}}"),),
            runbooks=("EquipoiseTenantNearLimit",),
        ),
        _limited(
            "Streams, share of the limit", "streams", "Only of tenants whose table in the tokens file sets max_streams."
        ),
        Panel(
            title="Policies",
            description="Policies of each tenant in memory.",
            unit="short",
            queries=(Query("sum by (tenant) (equipoise_server_tenant_policies{TENANT})", "{{tenant}}"),),
        ),
        Panel(
            title="Memory of tables",
            description="What the tables of each tenant's policies take.",
            unit="decbytes",
            queries=(Query("sum by (tenant) (equipoise_server_tenant_table_bytes{TENANT})", "{{tenant}}"),),
        ),
    ),
)

_REFUSED = Row(
    title="Turned away",
    panels=(
        Panel(
            title="Because of who asked",
            description="Calls a second that were refused: no token, a wrong or old one, or one that allows less.",
            empty="Nobody was turned away.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(
                Query("sum by (reason) (rate(equipoise_server_auth_failures_total{SERVER}[RATE])) > 0", "{{reason}}"),
            ),
            runbooks=("EquipoiseAuthFailures",),
            width=12,
        ),
        Panel(
            title="Because a share was used up",
            description="Calls a second that were refused since a tenant's calls, streams, policies or examples are"
            " used up.",
            empty="Nobody was turned away.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(
                Query(
                    'sum by (reason) (rate(equipoise_server_refusals_total{SERVER, reason=~"QUOTA_.*"}[RATE])) > 0',
                    "{{reason}}",
                ),
            ),
            runbooks=("EquipoiseTenantNearLimit",),
            width=12,
        ),
    ),
)

TENANTS = Board(
    name="tenants",
    title="Tenants",
    description="Who uses how much of the service, and who is turned away. For whoever shares it out.",
    rows=(_USE, _ROOM, _REFUSED),
)
