"""What the metrics of the server share: prefix, buckets, and the label of whatever has none of its own."""

PREFIX = "equipoise_server_"

OTHER = "other"
"""Label of all that is beyond a bound on labels; nobody may make up series."""

SECONDS_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""From a tenth of a millisecond, what a small step takes, to a client's longest deadline."""

CALL_SECONDS_BUCKETS = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0)
"""Of whole calls, by each method: few, as there are many methods."""

REDIS_SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.01, 0.05, 0.25, 1.0)
"""Of commands to Redis, by each command: up to the default of redis_timeout_s."""

COUNT_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
"""Powers of 4 up to the most rows of a request."""
