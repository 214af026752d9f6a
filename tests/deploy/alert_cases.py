"""What each alert is for, as series: some under which it fires, and some that come near it under which it is silent.

Values are written as promtool does: `0+60x30` begins at 0 and grows by 60 in each of 30 minutes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Series = Mapping[str, str]
OWN = "equipoise_server_"
TARGET = {"namespace": "ml", "job": "equipoise", "instance": "a:9464"}
TRAINER = {"namespace": "ml", "job": "trainers", "instance": "t:9500"}
SERVICE = {"namespace": "ml", "job": "equipoise"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One alert.

    Attributes:
        alert: its name.
        fires: series under which it fires.
        silent: each of these is near the fault, and none.
        at: when to look.
        labels: of the alert that fires, beside its name.
        severities: of the rules of this name that fire.
    """

    alert: str
    fires: Series
    silent: tuple[Series, ...]
    at: str = "30m"
    labels: Mapping[str, str] = field(default_factory=lambda: TARGET)
    severities: tuple[str, ...] = ("warning",)


def series(name: str, *, of: Mapping[str, str] = TARGET, **labels: str) -> str:
    """A series' name with the labels of its target; names of the server without their prefix."""
    full = name if name == "up" or name.startswith(("grpc_", "process_", "equipoise_")) else OWN + name
    return full + "{" + ",".join(f'{key}="{value}"' for key, value in {**of, **labels}.items()) + "}"


def gauge(name: str, value: float, *, minutes: int = 400, **labels: str) -> dict[str, str]:
    """A series that stands."""
    return {series(name, **labels): f"{value}x{minutes}"}


def counter(name: str, each_minute: float, *, minutes: int = 400, **labels: str) -> dict[str, str]:
    """A series that grows."""
    return {series(name, **labels): f"0+{each_minute}x{minutes}"}


def event(name: str, **labels: str) -> dict[str, str]:
    """A counter with one event after 25 minutes: it was 0, and stays 1."""
    return {series(name, **labels): "0x24 1x300"}


def client(name: str, value: str, **labels: str) -> dict[str, str]:
    """A series of a trainer's client."""
    return {series(f"equipoise_client_{name}", of=TRAINER, policy="p", **labels): value}


BUILD = gauge("build_info", 1, version="1")
STEPS = counter("updates_total", 600, policy="p", result="applied")
NO_CALLS = counter(
    "grpc_server_handled_total",
    0,
    grpc_service="equipoise.v1.PolicyService",
    grpc_type="unary",
    grpc_method="GetPolicy",
)
EXCHANGE = {"method": "Exchange", "stage": "total"}


def buckets(name: str, *, fast: str, slow: str, **labels: str) -> dict[str, str]:
    """A histogram with one bucket that ends at `fast`, one at `slow`, where all observations lie in the latter."""
    return {
        **counter(f"{name}_bucket", 0, le=fast, **labels),
        **counter(f"{name}_bucket", 600, le=slow, **labels),
        **counter(f"{name}_bucket", 600, le="+Inf", **labels),
    }


def learning(rule: str, kind: str, ratio: float, *, rows: int, examples: int = 1000) -> dict[str, str]:
    """A policy that steps ten times a second."""
    return {
        **STEPS,
        **counter("examples_total", 600 * rows, policy="p"),
        **gauge("weight_effective_examples_ratio", ratio, policy="p"),
        **gauge("num_examples", examples, policy="p"),
        **gauge("policy_info", 1, policy="p", rule=rule, kind=kind),
    }


def collapsed(rule: str, kind: str, ratio: float, *, rows: int = 64) -> Case:
    """A policy of a rule's kind that has collapsed; the same rule in health is silent."""
    return Case(
        alert="EquipoiseWeightCollapse",
        fires=learning(rule, kind, ratio, rows=rows),
        silent=(
            learning("ema_sign", "table", 0.2, rows=64),
            learning("trajectory", "trajectory", 0.03, rows=64),
            learning("boltzmann", "batch", 0.3, rows=64),
            learning("boltzmann", "batch", 0.15, rows=64),  # ten effective rows of 64
            learning("boltzmann", "batch", 1.0, rows=1),  # one row has all the weight, as there is no other
            learning("boltzmann", "batch", 0.5, rows=2),
        ),
        at="45m",
        labels={**SERVICE, "policy": "p", "rule": rule, "kind": kind},
    )


POLICY = {**SERVICE, "policy": "p"}
OF_TRAINERS = {"namespace": "ml", "policy": "p"}

SERVICE_CASES = (
    Case(
        alert="EquipoiseAbsent",
        fires=gauge("up", 1),
        silent=(BUILD,),
        labels={},
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseServerDown",
        fires={**gauge("build_info", 1, version="1", minutes=10), series("up"): "1x10 0x60"},
        silent=(
            {**BUILD, **gauge("up", 1)},
            gauge("up", 0),  # it is somebody else's
        ),
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseProcessEnds",
        fires=event(OWN + "process_exits_total"),
        silent=(gauge(OWN + "process_exits_total", 3),),
    ),
    Case(
        alert="EquipoiseProcessEnds",
        fires={**gauge("processes_running", 1), **gauge("processes_wanted", 2)},
        silent=({series("processes_running"): "2x28 1x1 2x300", **gauge("processes_wanted", 2)},),
    ),
    Case(
        alert="EquipoiseNotReady",
        fires={**gauge("ready", 0), **gauge("draining", 0)},
        silent=({**gauge("ready", 0), **gauge("draining", 1)}, {**gauge("ready", 1), **gauge("draining", 0)}),
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseErrorBudgetBurnsFast",
        fires={**counter("updates_total", 900, result="applied"), **counter("refusals_total", 100, reason="BUG"),
               **NO_CALLS},
        silent=(
            {**counter("updates_total", 900, result="applied"), **counter("refusals_total", 100, reason="NOT_OWNER"),
             **NO_CALLS},
            {**counter("updates_total", 900, result="applied"), **counter("refusals_total", 1, reason="BUG"),
             **NO_CALLS},
        ),
        at="70m",
        labels=SERVICE,
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseErrorBudgetBurnsSlowly",
        fires={**counter("updates_total", 990, result="applied"), **counter("refusals_total", 10, reason="QUEUE_FULL"),
               **NO_CALLS},
        silent=(
            {**counter("updates_total", 995, result="applied"), **counter("refusals_total", 5, reason="QUEUE_FULL"),
             **NO_CALLS},
        ),
        at="390m",
        labels=SERVICE,
    ),
    Case(
        alert="EquipoiseSlowSteps",
        fires=buckets("message_duration_seconds", fast="1", slow="2.5", **EXCHANGE),
        silent=(buckets("message_duration_seconds", fast="0.5", slow="1", **EXCHANGE),),
        labels=SERVICE,
    ),
    Case(
        alert="EquipoiseEventLoopLags",
        fires=buckets("event_loop_lag_seconds", fast="0.25", slow="0.5"),
        silent=(buckets("event_loop_lag_seconds", fast="0.1", slow="0.25"),),
    ),
    Case(
        alert="EquipoiseDrainsTooLong",
        fires=gauge("draining", 1),
        silent=(gauge("draining", 0), {series("draining"): "0x20 1x5 0x30"}),
    ),
    Case(
        alert="EquipoiseBug",
        fires={**event("refusals_total", reason="BUG"), **counter("policies_left_total", 0, reason="BUG"),
               **counter("failed_loads_total", 0, reason="BUG")},
        silent=({**event("refusals_total", reason="LOADING"), **counter("policies_left_total", 0, reason="BUG"),
                 **counter("failed_loads_total", 0, reason="BUG"), **counter("refusals_total", 0, reason="BUG")},),
    ),
    Case(
        alert="EquipoiseCertificateEnds",
        fires=gauge("certificate_expiry_timestamp_seconds", 86400),
        silent=(gauge("certificate_expiry_timestamp_seconds", 15 * 86400),),
        severities=("critical", "warning"),
    ),
    Case(
        alert="EquipoiseCertificateEnds",
        fires=gauge("certificate_expiry_timestamp_seconds", 10 * 86400),
        silent=(BUILD,),  # without TLS
    ),
    Case(
        alert="EquipoiseReloadFails",
        fires={**event("reloads_total", file="tokens", result="failed"),
               **counter("reloads_total", 0, file="tokens", result="ok")},
        silent=(
            {**counter("reloads_total", 0, file="tokens", result="failed"),
             **event("reloads_total", file="tokens", result="ok")},
            {series("reloads_total", file="tokens", result="failed"): "0x20 1x300",  # the next file was good
             series("reloads_total", file="tokens", result="ok"): "0x26 1x300"},
        ),
        labels={**TARGET, "file": "tokens"},
    ),
    Case(
        alert="EquipoiseAuthFailures",
        fires=counter("auth_failures_total", 60, reason="TOKEN_INVALID"),
        silent=(counter("auth_failures_total", 2, reason="TOKEN_INVALID"),),
        labels={**SERVICE, "reason": "TOKEN_INVALID"},
    ),
)  # fmt: skip

STATE_CASES = (
    Case(
        alert="EquipoiseRedisDown",
        fires=gauge("redis_up", 0),
        silent=(gauge("redis_up", 1),),
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseRedisErrors",
        fires=counter("redis_errors_total", 60, kind="timeout"),
        silent=(counter("redis_errors_total", 60, kind="fenced"), event("redis_errors_total", kind="timeout")),
        labels={**TARGET, "kind": "timeout"},
    ),
    Case(
        alert="EquipoiseRedisFull",
        fires={series("redis_errors_total", kind="oom"): "0x27 1x300"},
        silent=(event("redis_errors_total", kind="timeout"), counter("redis_errors_total", 0, kind="oom")),
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseRedisSlow",
        fires=buckets("redis_command_duration_seconds", fast="0.25", slow="1", command="append"),
        silent=(
            buckets("redis_command_duration_seconds", fast="0.05", slow="0.25", command="append"),
            buckets("redis_command_duration_seconds", fast="0.25", slow="1", command="read_log"),
        ),
    ),
    Case(
        alert="EquipoiseRedisDiskFails",
        fires=gauge("redis_sync_failing", 1),
        silent=(gauge("redis_sync_failing", 0),),
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseRedisDiskFills",
        fires={**gauge("own_redis_disk_free_bytes", 10e9), **gauge("own_redis_file_bytes", 6e9)},
        silent=({**gauge("own_redis_disk_free_bytes", 10e9), **gauge("own_redis_file_bytes", 4e9)},),
    ),
    Case(
        alert="EquipoiseOwnRedisEnds",
        fires=event("own_redis_exits_total"),
        silent=(gauge("own_redis_exits_total", 3),),
    ),
    Case(
        alert="EquipoiseDurabilityLags",
        fires={**gauge("durability_lag_seconds", 40, policy="p"), **gauge("durability_lag_seconds", 0, policy="q")},
        silent=(gauge("durability_lag_seconds", 20, policy="p"),),
        labels=POLICY,
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseSweepsFail",
        fires={**counter("sweeps_total", 1, result="failed"), **counter("sweeps_total", 0, result="ok")},
        silent=({**counter("sweeps_total", 1, result="failed"), **counter("sweeps_total", 1, result="ok")},),
    ),
    Case(
        alert="EquipoiseReplayTakesLong",
        fires=gauge("log_longest_replay_seconds", 90),
        silent=(gauge("log_longest_replay_seconds", 50),),
    ),
    Case(
        alert="EquipoiseLoadTakesLong",
        fires={series("loading_longest_seconds"): "0+60x60"},
        silent=(gauge("loading_longest_seconds", 100),),
    ),
    Case(
        alert="EquipoiseLoadsFail",
        fires=event("failed_loads_total", reason="STATE_DAMAGED"),
        silent=(counter("failed_loads_total", 5, reason="NOT_OWNER"),
                counter("failed_loads_total", 5, reason="POLICY_NOT_FOUND")),
        labels={**SERVICE, "reason": "STATE_DAMAGED"},
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseOwnersFlap",
        fires=counter("policies_left_total", 1, reason="FENCED"),
        silent=(
            {series("policies_left_total", reason="FENCED"): "0x15 100x100"},  # one failover
            counter("policies_left_total", 5, reason="DRAINING"),
        ),
        labels=SERVICE,
    ),
    Case(
        alert="EquipoiseOwnersFlap",
        fires={**counter("policies_left_total", 1, reason="MOVING"), **gauge("policies", 5)},
        silent=(
            {series("policies_left_total", reason="MOVING"): "0x30 20x100", **gauge("policies", 20)},  # a new replica
        ),
        at="60m",
        labels=SERVICE,
    ),
)  # fmt: skip

CAPACITY_CASES = (
    Case(
        alert="EquipoiseQueueFull",
        fires=gauge("queue_fullest_ratio", 0.9),
        silent=(gauge("queue_fullest_ratio", 0.7),),
    ),
    Case(
        alert="EquipoiseNearLimit",
        fires={**gauge("active_streams", 90), **gauge("active_streams_limit", 100)},
        silent=(
            {**gauge("active_streams", 80), **gauge("active_streams_limit", 100)},
            {**gauge("calls", 80), **gauge("calls_limit", 0)},
        ),
        labels={**TARGET, "limit": "max_streams"},
    ),
    Case(
        alert="EquipoiseNearLimit",
        fires={**BUILD, **gauge("process_open_fds", 990), **gauge("process_max_fds", 1024)},
        silent=({**gauge("process_open_fds", 990), **gauge("process_max_fds", 1024)},),  # another program
        labels={**TARGET, "limit": "open files"},
    ),
    Case(
        alert="EquipoiseTenantNearLimit",
        fires={**gauge("tenant_calls", 95, tenant="red"), **gauge("tenant_calls_limit", 100, tenant="red")},
        silent=({**gauge("tenant_calls", 85, tenant="red"), **gauge("tenant_calls_limit", 100, tenant="red")},),
        labels={**TARGET, "tenant": "red"},
        severities=("info",),
    ),
    Case(
        alert="EquipoiseDeviceFull",
        fires={**event("refusals_total", reason="DEVICE_FULL"),
               **counter("failed_loads_total", 0, reason="DEVICE_FULL")},
        silent=({**counter("refusals_total", 0, reason="DEVICE_FULL"),
                 **counter("failed_loads_total", 0, reason="DEVICE_FULL"),
                 **event("refusals_total", reason="LOADING")},),
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseDeviceMemoryLow",
        fires={**gauge("device_memory_bytes", 5e9, device="cuda", state="free"),
               **gauge("device_memory_bytes", 75e9, device="cuda", state="tables")},
        silent=({**gauge("device_memory_bytes", 5e9, device="cpu", state="free"),
                 **gauge("device_memory_bytes", 1e9, device="cpu", state="tables")},),
        labels={**TARGET, "device": "cuda"},
    ),
    Case(
        alert="EquipoiseMemoryGrows",
        fires={**BUILD, series("process_resident_memory_bytes"): "1000000000+10000000x500",
               **gauge("log_memory_bytes", 0), **gauge("inflight_bytes", 0), **gauge("import_bytes", 0),
               **gauge("device_memory_bytes", 0, device="cpu", state="tables")},
        silent=(
            {**BUILD, series("process_resident_memory_bytes"): "1000000000+10000000x500",
             **gauge("log_memory_bytes", 0), **gauge("inflight_bytes", 0), **gauge("import_bytes", 0),
             series("device_memory_bytes", device="cpu", state="tables"): "0+10000000x500"},  # tables explain it
        ),
        at="400m",
    ),
)  # fmt: skip


def loss(name: str, before: float, after: float) -> dict[str, str]:
    """A loss that changes after four hours."""
    return {series(name, policy="p"): f"{before}x240 {after}x160"}


LEARNING_CASES = (
    collapsed("ema_sign", "table", 0.01),
    collapsed("trajectory", "trajectory", 0.002),
    collapsed("boltzmann", "batch", 1 / 64),
    collapsed("loss_linear_upper", "batch", 0.2, rows=8),
    Case(
        alert="EquipoiseNoSteps",
        fires={**gauge("last_step_timestamp_seconds", 60, policy="p"), **gauge("trainers", 2, policy="p"),
               **counter("updates_total", 0, policy="p", result="read")},
        silent=(
            {**gauge("last_step_timestamp_seconds", 60, policy="p"), **gauge("trainers", 0, policy="p")},  # they left
            {series("last_step_timestamp_seconds", policy="p"): "0+60x60", **gauge("trainers", 2, policy="p")},
            {**gauge("last_step_timestamp_seconds", 60, policy="p"), **gauge("trainers", 2, policy="p"),
             **counter("updates_total", 9, policy="p", result="read")},  # they evaluate
        ),
        labels=POLICY,
    ),
    Case(
        alert="EquipoiseStepsRefused",
        fires={**STEPS, **counter("updates_total", 60, policy="p", result="refused")},
        silent=({**STEPS, **counter("updates_total", 3, policy="p", result="refused")},),
        labels=POLICY,
    ),
    Case(
        alert="EquipoiseNonFiniteStatistics",
        fires=event("rejected_values_total", reason="NON_FINITE_STAT"),
        silent=(event("rejected_values_total", reason="SHAPE_MISMATCH"),),
        labels=SERVICE,
    ),
    Case(
        alert="EquipoiseGuardEngaged",
        fires={**STEPS, **gauge("guard_strength", 0.9, policy="p")},
        silent=(
            {**STEPS, **gauge("guard_strength", 0.3, policy="p")},
            {**STEPS, **gauge("guard_strength", 1, policy="p"),
             **gauge("policy_info", 1, policy="p", rule="uniform", kind="table")},
            {**counter("updates_total", 0, policy="p", result="applied"), **gauge("guard_strength", 0.9, policy="p")},
        ),
        at="70m",
        labels=POLICY,
        severities=("info",),
    ),
    Case(
        alert="EquipoiseTargetLossRises",
        fires={**STEPS, **loss("target_loss", 2.0, 2.5)},
        silent=({**STEPS, **loss("target_loss", 2.0, 2.05)}, {**STEPS, **loss("target_loss", 2.5, 2.0)},
                loss("target_loss", 2.0, 2.5)),
        at="290m",
        labels=POLICY,
    ),
    Case(
        alert="EquipoiseTargetOverfitted",
        fires={**STEPS, **loss("target_loss", 2.0, 1.5), **loss("guard_loss", 2.0, 2.5)},
        silent=({**STEPS, **loss("target_loss", 2.0, 1.5), **loss("guard_loss", 2.0, 1.8)},
                {**STEPS, **loss("target_loss", 2.0, 2.5), **loss("guard_loss", 2.0, 2.5)}),
        at="290m",
        labels=POLICY,
    ),
)  # fmt: skip

TRAINER_CASES = (
    Case(
        alert="EquipoiseTrainersFallBack",
        fires={**client("steps_total", "0+60x400"), **client("fallbacks_total", "0+6x400")},
        silent=({**client("steps_total", "0+60x400"), **client("fallbacks_total", "0+1x400")},),
        labels=OF_TRAINERS,
    ),
    Case(
        alert="EquipoiseTrainersStale",
        fires={**client("staleness_steps", "600x400"), **client("max_staleness_steps", "1000x400")},
        silent=({**client("staleness_steps", "400x400"), **client("max_staleness_steps", "1000x400")},),
        labels=OF_TRAINERS,
        severities=("critical",),
    ),
    Case(
        alert="EquipoiseTrainersLoseSteps",
        fires={**client("dropped_steps_total", "0x24 1x300"), **client("lost_steps_total", "0x400")},
        silent=({**client("dropped_steps_total", "5x400"), **client("lost_steps_total", "0x400")},),
        labels=OF_TRAINERS,
    ),
    Case(
        alert="EquipoiseTrainerWindowFull",
        fires={**client("window_steps", "4000x400"), **client("window_steps_limit", "4096x400")},
        silent=({**client("window_steps", "3000x400"), **client("window_steps_limit", "4096x400")},),
        labels={**TRAINER, "policy": "p"},
    ),
)

CASES = (*SERVICE_CASES, *STATE_CASES, *CAPACITY_CASES, *LEARNING_CASES, *TRAINER_CASES)
