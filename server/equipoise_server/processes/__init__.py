"""Several processes as one server: one port, one Redis, one `/metrics`, one signal to end.

Each process is a server of its own, with a name in Redis, a part of the policies and an address of its own, to which
the others send trainers (NOT_OWNER): nothing below knows more than one process. Their parent starts them, keeps the
ports and the Redis, tells `/metrics` and readiness of all, and replaces a process that has ended.
"""

from equipoise_server.processes.parent import run_all

__all__ = ["run_all"]
