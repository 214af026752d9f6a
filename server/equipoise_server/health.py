"""Whether the server is ready: named components, told alike to gRPC health checks and to `/healthz`."""

from typing import Any

from grpc_health.v1 import health, health_pb2

from equipoise.v1 import policy_pb2

OVERALL = ""
SERVICE = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Ready once every component was reached, and until the server drains.

    The gRPC status of the whole server (`""`) says that the process lives: SERVING from the start, NOT_SERVING once it
    drains. That of the policy service says whether it is ready. A component that fails later does not make the server
    unready: training goes on without Redis, and moving it elsewhere would not help.

    Attributes:
        servicer: answers grpc.health.v1; to be added to the gRPC server.
    """

    def __init__(self, *components: str) -> None:
        self.servicer: Any = health.aio.HealthServicer()
        self._missing = list(components)
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether the server is about to stop."""
        return self._draining

    def problems(self) -> list[str]:
        """Why the server is not ready, in words; empty when it is."""
        waiting = [f"{component} has not been reached yet" for component in self._missing]
        return ["the server is stopping", *waiting] if self._draining else waiting

    async def start(self) -> None:
        """Sets the first statuses."""
        await self.servicer.set(OVERALL, SERVING)
        await self._publish()

    async def reached(self, component: str) -> None:
        """A component was reached for the first time; later calls have no effect."""
        if component in self._missing:
            self._missing.remove(component)
            await self._publish()

    async def drain(self) -> None:
        """Not ready from now on, whatever happens."""
        self._draining = True
        await self.servicer.enter_graceful_shutdown()

    async def _publish(self) -> None:
        await self.servicer.set(SERVICE, NOT_SERVING if self.problems() else SERVING)
