"""Whether the server is ready: named checks, told alike to gRPC health checks, to `/readyz` and to the metrics."""

from typing import Any

from grpc_health.v1 import health, health_pb2

from equipoise.v1 import policy_pb2

OVERALL = ""
SERVICE = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health carries no types
    """grpc.health.v1 with `List`, which the servicer that comes with gRPC leaves out."""

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Every service's status."""
        del request, context
        statuses = {
            service: health_pb2.HealthCheckResponse(status=status) for service, status in self._server_status.items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)


class Health:
    """Ready once every component was reached, and until the server drains.

    The gRPC status of the whole server (`""`) says that the process lives: SERVING from the start, NOT_SERVING once it
    drains. That of the policy service says whether it is ready. A component that fails later does not make the server
    unready: training goes on without Redis, and moving it elsewhere would not help.

    Attributes:
        servicer: answers grpc.health.v1; to be added to the gRPC server.
    """

    def __init__(self, *components: str) -> None:
        self.servicer: Any = HealthServicer()
        self._components = components
        self._missing = dict.fromkeys(components, "")  # why, as far as is known
        self._started = False
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether the server is about to stop."""
        return self._draining

    def checks(self) -> dict[str, str]:
        """Every check by its name, and why it fails, in words; empty: it does not."""
        return {
            "drain": "the server is stopping" if self._draining else "",
            "startup": "" if self._started else "the server is starting",
            **{component: self._lacking(component) for component in self._components},
        }

    async def ready(self) -> dict[str, str]:
        """The same, for who asks several servers alike."""
        return self.checks()

    def problems(self) -> list[str]:
        """Why the server is not ready, in words; empty when it is."""
        return [trouble for trouble in self.checks().values() if trouble]

    async def start(self) -> None:
        """Sets the first statuses: from now on the server may be asked."""
        self._started = True
        await self.servicer.set(OVERALL, SERVING)
        await self._publish()

    async def reached(self, component: str) -> None:
        """A component was reached for the first time; later calls have no effect."""
        if component in self._missing:
            del self._missing[component]
            await self._publish()

    def lacks(self, component: str, why: str) -> None:
        """A component cannot be used, for this reason; one that was reached before makes nobody unready."""
        if component in self._missing:
            self._missing[component] = why

    async def drain(self) -> None:
        """Not ready from now on, whatever happens."""
        self._draining = True
        await self.servicer.enter_graceful_shutdown()

    def _lacking(self, component: str) -> str:
        if component not in self._missing:
            return ""
        why = self._missing[component]
        return f"{component} has not been reached yet" + (f": {why}" if why else "")

    async def _publish(self) -> None:
        await self.servicer.set(SERVICE, NOT_SERVING if self.problems() else SERVING)
