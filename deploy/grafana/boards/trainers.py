"""What trainers see: their clients' own metrics, beside the server's view of them."""

from deploy.grafana.board import Board, Row
from deploy.grafana.panel import RED, YELLOW, Panel, Query

_SERVED = Row(
    title="Are trainers served?",
    panels=(
        Panel(
            title="Steps without an answer in time",
            description="Share of steps and reads that went on with older or uniform weights. The server may know"
            " nothing of it: this is what trainers saw.",
            unit="percentunit",
            most=1,
            queries=(
                Query(
                    "sum by (policy) (rate(equipoise_client_fallbacks_total{TRAINER}[RATE]))"
                    " / (sum by (policy) (rate(equipoise_client_steps_total{TRAINER}[RATE])) > 0)",
                    "{{policy}}",
                ),
            ),
            thresholds=((0.05, YELLOW),),
            runbooks=("EquipoiseTrainersFallBack",),
        ),
        Panel(
            title="Staleness",
            description="Steps that a trainer has made since the newest answer; the worst of each policy. 0 or 1"
            " where it is served.",
            unit="short",
            queries=(Query("max by (policy) (equipoise_client_staleness_steps{TRAINER})", "{{policy}}"),),
            runbooks=("EquipoiseTrainersStale",),
        ),
        Panel(
            title="Round trip",
            description="From a step's call to its answer, seen by trainers: the median, and what 99 of 100 are"
            " faster than. Far above the server's own time, it is the network, or the trainer's CPU.",
            unit="s",
            logarithmic=True,
            queries=(
                *(
                    Query(
                        f"histogram_quantile({share}, sum by (le)"
                        " (rate(equipoise_client_round_trip_seconds_bucket{TRAINER}[RATE])))",
                        legend,
                    )
                    for share, legend in ((0.5, "median"), (0.99, "99 %"))
                ),
                Query("max(job:equipoise_server_step_seconds:p99_5m{JOB})", "99 %, at the server"),
            ),
            runbooks=("EquipoiseTrainersFallBack", "EquipoiseSlowSteps"),
        ),
        Panel(
            title="Clients that hear their server",
            description="Clients with metrics, and those of them whose server is there.",
            unit="short",
            queries=(
                Query("sum by (policy) (equipoise_client_clients{TRAINER})", "{{policy}}: clients"),
                Query("sum by (policy) (equipoise_client_connected{TRAINER})", "{{policy}}: served"),
            ),
            runbooks=("EquipoiseTrainersFallBack",),
        ),
        Panel(
            title="Reconnects and outages",
            description="In the last ten minutes: streams opened after the first, and times that the server was lost"
            " or silent. A restart of the server is one of each.",
            unit="short",
            queries=(
                Query(
                    "sum by (policy) (increase(equipoise_client_reconnects_total{TRAINER}[10m]))",
                    "{{policy}}: reconnects",
                ),
                Query(
                    "sum by (policy) (increase(equipoise_client_outages_total{TRAINER}[10m]))", "{{policy}}: outages"
                ),
            ),
            runbooks=("EquipoiseTrainersFallBack",),
        ),
        Panel(
            title="Staleness, share of what is allowed",
            description="Of max_staleness. At 100 % a trainer goes on with uniform weights.",
            unit="percentunit",
            most=1,
            queries=(
                Query(
                    "max by (policy)"
                    " (equipoise_client_staleness_steps{TRAINER} / equipoise_client_max_staleness_steps{TRAINER})",
                    "{{policy}}",
                ),
            ),
            thresholds=((0.5, RED),),
            runbooks=("EquipoiseTrainersStale",),
        ),
    ),
)

_KEPT = Row(
    title="Are their statistics kept?",
    panels=(
        Panel(
            title="Window, how full",
            description="Steps that a trainer keeps because they are not durable yet, of the most that it may keep"
            " (limits.window_steps); the fullest of each policy.",
            unit="percentunit",
            most=1,
            queries=(
                Query(
                    "max by (policy)"
                    " (equipoise_client_window_steps{TRAINER} / equipoise_client_window_steps_limit{TRAINER})",
                    "{{policy}}",
                ),
            ),
            thresholds=((0.8, YELLOW),),
            runbooks=("EquipoiseTrainerWindowFull",),
        ),
        Panel(
            title="Steps without an answer",
            description="That have been made and wait for their answer. With `submit` several are always on their way.",
            unit="short",
            queries=(Query("max by (policy) (equipoise_client_unacked_steps{TRAINER})", "{{policy}}"),),
        ),
        Panel(
            title="Steps lost",
            description="In the last ten minutes. dropped: the window was full, statistics were never sent; lost:"
            " the server had acknowledged them and lost them before they were durable; forgotten: let go while not"
            " durable.",
            unit="short",
            queries=tuple(
                Query(
                    f"sum by (policy) (increase(equipoise_client_{name}_steps_total{{TRAINER}}[10m]))",
                    "{{policy}}: " + name,
                )
                for name in ("dropped", "lost", "forgotten")
            ),
            thresholds=((1, RED),),
            runbooks=("EquipoiseTrainersLoseSteps",),
        ),
    ),
)

_SEEN = Row(
    title="As the server sees them",
    panels=(
        Panel(
            title="Trainers",
            description="Streams that are open, by policy.",
            unit="short",
            queries=(Query("sum by (policy) (equipoise_server_trainers{POLICY})", "{{policy}}"),),
            runbooks=("EquipoiseNoSteps",),
        ),
        Panel(
            title="Connected and remembered",
            description="Trainers whose streams are open, and all whose last step is remembered (for trainer_idle_s).",
            unit="short",
            queries=(
                Query("sum(equipoise_server_clients{SERVER})", "connected"),
                Query("sum(equipoise_server_clients_remembered{SERVER})", "remembered"),
            ),
        ),
        Panel(
            title="Since the last step",
            description="How long ago a policy's last step came.",
            unit="s",
            logarithmic=True,
            queries=(
                Query("time() - max by (policy) (equipoise_server_last_step_timestamp_seconds{POLICY})", "{{policy}}"),
            ),
            runbooks=("EquipoiseNoSteps",),
        ),
    ),
)

TRAINERS = Board(
    name="trainers",
    title="Trainers",
    description="What trainers see of the service, where their client metrics are scraped. For whoever runs training"
    " jobs.",
    rows=(_SERVED, _KEPT, _SEEN),
)
