"""Is what was learnt kept? Redis, durability, loading, ownership."""

from deploy.grafana.board import Board, Row
from deploy.grafana.panel import RED, YELLOW, Kind, Panel, Query

_DURABILITY = Row(
    title="Durability: what would a crash cost?",
    panels=(
        Panel(
            title="Durability lag",
            description="How long ago the oldest step was taken that Redis does not have; 0: it has all. Only steps"
            " whose trainer dies with the server are lost.",
            unit="s",
            queries=(Query("max by (policy) (equipoise_server_durability_lag_seconds{POLICY})", "{{policy}}"),),
            thresholds=((30, RED),),
            runbooks=("EquipoiseDurabilityLags",),
        ),
        Panel(
            title="Steps not in Redis",
            description="Applied, and not there yet. Some, for some milliseconds, are always on their way.",
            unit="short",
            queries=(Query("equipoise_server_unpersisted_updates{SERVER}", "{{instance}}"),),
            runbooks=("EquipoiseDurabilityLags",),
        ),
        Panel(
            title="Redis answers",
            description="1: the last word from Redis was an answer. 0: training goes on, nothing is durable.",
            unit="short",
            most=1,
            queries=(Query("equipoise_server_redis_up{SERVER}", "{{instance}}"),),
            runbooks=("EquipoiseRedisDown",),
        ),
        Panel(
            title="Logs in Redis",
            description="About the bytes of each policy's log since its last sweep; the largest ten. Sweeps cut them.",
            unit="decbytes",
            queries=(Query("topk(10, max by (policy) (equipoise_server_log_bytes{POLICY}))", "{{policy}}"),),
            width=6,
            runbooks=("EquipoiseReplayTakesLong", "EquipoiseRedisFull"),
        ),
        Panel(
            title="A restart would take",
            description="About how long the longest log takes to replay after a crash. A stop in order sweeps first.",
            unit="s",
            queries=(Query("equipoise_server_log_longest_replay_seconds{SERVER}", "{{instance}}"),),
            thresholds=((60, YELLOW),),
            width=6,
            runbooks=("EquipoiseReplayTakesLong",),
        ),
        Panel(
            title="Entries of all logs",
            description="Steps in the logs in Redis: what would be replayed after a crash.",
            unit="short",
            queries=(Query("equipoise_server_log_entries{SERVER}", "{{instance}}"),),
            runbooks=("EquipoiseReplayTakesLong",),
            width=6,
        ),
        Panel(
            title="Sweeps",
            description="Sweeps that ended in the last half hour: each writes the changed pages of a policy to"
            " Redis, and cuts its log.",
            unit="short",
            queries=(Query("sum by (result) (increase(equipoise_server_sweeps_total{SERVER}[30m]))", "{{result}}"),),
            runbooks=("EquipoiseSweepsFail",),
            width=6,
        ),
    ),
)

_REDIS = Row(
    title="Redis",
    panels=(
        Panel(
            title="Time of commands, 99 %",
            description="What 99 of 100 commands are faster than. append is a step's way into the log; its time is"
            " part of every answer.",
            unit="s",
            logarithmic=True,
            queries=(
                Query(
                    "histogram_quantile(0.99, sum by (command, le)"
                    " (rate(equipoise_server_redis_command_duration_seconds_bucket{SERVER}[RATE]))) > 0",
                    "{{command}}",
                ),
            ),
            thresholds=((0.25, RED),),
            runbooks=("EquipoiseRedisSlow",),
        ),
        Panel(
            title="Time of an append, by server",
            description="What 99 of 100 appends of each server are faster than: one that is slower than the others"
            " is far from Redis, or has a slow disk.",
            unit="s",
            logarithmic=True,
            queries=(Query("instance:equipoise_server_redis_append_seconds:p99_5m{SERVER}", "{{instance}}"),),
            thresholds=((0.25, RED),),
            runbooks=("EquipoiseRedisSlow",),
        ),
        Panel(
            title="Commands a second",
            description="By command. One append may hold many steps.",
            unit="ops",
            kind=Kind.STACKED,
            queries=(
                Query(
                    "sum by (command) (rate(equipoise_server_redis_command_duration_seconds_count{SERVER}[RATE])) > 0",
                    "{{command}}",
                ),
            ),
        ),
        Panel(
            title="Commands that failed",
            description="By kind, in the last five minutes. oom: Redis is full; timeout: slower than"
            " redis_timeout_s; fenced: another server owns the policy, which is how moves are noticed.",
            empty="No command has failed.",
            unit="short",
            kind=Kind.STACKED,
            queries=(
                Query("sum by (kind) (increase(equipoise_server_redis_errors_total{SERVER}[5m])) > 0", "{{kind}}"),
            ),
            runbooks=("EquipoiseRedisErrors", "EquipoiseRedisFull"),
        ),
        Panel(
            title="The server's own Redis",
            description="Where redis_url is not set: its memory, its files, and what is left on its disk. It needs"
            " room for a second file while it writes anew.",
            unit="decbytes",
            logarithmic=True,
            queries=(
                Query("equipoise_server_own_redis_memory_bytes{SERVER}", "{{instance}} memory"),
                Query("equipoise_server_own_redis_file_bytes{SERVER}", "{{instance}} files"),
                Query("equipoise_server_own_redis_disk_free_bytes{SERVER}", "{{instance}} free on disk"),
            ),
            runbooks=("EquipoiseRedisDiskFills",),
        ),
        Panel(
            title="Trouble of the server's own Redis",
            description="Whether its disk refuses its files (1), and how often it ended by itself.",
            unit="short",
            queries=(
                Query("equipoise_server_redis_sync_failing{SERVER}", "{{instance}} disk fails"),
                Query("equipoise_server_own_redis_exits_total{SERVER}", "{{instance}} ended"),
            ),
            runbooks=("EquipoiseRedisDiskFails", "EquipoiseOwnRedisEnds"),
        ),
    ),
)

_OWNERS = Row(
    title="Loading and ownership: who serves which policy?",
    panels=(
        Panel(
            title="Policies that are loading",
            description="On their way from Redis into memory; their trainers are answered LOADING and go on with"
            " older weights.",
            unit="short",
            queries=(Query("equipoise_server_policies_loading{SERVER}", "{{instance}}"),),
            runbooks=("EquipoiseLoadTakesLong",),
        ),
        Panel(
            title="How far loading is",
            description="Pages and log entries that the policies on their way have to read and have read. 0 when"
            " nothing is loading.",
            unit="short",
            queries=(
                Query("sum(equipoise_server_loading_pages{SERVER})", "pages"),
                Query("sum(equipoise_server_loading_pages_read{SERVER})", "pages read"),
                Query("sum(equipoise_server_loading_entries{SERVER})", "entries"),
                Query("sum(equipoise_server_loading_entries_replayed{SERVER})", "entries replayed"),
            ),
            runbooks=("EquipoiseLoadTakesLong",),
        ),
        Panel(
            title="The longest load now",
            description="For how long the slowest policy has been on its way.",
            unit="s",
            queries=(Query("equipoise_server_loading_longest_seconds{SERVER}", "{{instance}}"),),
            thresholds=((120, RED),),
            runbooks=("EquipoiseLoadTakesLong",),
        ),
        Panel(
            title="Policies that came and went",
            description="In the last ten minutes: loaded, and left by reason. UNLOADED: nobody used them; DRAINING:"
            " the server stops; MOVING: given to another server; FENCED: taken by one.",
            unit="short",
            queries=(
                Query("sum(increase(equipoise_server_load_duration_seconds_count{SERVER}[10m]))", "loaded"),
                Query(
                    "sum by (reason) (increase(equipoise_server_policies_left_total{SERVER}[10m])) > 0", "{{reason}}"
                ),
            ),
            runbooks=("EquipoiseOwnersFlap",),
        ),
        Panel(
            title="Time of a load, 95 %",
            description="From the first touch of a policy until it was in memory.",
            unit="s",
            queries=(
                Query(
                    "histogram_quantile(0.95, sum by (le)"
                    " (increase(equipoise_server_load_duration_seconds_bucket{SERVER}[30m])))",
                    "95 %",
                ),
            ),
            runbooks=("EquipoiseLoadTakesLong", "EquipoiseReplayTakesLong"),
        ),
        Panel(
            title="Owners",
            description="Trainers sent to a policy's owner, and writes that were refused since another server owns"
            " the policy, a second. Both belong to a move and end with it.",
            unit="ops",
            queries=(
                Query(
                    'sum(rate(equipoise_server_refusals_total{SERVER, reason="NOT_OWNER"}[RATE]))', "sent to the owner"
                ),
                Query("sum(rate(equipoise_server_fenced_writes_total{SERVER}[RATE]))", "fenced writes"),
            ),
            runbooks=("EquipoiseOwnersFlap",),
        ),
        Panel(
            title="Loads that failed",
            description="In the last ten minutes, by reason. STATE_DAMAGED: something in Redis is not what was"
            " written. POLICY_TOO_NEW: a newer release has written it. NOT_OWNER: another server serves the policy, as"
            " it should be.",
            empty="No load has failed.",
            unit="short",
            queries=(
                Query("sum by (reason) (increase(equipoise_server_failed_loads_total{SERVER}[10m])) > 0", "{{reason}}"),
            ),
            runbooks=("EquipoiseLoadsFail",),
            width=16,
        ),
        Panel(
            title="Servers that share an address",
            description="1 while another server tells trainers the same address (`advertise`): those who are sent"
            " there may meet the wrong one, again and again.",
            unit="short",
            queries=(Query("equipoise_server_address_shared{SERVER}", "{{instance}}"),),
            thresholds=((1, RED),),
            runbooks=("EquipoiseOwnersFlap",),
        ),
    ),
)

STATE = Board(
    name="state",
    title="State and durability",
    description="Is what was learnt in Redis, how does Redis answer, and who serves which policy? For whoever is on"
    " call.",
    rows=(_DURABILITY, _REDIS, _OWNERS),
)
