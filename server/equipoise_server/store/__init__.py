"""The store: what a policy server must not lose, kept in Redis.

The only package that imports `redis`. Payloads are opaque here: specs are text, log entries and pages bytes.
"""

from equipoise_server.store.checksums import checksum, seal
from equipoise_server.store.connect import COMMAND_TIMEOUT_S
from equipoise_server.store.data_directory import DataDirectoryInUse
from equipoise_server.store.embedded import EmbeddedRedis, EmbeddedRedisFailed, Fsync
from equipoise_server.store.errors import (
    UNAVAILABLE_KINDS,
    Damaged,
    Deleted,
    Fenced,
    Interrupted,
    InvalidStoreUrl,
    LogLost,
    NotFound,
    OwnedElsewhere,
    StoreError,
    SweepVoid,
    TooNew,
    Unavailable,
)
from equipoise_server.store.format import FORMAT
from equipoise_server.store.limits import MAX_APPEND_BYTES, MAX_COMMAND_BYTES
from equipoise_server.store.log import entry_bytes
from equipoise_server.store.observer import Observer
from equipoise_server.store.records import (
    Fence,
    LogEntry,
    LogState,
    Owner,
    Ownership,
    Page,
    PageBatch,
    ServerLoad,
    StoredPolicy,
)
from equipoise_server.store.redis_binary import RedisBinaryMissing
from equipoise_server.store.redis_store import RedisStore
from equipoise_server.store.usage import Usage

__all__ = [
    "COMMAND_TIMEOUT_S",
    "FORMAT",
    "MAX_APPEND_BYTES",
    "MAX_COMMAND_BYTES",
    "UNAVAILABLE_KINDS",
    "Damaged",
    "DataDirectoryInUse",
    "Deleted",
    "EmbeddedRedis",
    "EmbeddedRedisFailed",
    "Fence",
    "Fenced",
    "Fsync",
    "Interrupted",
    "InvalidStoreUrl",
    "LogEntry",
    "LogLost",
    "LogState",
    "NotFound",
    "Observer",
    "OwnedElsewhere",
    "Owner",
    "Ownership",
    "Page",
    "PageBatch",
    "RedisBinaryMissing",
    "RedisStore",
    "ServerLoad",
    "StoreError",
    "StoredPolicy",
    "SweepVoid",
    "TooNew",
    "Unavailable",
    "Usage",
    "checksum",
    "entry_bytes",
    "seal",
]
