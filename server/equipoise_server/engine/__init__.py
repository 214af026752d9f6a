"""The engine: owns the policies, applies steps to them one after another, and keeps them in the store."""

from equipoise_server.engine.device import DeviceThread, choose_device, describe_device
from equipoise_server.engine.engine import Engine, EngineLimits
from equipoise_server.engine.policy import Policy
from equipoise_server.engine.queue import QueueLimits
from equipoise_server.engine.runner import PolicyRunner, RunnerLimits
from equipoise_server.engine.session import Session
from equipoise_server.engine.spec import Durability, PolicySpec
from equipoise_server.engine.step import Answer, Kind, Outcome, Step
from equipoise_server.engine.sweep import SweepLimits
from equipoise_server.engine.telemetry import NoTelemetry, Telemetry

__all__ = [
    "Answer",
    "DeviceThread",
    "Durability",
    "Engine",
    "EngineLimits",
    "Kind",
    "NoTelemetry",
    "Outcome",
    "Policy",
    "PolicyRunner",
    "PolicySpec",
    "QueueLimits",
    "RunnerLimits",
    "Session",
    "Step",
    "SweepLimits",
    "Telemetry",
    "choose_device",
    "describe_device",
]
