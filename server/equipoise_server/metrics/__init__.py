"""Prometheus metrics of the server: the only package that knows prometheus_client, and every name it exports."""

from equipoise_server.metrics.endpoint import Endpoint
from equipoise_server.metrics.event_loop import measure_lag
from equipoise_server.metrics.rpc import RpcMetrics
from equipoise_server.metrics.server import Metrics
from equipoise_server.metrics.status import ServerStatus
from equipoise_server.metrics.store import StoreMetrics

__all__ = ["Endpoint", "Metrics", "RpcMetrics", "ServerStatus", "StoreMetrics", "measure_lag"]
