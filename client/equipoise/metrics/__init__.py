"""What the clients of a process see, for Prometheus or OpenTelemetry: how old their weights are, and what they keep.

    from prometheus_client import CollectorRegistry, start_http_server
    from equipoise.metrics.prometheus import PrometheusMetrics

    registry = CollectorRegistry()
    client = PolicyClient(address, policy="run-7", metrics=PrometheusMetrics(registry))
    start_http_server(9500, registry=registry)

`equipoise.metrics.opentelemetry.OpenTelemetryMetrics` does the same with a meter; an exporter for Prometheus makes the
same names, so that dashboards and alerts fit both. Nothing is shown unless it is asked for, and the client itself
needs neither library. One object serves all clients of a process.
"""
