"""Does the policy learn what it should? The board of whoever trains."""

from deploy.grafana.board import Board, Row
from deploy.grafana.panel import RED, YELLOW, Kind, Panel, Query

_POLICIES = Row(
    title="Policies",
    panels=(
        Panel(
            title="Policies and their rules",
            description="The chosen policies: their rule, its kind (what weights are spread over: a table of all N"
            " examples, the batch of one step, or a trajectory of rows), and the server that serves them.",
            unit="none",
            kind=Kind.TABLE,
            queries=(Query("max by (policy, rule, kind, instance) (equipoise_server_policy_info{POLICY})"),),
            width=12,
        ),
        Panel(
            title="Steps a second",
            description="Steps that were applied. 0 with trainers connected: they hang, or evaluate.",
            unit="ops",
            queries=(Query("policy:equipoise_server_steps:rate5m{JOB_POLICY}", "{{policy}}"),),
            runbooks=("EquipoiseNoSteps",),
            width=6,
        ),
        Panel(
            title="Versions",
            description="Steps applied or refused since the policy was created. It never goes back.",
            unit="short",
            queries=(Query("max by (policy) (equipoise_server_policy_version{POLICY})", "{{policy}}"),),
            width=6,
        ),
    ),
)

_WEIGHTS = Row(
    title="Weights: on how many examples do they lie?",
    panels=(
        Panel(
            title="Effective examples, share",
            description="1: uniform, all examples count alike; near 0: all weight lies on few. Of N for table rules;"
            " of the rows of a step for batch rules; of a row for trajectories. Falling slowly while the target loss"
            " falls is learning; a fall to nearly 0 is a collapse.",
            unit="percentunit",
            most=1,
            queries=(
                Query("policy:equipoise_server_effective_ratio:avg15m{JOB_POLICY}", "{{policy}} ({{rule}}, {{kind}})"),
            ),
            thresholds=((0.05, RED),),
            runbooks=("EquipoiseWeightCollapse",),
        ),
        Panel(
            title="Effective examples, number",
            description="The same as a number, beside N: of so many examples the policy makes use.",
            unit="short",
            logarithmic=True,
            queries=(
                Query("policy:equipoise_server_effective_examples:avg15m{JOB_POLICY}", "{{policy}}"),
                Query("max by (policy) (equipoise_server_num_examples{POLICY})", "{{policy}}: N"),
            ),
            runbooks=("EquipoiseWeightCollapse",),
        ),
        Panel(
            title="Largest weight",
            description="Of the rows of the last step; the mean over all N is 1. So many times does the heaviest"
            " example count.",
            unit="short",
            logarithmic=True,
            queries=(Query("max by (policy) (equipoise_server_weight_max{POLICY})", "{{policy}}"),),
            runbooks=("EquipoiseWeightCollapse",),
        ),
        Panel(
            title="Effective examples, as they are",
            description="The same share without averaging: of batch rules it is that of the last step, and jumps.",
            unit="percentunit",
            most=1,
            queries=(
                Query("max by (policy) (equipoise_server_weight_effective_examples_ratio{POLICY})", "{{policy}}"),
            ),
        ),
        Panel(
            title="Examples scored at least once",
            description="Until an example has been scored its weight is 1. While this is below 1, the policy knows"
            " only a part of the data; in the first pass nothing is weighted. Batch rules keep nothing and have no"
            " line.",
            unit="percentunit",
            most=1,
            queries=(Query("max by (policy) (equipoise_server_scored_ratio{POLICY})", "{{policy}}"),),
        ),
        Panel(
            title="Rows of a step",
            description="Mean number of rows of the steps that were applied. For batch rules it is what weights are"
            " spread over: with few rows there is little to choose from.",
            unit="short",
            queries=(Query("policy:equipoise_server_step_rows:avg5m{JOB_POLICY}", "{{policy}}"),),
        ),
    ),
)

_EVIDENCE = Row(
    title="Evidence: do contributions tell examples apart?",
    panels=(
        Panel(
            title="SIM",
            description="Mean over standard deviation of the last step's contributions. The Learning Law says that"
            " in optimal learning all examples contribute equally: SIM rises. Near 0, contributions are noise.",
            unit="short",
            queries=(Query("max by (policy) (avg_over_time(equipoise_server_sim{POLICY}[RATE]))", "{{policy}}"),),
        ),
        Panel(
            title="Share of positive contributions",
            description="Examples of the last step whose gradient helps the target. One half: contributions do not"
            " tell helpful examples from harmful ones. Near 1: nearly all of the data helps, and there is little to"
            " gain.",
            unit="percentunit",
            most=1,
            queries=(
                Query("max by (policy) (avg_over_time(equipoise_server_positive_share{POLICY}[RATE]))", "{{policy}}"),
            ),
        ),
        Panel(
            title="Contrast of strata",
            description="Rule strata only. F: how much more the mean contributions of the strata differ than chance"
            " explains. Near 1 they say nothing of one another, and all weights stay near 1; 3 and more: some strata"
            " help clearly more than others.",
            unit="short",
            queries=(Query("max by (policy) (equipoise_server_strata_contrast{POLICY})", "{{policy}}"),),
        ),
        Panel(
            title="What became of steps",
            description="Steps a second: applied; duplicate, which were sent again after a lost answer and had no"
            " effect; refused, from which nothing was learnt; and reads.",
            unit="ops",
            queries=(
                Query(
                    "sum by (policy, result) (rate(equipoise_server_updates_total{POLICY}[RATE])) > 0",
                    "{{policy}} {{result}}",
                ),
            ),
            runbooks=("EquipoiseStepsRefused",),
        ),
        Panel(
            title="Values that were refused",
            description="Because of what was sent: NON_FINITE_STAT is NaN or infinity, ID_OUT_OF_RANGE an example"
            " that the policy does not have. Over all policies of the servers.",
            empty="No value was refused.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(
                Query("sum by (reason) (rate(equipoise_server_rejected_values_total{SERVER}[RATE])) > 0", "{{reason}}"),
            ),
            runbooks=("EquipoiseNonFiniteStatistics", "EquipoiseStepsRefused"),
        ),
        Panel(
            title="Since the last step",
            description="How long ago each policy took its last step. It grows when training is over, or hangs.",
            unit="s",
            logarithmic=True,
            queries=(
                Query("time() - max by (policy) (equipoise_server_last_step_timestamp_seconds{POLICY})", "{{policy}}"),
            ),
            runbooks=("EquipoiseNoSteps",),
        ),
        Panel(
            title="Trainers",
            description="Trainers of each policy whose streams are open.",
            unit="short",
            queries=(Query("sum by (policy) (equipoise_server_trainers{POLICY})", "{{policy}}"),),
            runbooks=("EquipoiseNoSteps",),
        ),
    ),
)

_LOSSES = Row(
    title="Losses and guard: does weighting help?",
    panels=(
        Panel(
            title="Target loss",
            description="What the policy is steered by: the loss on the target examples A as trainers report it, in"
            " nats.",
            unit="suffix: nats",
            queries=(Query("max by (policy) (equipoise_server_target_loss{POLICY})", "{{policy}}"),),
            runbooks=("EquipoiseTargetLossRises",),
        ),
        Panel(
            title="Guard loss",
            description="The loss on other examples B of the same kind, which steer nothing. It rises while the"
            " target loss falls: the target is learnt by heart.",
            unit="suffix: nats",
            queries=(Query("max by (policy) (equipoise_server_guard_loss{POLICY})", "{{policy}}"),),
            runbooks=("EquipoiseTargetOverfitted",),
        ),
        Panel(
            title="Guard loss less target loss",
            description="Means of half an hour. A gap that widens is overfitting of the target.",
            unit="suffix: nats",
            queries=(
                Query(
                    "policy:equipoise_server_guard_loss:avg30m{JOB_POLICY}"
                    " - policy:equipoise_server_target_loss:avg30m{JOB_POLICY}",
                    "{{policy}}",
                ),
            ),
            runbooks=("EquipoiseTargetOverfitted",),
        ),
        Panel(
            title="Guard strength",
            description="How far the guard pulls to uniform weights: 0, the policy's weights are served as they are;"
            " 1, uniform ones. It moves only where trainers send guard_loss.",
            unit="percentunit",
            most=1,
            queries=(Query("max by (policy) (equipoise_server_guard_strength{POLICY})", "{{policy}}"),),
            thresholds=((0.5, YELLOW),),
            runbooks=("EquipoiseGuardEngaged",),
        ),
        Panel(
            title="Trials of the guard",
            description="The guard tries uniform weights for a stretch and compares how fast the guard loss falls."
            " won: the policy's weights were better; lost: uniform ones were. Mostly lost: weighting does not help"
            " this run.",
            unit="short",
            queries=(
                Query("max by (policy, result) (equipoise_server_guard_trials_total{POLICY})", "{{policy}} {{result}}"),
            ),
            runbooks=("EquipoiseGuardEngaged",),
        ),
        Panel(
            title="Compression ratio",
            description="ln|V| over the mean target loss: so many times smaller than a uniform guess the run codes"
            " the target. Only where the policy was created with reference_nats.",
            unit="short",
            queries=(Query("max by (policy) (equipoise_server_compression_ratio{POLICY})", "{{policy}}"),),
        ),
    ),
)

LEARNING = Board(
    name="learning",
    title="Learning",
    description="Does the policy learn, on how many examples does its weight lie, and does it help? For whoever"
    " trains.",
    rows=(_POLICIES, _WEIGHTS, _EVIDENCE, _LOSSES),
)
