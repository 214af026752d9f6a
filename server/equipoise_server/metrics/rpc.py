"""The `grpc_server_*` family, with the names and code spellings of go-grpc-middleware that public dashboards expect."""

from collections.abc import Iterable
from typing import NamedTuple

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry, Counter, Histogram

from equipoise.v1 import policy_pb2
from equipoise_server.metrics.names import CALL_SECONDS_BUCKETS
from equipoise_server.metrics.refusals import Refusals

CODES = {code.name: code.name.title().replace("_", "") for code in grpc.StatusCode}
CODES |= {"OK": "OK", "CANCELLED": "Canceled"}
"""Go's spelling of each canonical code, by its name in UPPER_SNAKE."""

LABELS = ("grpc_type", "grpc_service", "grpc_method")

SERVICES: tuple[ServiceDescriptor, ...] = (
    policy_pb2.DESCRIPTOR.services_by_name["PolicyService"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
)


class RpcLabels(NamedTuple):
    """Labels of one method."""

    grpc_type: str
    grpc_service: str
    grpc_method: str


OTHER = RpcLabels("unary", "other", "other")
"""Every method that we do not serve: callers must not be able to make up series."""


def methods_of(services: Iterable[ServiceDescriptor]) -> dict[str, RpcLabels]:
    """Labels by full method name, such as `/equipoise.v1.PolicyService/Exchange`."""
    kinds = {(False, False): "unary", (True, False): "client_stream", (False, True): "server_stream"}
    return {
        f"/{service.full_name}/{method.name}": RpcLabels(
            kinds.get((method.client_streaming, method.server_streaming), "bidi_stream"), service.full_name, method.name
        )
        for service in services
        for method in service.methods
    }


class RpcMetrics:
    """Hears of RPCs by their full method names; every series of a method we serve starts at 0. Thread-safe."""

    def __init__(self, registry: CollectorRegistry, services: Iterable[ServiceDescriptor] = SERVICES) -> None:
        self._refusals = Refusals(registry)

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(name, help_text, (*LABELS, *labels), registry=registry)

        started = counter("grpc_server_started", "RPCs started on the server.")
        received = counter("grpc_server_msg_received", "Messages received from clients.")
        sent = counter("grpc_server_msg_sent", "Messages sent to clients.")
        handled = counter("grpc_server_handled", "RPCs completed on the server, whatever their code.", "grpc_code")
        seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time from the start of an RPC to its end; for streams their lifetime.",
            LABELS,
            registry=registry,
            buckets=CALL_SECONDS_BUCKETS,
        )
        methods = methods_of(services) | {"": OTHER}
        self._started = {name: started.labels(*labels) for name, labels in methods.items()}
        self._received = {name: received.labels(*labels) for name, labels in methods.items()}
        self._sent = {name: sent.labels(*labels) for name, labels in methods.items()}
        self._seconds = {name: seconds.labels(*labels) for name, labels in methods.items()}
        self._handled = {
            (name, code): handled.labels(*labels, spelling)
            for name, labels in methods.items()
            for code, spelling in CODES.items()
        }

    def rpc_started(self, *, method: str, kind: str) -> None:
        """A call of `/package.Service/Method` began."""
        del kind  # known from the contract; callers cannot make up series
        self._started[self._known(method)].inc()

    def rpc_handled(self, *, method: str, kind: str, code: str, seconds: float) -> None:
        """It ended with a canonical code (UPPER_SNAKE), `seconds` after its start."""
        del kind
        name = self._known(method)
        self._handled[name, code if code in CODES else "UNKNOWN"].inc()
        self._seconds[name].observe(seconds)

    def refused(self, *, reason: str) -> None:
        """A call, or a step in a stream, was refused for `reason` (the ErrorInfo's)."""
        self._refusals.count(reason)

    def message_received(self, *, method: str, kind: str) -> None:
        """A message came in."""
        del kind
        self._received[self._known(method)].inc()

    def message_sent(self, *, method: str, kind: str) -> None:
        """A message went out."""
        del kind
        self._sent[self._known(method)].inc()

    def _known(self, method: str) -> str:
        return method if method in self._started else ""
