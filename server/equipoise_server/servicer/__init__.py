"""The RPC edge: validates and converts, asks the engine, answers."""

from equipoise_server.servicer.convert import StepLimits
from equipoise_server.servicer.service import PolicyServicer, ServiceLimits

__all__ = ["PolicyServicer", "ServiceLimits", "StepLimits"]
