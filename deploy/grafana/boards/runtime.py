"""The processes themselves: CPU, files, event loop, garbage, certificates."""

from deploy.grafana.board import Board, Row
from deploy.grafana.panel import RED, YELLOW, Kind, Panel, Query

_OURS = " and on (namespace, job, instance) equipoise_server_build_info"
"""Other programs of the same name of a service have such metrics, too."""

_PROCESS = Row(
    title="Process",
    panels=(
        Panel(
            title="CPU",
            description="Cores in use. A process has one event loop and some threads: it rarely uses more than two"
            " without a large step.",
            unit="short",
            queries=(Query(f"rate(process_cpu_seconds_total{{SERVER}}[RATE]){_OURS}", "{{instance}}"),),
            runbooks=("EquipoiseEventLoopLags",),
        ),
        Panel(
            title="Memory",
            description="Resident, and virtual, which is large and means nothing by itself.",
            unit="decbytes",
            logarithmic=True,
            queries=(
                Query(f"process_resident_memory_bytes{{SERVER}}{_OURS}", "{{instance}} resident"),
                Query(f"process_virtual_memory_bytes{{SERVER}}{_OURS}", "{{instance}} virtual"),
            ),
            runbooks=("EquipoiseMemoryGrows",),
        ),
        Panel(
            title="Open files",
            description="Each connection is one; and the most that the process may have.",
            unit="short",
            logarithmic=True,
            queries=(
                Query(f"process_open_fds{{SERVER}}{_OURS}", "{{instance}}"),
                Query(f"process_max_fds{{SERVER}}{_OURS}", "{{instance}}: most"),
            ),
            runbooks=("EquipoiseNearLimit",),
        ),
        Panel(
            title="Running for",
            description="Since the process started. It falls to 0 where a server restarted.",
            unit="s",
            queries=(Query(f"time() - process_start_time_seconds{{SERVER}}{_OURS}", "{{instance}}"),),
            runbooks=("EquipoiseServerDown",),
        ),
        Panel(
            title="Scraped",
            description="1: Prometheus has reached the server. It misses one that has ended or hangs.",
            unit="short",
            most=1,
            queries=(
                Query(
                    "up{SERVER} and on (namespace, job, instance) last_over_time(equipoise_server_build_info[6h])",
                    "{{instance}}",
                ),
            ),
            runbooks=("EquipoiseServerDown", "EquipoiseAbsent"),
        ),
        Panel(
            title="Stopping",
            description="1 while a server is about to stop: it asks its trainers to reconnect and writes what is left.",
            unit="short",
            most=1,
            queries=(Query("equipoise_server_draining{SERVER}", "{{instance}}"),),
            runbooks=("EquipoiseDrainsTooLong",),
        ),
        Panel(
            title="Processes",
            description="Of servers with several: how many serve, how many should, and how many were replaced. One that"
            " is missing for longer than a start takes says in the log why it ends.",
            unit="short",
            queries=(
                Query("equipoise_server_processes_running{SERVER}", "{{instance}}"),
                Query("equipoise_server_processes_wanted{SERVER}", "{{instance}} wanted"),
                Query("increase(equipoise_server_process_exits_total{SERVER}[RATE])", "{{instance}} replaced"),
            ),
            runbooks=("EquipoiseProcessEnds",),
        ),
    ),
)

_PYTHON = Row(
    title="Python",
    panels=(
        Panel(
            title="Event loop lag",
            description="How late the event loop wakes: the median, and 99 %. Every answer waits as long.",
            unit="s",
            logarithmic=True,
            queries=(
                Query(
                    "histogram_quantile(0.5, sum by (instance, le)"
                    " (rate(equipoise_server_event_loop_lag_seconds_bucket{SERVER}[RATE])))",
                    "{{instance}} median",
                ),
                Query("instance:equipoise_server_event_loop_lag_seconds:p99_5m{SERVER}", "{{instance}} 99 %"),
            ),
            thresholds=((0.25, RED),),
            runbooks=("EquipoiseEventLoopLags",),
        ),
        Panel(
            title="Tasks of the event loop",
            description="A few, and a few for each stream. Tasks that grow without streams are a leak.",
            unit="short",
            queries=(Query("equipoise_server_event_loop_tasks{SERVER}", "{{instance}}"),),
            runbooks=("EquipoiseMemoryGrows",),
        ),
        Panel(
            title="Garbage collections",
            description="A second, by generation. The second one looks at everything and takes longest.",
            unit="ops",
            queries=(
                Query(
                    f"sum by (generation) (rate(python_gc_collections_total{{SERVER}}[RATE]){_OURS})",
                    "generation {{generation}}",
                ),
            ),
        ),
        Panel(
            title="Objects collected",
            description="By the garbage collector, a second; and those that it could not collect, which should be"
            " none.",
            unit="ops",
            queries=(
                Query(f"sum(rate(python_gc_objects_collected_total{{SERVER}}[RATE]){_OURS})", "collected"),
                Query(f"sum(rate(python_gc_objects_uncollectable_total{{SERVER}}[RATE]){_OURS})", "uncollectable"),
            ),
            width=8,
        ),
        Panel(
            title="Days until the certificate ends",
            description="Of each server with TLS. New files are read without a restart.",
            unit="d",
            queries=(
                Query(
                    "(equipoise_server_certificate_expiry_timestamp_seconds{SERVER} - time()) / 86400", "{{instance}}"
                ),
            ),
            thresholds=((14, YELLOW),),
            runbooks=("EquipoiseCertificateEnds",),
        ),
        Panel(
            title="Files read again",
            description="Tokens and certificates that had changed, in the last hour. failed: the new file cannot be"
            " used, and the server goes on with the old one.",
            unit="short",
            kind=Kind.LINES,
            queries=(
                Query(
                    "sum by (file, result) (increase(equipoise_server_reloads_total{SERVER}[1h]))",
                    "{{file}} {{result}}",
                ),
            ),
            runbooks=("EquipoiseReloadFails",),
        ),
    ),
)

RUNTIME = Board(
    name="runtime",
    title="Runtime",
    description="The servers' processes: CPU, memory, files, event loop, certificates. For whoever runs the machines.",
    rows=(_PROCESS, _PYTHON),
)
