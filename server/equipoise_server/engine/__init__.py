"""The engine: owns the policies, applies steps to them one after another, and keeps them in the store."""

from equipoise_server.engine.device import Device, choose_device, describe_device
from equipoise_server.engine.engine import Engine
from equipoise_server.engine.header import Header
from equipoise_server.engine.limits import EngineLimits
from equipoise_server.engine.loading import Loading
from equipoise_server.engine.memory import free_bytes, give_back_freed, tune_allocator
from equipoise_server.engine.placement import Wish
from equipoise_server.engine.policy import Policy
from equipoise_server.engine.runner import PolicyRunner, State
from equipoise_server.engine.session import Opener, Session
from equipoise_server.engine.snapshot import Snapshot
from equipoise_server.engine.spec import Durability, PolicySpec
from equipoise_server.engine.status import PolicyStatus, ServiceStatus
from equipoise_server.engine.step import Answer, Kind, Outcome, Step
from equipoise_server.engine.telemetry import NoTelemetry, Telemetry

__all__ = [
    "Answer",
    "Device",
    "Durability",
    "Engine",
    "EngineLimits",
    "Header",
    "Kind",
    "Loading",
    "NoTelemetry",
    "Opener",
    "Outcome",
    "Policy",
    "PolicyRunner",
    "PolicySpec",
    "PolicyStatus",
    "ServiceStatus",
    "Session",
    "Snapshot",
    "State",
    "Step",
    "Telemetry",
    "Wish",
    "choose_device",
    "describe_device",
    "free_bytes",
    "give_back_freed",
    "tune_allocator",
]
