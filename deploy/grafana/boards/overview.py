"""Is the service well? The first board to open."""

from deploy.grafana.board import Board, Row
from deploy.grafana.panel import RED, YELLOW, Kind, Panel, Query

_NOW = Row(
    title="Now",
    panels=(
        Panel(
            title="Servers ready",
            description="Servers that are ready, of those that are scraped. One that is not is either starting (its"
            " own Redis reads its file), stopping, or has never reached Redis.",
            unit="short",
            kind=Kind.VALUE,
            queries=(
                Query("sum(equipoise_server_ready{SERVER})", "ready"),
                Query("count(equipoise_server_build_info{SERVER})", "there"),
            ),
            runbooks=("EquipoiseNotReady", "EquipoiseServerDown", "EquipoiseAbsent"),
            width=4,
            height=4,
        ),
        Panel(
            title="Alerts that fire",
            description="Equipoise's alerts that fire now. The list below says which.",
            unit="short",
            kind=Kind.VALUE,
            queries=(
                Query('count(ALERTS{alertname=~"Equipoise.*", alertstate="firing", JOB}) or vector(0)', "firing"),
            ),
            thresholds=((1, RED),),
            width=4,
            height=4,
        ),
        Panel(
            title="Answers that failed, 1 h",
            description="Share of answers that the server owed and could not give in the last hour. Allowed over a"
            " month: 0.1 %. What callers did wrong does not count, nor the moves of policies.",
            unit="percentunit",
            kind=Kind.VALUE,
            queries=(Query("max(job:equipoise_server_failures:ratio_rate1h{JOB})", "failed"),),
            thresholds=((0.001, YELLOW), (0.0144, RED)),
            runbooks=("EquipoiseErrorBudgetBurnsFast",),
            width=4,
            height=4,
        ),
        Panel(
            title="Slowest step of a hundred",
            description="99 of 100 steps are answered faster than this. A trainer that waits gives up after one"
            " second and goes on with older weights.",
            unit="s",
            kind=Kind.VALUE,
            queries=(Query("max(job:equipoise_server_step_seconds:p99_5m{JOB})", "p99"),),
            thresholds=((0.25, YELLOW), (1, RED)),
            runbooks=("EquipoiseSlowSteps",),
            width=4,
            height=4,
        ),
        Panel(
            title="Not durable for",
            description="What a crash would cost now: the age of the oldest step that Redis does not have. Trainers"
            " that live send such steps again.",
            unit="s",
            kind=Kind.VALUE,
            queries=(Query("max(equipoise_server_durability_lag_seconds{SERVER})", "lag"),),
            thresholds=((5, YELLOW), (30, RED)),
            runbooks=("EquipoiseDurabilityLags",),
            width=4,
            height=4,
        ),
        Panel(
            title="Trainers and policies",
            description="Trainers whose streams are open, and policies in memory.",
            unit="short",
            kind=Kind.VALUE,
            queries=(
                Query("sum(equipoise_server_clients{SERVER})", "trainers"),
                Query("sum(equipoise_server_policies{SERVER})", "policies"),
            ),
            width=4,
            height=4,
        ),
    ),
)

_PROMISES = Row(
    title="What was promised: answers, in time",
    panels=(
        Panel(
            title="Answers and failures",
            description="Answers a second (steps, reads and calls), and those that failed by the server's fault.",
            unit="ops",
            queries=(
                Query("sum(job:equipoise_server_answers:rate5m{JOB})", "answers"),
                Query("sum(job:equipoise_server_failures:rate5m{JOB})", "failures"),
            ),
            runbooks=("EquipoiseErrorBudgetBurnsFast", "EquipoiseErrorBudgetBurnsSlowly"),
        ),
        Panel(
            title="How fast the error budget burns",
            description="Share of failed answers over the allowed 0.1 %, in four windows. 1: the month's budget"
            " lasts a month. An alert fires when a short and a long window agree: at 14.4 (5 min, 1 h) or 6 (30 min,"
            " 6 h).",
            unit="short",
            queries=tuple(
                Query(f"max(job:equipoise_server_failures:ratio_rate{window}{{JOB}}) / 0.001", window)
                for window in ("5m", "30m", "1h", "6h")
            ),
            thresholds=((6, YELLOW), (14.4, RED)),
            runbooks=("EquipoiseErrorBudgetBurnsFast", "EquipoiseErrorBudgetBurnsSlowly"),
        ),
        Panel(
            title="Time of a step",
            description="From its arrival to its answer: the median, and what 99 of 100 steps are faster than. The"
            " board Streams shows its stages.",
            unit="s",
            logarithmic=True,
            queries=(
                Query("job:equipoise_server_step_seconds:p50_5m{JOB}", "{{job}} median"),
                Query("job:equipoise_server_step_seconds:p99_5m{JOB}", "{{job}} 99 %"),
            ),
            thresholds=((1, RED),),
            runbooks=("EquipoiseSlowSteps",),
        ),
        Panel(
            title="Why answers were refused",
            description="Refusals a second because of how things stand. NOT_OWNER sends a trainer to the policy's"
            " owner, LOADING asks it to wait, DRAINING to go elsewhere: these are no failures.",
            empty="Nothing was refused.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(Query("sum by (reason) (rate(equipoise_server_refusals_total{SERVER}[RATE])) > 0", "{{reason}}"),),
            runbooks=("EquipoiseErrorBudgetBurnsFast", "EquipoiseBug"),
        ),
        Panel(
            title="Steps a second, by server",
            description="Steps and reads that each server answers. Policies spread over servers; one server far"
            " above the others has a busy policy.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(Query("sum by (instance) (rate(equipoise_server_updates_total{SERVER}[RATE]))", "{{instance}}"),),
        ),
        Panel(
            title="Calls by result",
            description="RPCs that ended, by gRPC code. Canceled and Unavailable are how streams end when trainers"
            " leave or a server stops; Internal is a bug.",
            empty="No call has ended.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(Query("sum by (grpc_code) (rate(grpc_server_handled_total{SERVER}[RATE])) > 0", "{{grpc_code}}"),),
            runbooks=("EquipoiseBug",),
        ),
    ),
)

_SERVERS = Row(
    title="Servers and alerts",
    panels=(
        Panel(
            title="Ready",
            description="1: ready. A server that stops is not ready for some seconds; one that starts, until it has"
            " reached Redis.",
            unit="short",
            most=1,
            queries=(Query("equipoise_server_ready{SERVER}", "{{instance}}"),),
            runbooks=("EquipoiseNotReady",),
        ),
        Panel(
            title="Why not ready",
            description="1 where a server is not ready because of this: startup, redis, drain. /readyz?verbose says"
            " it in words.",
            unit="short",
            most=1,
            queries=(
                Query("max by (reason) (equipoise_server_not_ready{SERVER})", "{{reason}}"),
                Query("max(equipoise_server_draining{SERVER})", "a server is stopping"),
            ),
            runbooks=("EquipoiseNotReady", "EquipoiseDrainsTooLong"),
        ),
        Panel(
            title="Servers",
            description="What runs: versions of Equipoise, Python and gRPC. During an update there are two.",
            unit="none",
            kind=Kind.TABLE,
            queries=(Query("max by (instance, version, python, grpcio) (equipoise_server_build_info{SERVER})"),),
        ),
        Panel(
            title="Alerts",
            description="Equipoise's alerts that fire or are about to. Each has a runbook of its name.",
            empty="No alert fires.",
            unit="none",
            kind=Kind.TABLE,
            queries=(
                Query(
                    "max by (alertname, severity, alertstate, instance, policy, reason)"
                    ' (ALERTS{alertname=~"Equipoise.*"})'
                ),
            ),
            width=24,
            height=8,
        ),
    ),
)

OVERVIEW = Board(
    name="overview",
    title="Overview",
    description="Is the service well, does it keep its promises, and which alerts fire? For whoever is on call.",
    rows=(_NOW, _PROMISES, _SERVERS),
)
