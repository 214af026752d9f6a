"""Prometheus metrics of the server: the only package that knows prometheus_client, and every name it exports."""

from equipoise_server.metrics.endpoint import Endpoint
from equipoise_server.metrics.event_loop import measure_lag
from equipoise_server.metrics.merging import MergedMetrics, ParentMetrics
from equipoise_server.metrics.rpc import RpcMetrics
from equipoise_server.metrics.server import Metrics
from equipoise_server.metrics.status import LoadingStatus, ServerStatus, Use
from equipoise_server.metrics.store import StoreMetrics
from equipoise_server.metrics.tenants import TenantStatus

__all__ = [
    "Endpoint",
    "LoadingStatus",
    "MergedMetrics",
    "Metrics",
    "ParentMetrics",
    "RpcMetrics",
    "ServerStatus",
    "StoreMetrics",
    "TenantStatus",
    "Use",
    "measure_lag",
]
