"""Where do steps wait? Streams, queues and bounds."""

from deploy.grafana.board import Board, Row
from deploy.grafana.panel import RED, YELLOW, Kind, Panel, Query


def _bounded(title: str, name: str, setting: str, *, what: str, unit: str = "short") -> Panel:
    """Use of what a setting bounds."""
    return Panel(
        title=title,
        description=f"{what} A server may have at most {setting}; the panel of all bounds shows how near it is.",
        unit=unit,
        queries=(Query(f"equipoise_server_{name}{{SERVER}}", "{{instance}}"),),
        runbooks=("EquipoiseNearLimit",),
    )


_WAY = Row(
    title="The way of a step",
    panels=(
        Panel(
            title="Time in each stage, 99 %",
            description="What 99 of 100 messages are faster than, by stage. queue: the device is busy; compute:"
            " steps are large; log: Redis is slow; decode and encode: messages are large or the event loop lags.",
            unit="s",
            logarithmic=True,
            queries=(
                Query(
                    "histogram_quantile(0.99, sum by (stage, le)"
                    " (rate(equipoise_server_message_duration_seconds_bucket{SERVER}[RATE])))",
                    "{{stage}}",
                ),
            ),
            runbooks=("EquipoiseSlowSteps", "EquipoiseEventLoopLags", "EquipoiseRedisSlow"),
            width=12,
        ),
        Panel(
            title="Time in each stage, mean",
            description="Where a typical message spends its time. The stages lie on top of each other.",
            unit="s",
            kind=Kind.STACKED,
            queries=(
                Query(
                    'sum by (stage) (rate(equipoise_server_message_duration_seconds_sum{SERVER, stage!="total"}[RATE]))'
                    " / sum by (stage)"
                    ' (rate(equipoise_server_message_duration_seconds_count{SERVER, stage!="total"}[RATE]))',
                    "{{stage}}",
                ),
            ),
            runbooks=("EquipoiseSlowSteps",),
            width=12,
        ),
        Panel(
            title="Steps by result",
            description="Steps and reads a second over all chosen policies. Duplicates are steps that were sent"
            " again after a lost answer.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(Query("sum by (result) (rate(equipoise_server_updates_total{POLICY}[RATE]))", "{{result}}"),),
            runbooks=("EquipoiseStepsRefused",),
        ),
        Panel(
            title="Rows of a step",
            description="The median, and what 95 of 100 steps have fewer than.",
            unit="short",
            logarithmic=True,
            queries=tuple(
                Query(
                    f"histogram_quantile({share}, sum by (le)"
                    " (rate(equipoise_server_batch_examples_bucket{SERVER}[RATE])))",
                    legend,
                )
                for share, legend in ((0.5, "median"), (0.95, "95 %"))
            ),
        ),
        Panel(
            title="Rows a second",
            description="Rows of the steps that were applied: the work that is done.",
            unit="short",
            queries=(Query("sum by (policy) (rate(equipoise_server_examples_total{POLICY}[RATE]))", "{{policy}}"),),
        ),
    ),
)

_WAITING = Row(
    title="Waiting, and how full it is",
    panels=(
        Panel(
            title="Steps that wait",
            description="For the device, over all policies of a server. A queue that stays long means that steps"
            " come faster than they are applied.",
            unit="short",
            queries=(Query("equipoise_server_queue_depth{SERVER}", "{{instance}}"),),
            runbooks=("EquipoiseQueueFull",),
        ),
        Panel(
            title="The fullest queue",
            description="Of one policy, by steps or bytes. At 1 the server stops reading its streams: trainers wait.",
            unit="percentunit",
            most=1,
            queries=(Query("equipoise_server_queue_fullest_ratio{SERVER}", "{{instance}}"),),
            thresholds=((0.8, RED),),
            runbooks=("EquipoiseQueueFull",),
        ),
        Panel(
            title="All bounds, how full",
            description="Each bound of each server, by the setting that sets it; and the process's open files.",
            unit="percentunit",
            most=1,
            queries=(Query("max by (limit) (instance:equipoise_server_limits:ratio{SERVER})", "{{limit}}"),),
            thresholds=((0.85, YELLOW),),
            runbooks=("EquipoiseNearLimit",),
        ),
        _bounded("Streams", "active_streams", "max_streams", what="Open training streams: one for each trainer."),
        _bounded("Calls", "calls", "max_concurrent_rpcs", what="Calls under way, streams included."),
        _bounded(
            "Bytes under way",
            "inflight_bytes",
            "max_inflight_bytes",
            unit="decbytes",
            what="Bytes of the steps that wait or are being worked on.",
        ),
        _bounded(
            "Bytes of imports",
            "import_bytes",
            "max_import_bytes",
            unit="decbytes",
            what="Bytes of policies that are being imported.",
        ),
        Panel(
            title="Turned away for want of room",
            description="Calls a second that were refused because something was full, or a tenant's share was used up.",
            empty="Nobody was turned away.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(
                Query(
                    "sum by (reason) (rate(equipoise_server_refusals_total{SERVER,"
                    ' reason=~"QUEUE_FULL|QUOTA_.*|TOO_MANY_.*"}[RATE])) > 0',
                    "{{reason}}",
                ),
            ),
            width=16,
            runbooks=("EquipoiseNearLimit", "EquipoiseTenantNearLimit"),
        ),
    ),
)

_CALLS = Row(
    title="Calls, as gRPC sees them",
    panels=(
        Panel(
            title="Calls begun, by method",
            description="A training stream (Exchange) begins once for each connection: many a second means that"
            " trainers reconnect.",
            empty="No call has begun.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(
                Query("sum by (grpc_method) (rate(grpc_server_started_total{SERVER}[RATE])) > 0", "{{grpc_method}}"),
            ),
        ),
        Panel(
            title="Messages in and out",
            description="Messages a second of all methods; nearly all are steps and their answers.",
            unit="ops",
            queries=(
                Query("sum(rate(grpc_server_msg_received_total{SERVER}[RATE]))", "received"),
                Query("sum(rate(grpc_server_msg_sent_total{SERVER}[RATE]))", "sent"),
            ),
        ),
        Panel(
            title="Time of unary calls, 99 %",
            description="From the start of a call to its end, by method; streams are left out, as theirs is a"
            " lifetime.",
            empty="No unary call has ended.",
            unit="s",
            logarithmic=True,
            queries=(
                Query(
                    "histogram_quantile(0.99, sum by (grpc_method, le)"
                    ' (rate(grpc_server_handling_seconds_bucket{SERVER, grpc_type="unary"}[RATE]))) > 0',
                    "{{grpc_method}}",
                ),
            ),
        ),
    ),
)

STREAMS = Board(
    name="streams",
    title="Streams",
    description="Where steps spend their time, what waits, and how full each bound is. For whoever finds steps slow.",
    rows=(_WAY, _WAITING, _CALLS),
)
