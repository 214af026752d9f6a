"""The servicer: the RPCs of `equipoise.v1.PolicyService`, between the wire and the engine."""

from equipoise_server.servicer.limits import ServiceLimits
from equipoise_server.servicer.service import PolicyServicer

__all__ = ["PolicyServicer", "ServiceLimits"]
