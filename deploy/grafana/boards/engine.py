"""What does the work, and does it fit? Engine, device and memory."""

from deploy.grafana.board import Board, Row
from deploy.grafana.panel import RED, Kind, Panel, Query


def _stage(title: str, stage: str, what: str, *runbooks: str) -> Panel:
    return Panel(
        title=title,
        description=what,
        unit="s",
        logarithmic=True,
        queries=tuple(
            Query(
                f"histogram_quantile({share}, sum by (instance, le)"
                f' (rate(equipoise_server_message_duration_seconds_bucket{{SERVER, stage="{stage}"}}[RATE])))',
                "{{instance}} " + legend,
            )
            for share, legend in ((0.5, "median"), (0.99, "99 %"))
        ),
        runbooks=runbooks,
    )


_ENGINE = Row(
    title="Engine",
    panels=(
        _stage(
            "Time on the device",
            "compute",
            "Of a step. It grows with the rows of a step, and for rules over all rows"
            " (projected_gradient, trajectory) with N.",
            "EquipoiseSlowSteps",
        ),
        _stage(
            "Time in the queue",
            "queue",
            "How long a step waits for the device. Far above the time on the device: there"
            " is more to do than one device does.",
            "EquipoiseQueueFull",
            "EquipoiseSlowSteps",
        ),
        Panel(
            title="Steps in one device call",
            description="Mean number of steps that are applied together. It grows under load, and saves launches and"
            " log writes; each step stays one version.",
            unit="short",
            queries=(
                Query(
                    "sum by (instance) (rate(equipoise_server_batch_steps_sum{SERVER}[RATE]))"
                    " / sum by (instance) (rate(equipoise_server_batch_steps_count{SERVER}[RATE]))",
                    "{{instance}}",
                ),
            ),
        ),
        Panel(
            title="Policies",
            description="In memory; resting, which nobody uses and which come back on first touch; and those without"
            " series of their own (metrics_max_policies).",
            unit="short",
            queries=(
                Query("sum(equipoise_server_policies{SERVER})", "in memory"),
                Query("sum(equipoise_server_policies_resting{SERVER})", "resting"),
                Query("sum(equipoise_server_policies_hidden{SERVER})", "told together as other"),
            ),
        ),
        Panel(
            title="Policies by server",
            description="How policies are spread over the servers. They move when a server comes or goes.",
            unit="short",
            kind=Kind.STACKED,
            queries=(Query("equipoise_server_policies{SERVER}", "{{instance}}"),),
        ),
        Panel(
            title="Event loop lag, 99 %",
            description="How late the server's event loop wakes. Every answer waits as long. It lacks CPU, or has"
            " more small steps than one process takes.",
            unit="s",
            logarithmic=True,
            queries=(Query("instance:equipoise_server_event_loop_lag_seconds:p99_5m{SERVER}", "{{instance}}"),),
            thresholds=((0.25, RED),),
            runbooks=("EquipoiseEventLoopLags",),
        ),
    ),
)

_MEMORY = Row(
    title="Memory",
    panels=(
        Panel(
            title="Memory of the device",
            description="What the policies' tables take, what is free; of a GPU also what there is and what torch"
            " holds.",
            unit="decbytes",
            logarithmic=True,
            queries=(
                Query(
                    "sum by (instance, device, state) (equipoise_server_device_memory_bytes{SERVER})",
                    "{{instance}} {{device}} {{state}}",
                ),
            ),
            runbooks=("EquipoiseDeviceMemoryLow", "EquipoiseDeviceFull"),
        ),
        Panel(
            title="Tables by policy",
            description="Memory of each policy's tables; 0 while it rests in Redis. The largest ten.",
            unit="decbytes",
            queries=(Query("topk(10, sum by (policy) (equipoise_server_table_bytes{POLICY}))", "{{policy}}"),),
            runbooks=("EquipoiseDeviceFull",),
        ),
        Panel(
            title="Did not fit",
            description="Policies that were refused because their tables do not fit, in the last ten minutes.",
            unit="short",
            queries=(
                Query('sum(increase(equipoise_server_refusals_total{SERVER, reason="DEVICE_FULL"}[10m]))', "refused"),
                Query(
                    'sum(increase(equipoise_server_failed_loads_total{SERVER, reason="DEVICE_FULL"}[10m]))',
                    "could not be loaded",
                ),
            ),
            thresholds=((1, RED),),
            runbooks=("EquipoiseDeviceFull",),
        ),
        Panel(
            title="Log entries in memory",
            description="Entries that are kept since the last sweep, or because Redis does not have them yet; and"
            " the most that all chosen servers may keep (max_backlogs_bytes).",
            unit="decbytes",
            logarithmic=True,
            queries=(
                Query("equipoise_server_log_memory_bytes{SERVER}", "{{instance}}"),
                Query("sum(equipoise_server_log_memory_bytes_limit{SERVER})", "max_backlogs_bytes, all servers"),
            ),
            runbooks=("EquipoiseNearLimit", "EquipoiseSweepsFail"),
        ),
        Panel(
            title="Memory that nothing explains",
            description="Resident memory less tables (on a CPU), logs and requests under way: the program itself,"
            " some 300 MB. It should not grow.",
            unit="decbytes",
            queries=(Query("instance:equipoise_server_unexplained_memory:bytes{SERVER}", "{{instance}}"),),
            runbooks=("EquipoiseMemoryGrows",),
        ),
        Panel(
            title="Resident memory",
            description="Of the server's process. Its container's limit should leave room for the next policy.",
            unit="decbytes",
            queries=(
                Query(
                    "process_resident_memory_bytes{SERVER} and on (namespace, job, instance)"
                    " equipoise_server_build_info",
                    "{{instance}}",
                ),
            ),
            runbooks=("EquipoiseMemoryGrows",),
        ),
    ),
)

ENGINE = Board(
    name="engine",
    title="Engine and memory",
    description="What the device does and whether policies fit into it. For whoever plans its size.",
    rows=(_ENGINE, _MEMORY),
)
