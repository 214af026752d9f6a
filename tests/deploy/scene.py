"""A small world for dashboards and alerts: servers, jobs of every rule, their metrics, and a real Prometheus."""

import json
import re
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import sleep

import grpc
from prometheus_client import CollectorRegistry, start_http_server

from equipoise import PolicyClient, Security, errors
from equipoise.metrics.prometheus import PrometheusMetrics
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1 import policy_pb2_grpc
from equipoise_server.security import Scope, entry, new_token
from tests.deploy.prometheus import running, until
from tests.deploy.rules import FILES
from tests.deploy.training import Job, Training, jobs
from tests.e2e.faults.redis_server import RedisServer
from tests.e2e.faults.redis_server import running as redis_running
from tests.e2e.security.authority import Authority, Files
from tests.ports import free_port
from tests.servers import ServerProcess, serve

TENANTS = """
[tenants.vision]
prefix = "vision-"
max_streams = 4
[tenants.language]
prefix = "language-"
"""


@dataclass(kw_only=True)
class Scene:
    """What there is.

    Attributes:
        redis: of the first two servers.
        servers: two replicas on one Redis.
        guarded: a server with TLS, tokens, a Redis of its own, and two processes.
        tokens: file of the latter.
        certificate: of the latter.
        authority: signs certificates.
        trainings: jobs under way.
        prometheus: URL.
    """

    redis: RedisServer
    servers: tuple[ServerProcess, ...]
    guarded: ServerProcess
    tokens: Path
    certificate: Files
    authority: Authority
    trainings: tuple[Training, ...]
    prometheus: str = ""

    @property
    def metrics_addresses(self) -> list[str]:
        """Of all servers."""
        return [server.metrics_address for server in (*self.servers, self.guarded)]

    def misbehave(self) -> None:
        """What goes wrong on any day: a job that sends NaN, one that sends the wrong thing, one without a token."""
        step = pb.StepRequest(example_ids=struct.pack("<Q", 0), contributions=struct.pack("<f", float("nan")))
        for server in self.servers:  # one of them owns the policy
            with grpc.insecure_channel(server.address) as channel, suppress(grpc.RpcError):
                stub = policy_pb2_grpc.PolicyServiceStub(channel)
                stub.UpdateWeights(pb.UpdateWeightsRequest(policy="run-uniform", step=step), timeout=10)
                raise AssertionError("it was taken")
        with PolicyClient(self.servers[0].address, policy="run-ema-sign", when_lost="wait") as client, _refused():
            client.step([0], losses=[1.0])
        stranger = Security(root_certificates=self.authority.file, token="equipoise_nobody")
        with PolicyClient(self.guarded.address, policy="vision-1", security=stranger) as client, _refused():
            client.status()

    def stumble(self, seconds: float = 1.5) -> None:
        """Redis stands still for a moment."""
        with self.redis.paused():
            sleep(seconds)

    def reload(self) -> None:
        """The guarded server's tokens and certificate change."""
        self.tokens.write_text(self.tokens.read_text() + "\n")
        self.authority.issue("guarded")

    def forget(self) -> None:
        """A policy is deleted."""
        with PolicyClient(self.servers[0].address, policy="gone", num_examples=8) as client:
            client.step([0], contributions=[1.0])
            client.delete()


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (errors.StepRefusedError, errors.AccessDeniedError):
        return
    raise AssertionError("it was taken")


@contextmanager
def scene(folder: Path, *, scrape_s: float = 1.0, hurries: bool = False) -> Iterator[Scene]:
    """The world, in a folder, until the end of the block; `hurries`: alerts fire a second after their condition."""
    with ExitStack() as stack:
        redis = stack.enter_context(redis_running(folder / "redis"))
        shared = {"redis_url": redis.url, "metrics_max_policies": 34}
        servers = tuple(stack.enter_context(serve(**shared)) for _ in range(2))
        authority = Authority(folder)
        certificate = authority.issue("guarded")
        tokens, secrets = folder / "tokens.toml", {}
        tokens.write_text(TENANTS)
        for tenant in ("vision", "language"):
            secrets[tenant], kept = new_token(tenant=tenant, scopes=tuple(Scope))
            tokens.write_text(tokens.read_text() + entry(kept))
        guarded = stack.enter_context(
            serve(
                listen="127.0.0.1:0",
                processes=2,
                tls_certificate=certificate.certificate,
                tls_key=certificate.key,
                tokens_file=tokens,
            )
        )
        registry = CollectorRegistry()
        metrics, port = PrometheusMetrics(registry), free_port()
        http, _ = start_http_server(port, "127.0.0.1", registry)
        stack.callback(http.server_close)
        stack.callback(http.shutdown)
        trainings = tuple(_trainings(servers, guarded, authority, secrets, metrics))
        for training in trainings:
            training.start()
            stack.callback(training.stop)
        found = Scene(
            redis=redis, servers=servers, guarded=guarded, tokens=tokens, certificate=certificate, authority=authority,
            trainings=trainings,
        )  # fmt: skip
        for training in trainings:  # else the first samples are of policies that have not begun
            until(lambda training=training: training.applied > 3, f"{training.name} trains")  # type: ignore[misc]
        rules = [_hurried(file, folder) for file in FILES] if hurries else FILES
        config = folder / "prometheus.json"
        config.write_text(json.dumps(_config(found.metrics_addresses, f"127.0.0.1:{port}", scrape_s, rules)))
        found.prometheus = stack.enter_context(running(config, folder))
        yield found


def _trainings(
    servers: tuple[ServerProcess, ...],
    guarded: ServerProcess,
    authority: Authority,
    secrets: dict[str, str],
    metrics: PrometheusMetrics,
) -> Iterator[Training]:
    for number, job in enumerate(jobs()):
        # From either server: one sends the other's trainers on.
        addresses = ",".join(server.address for server in (servers if number % 2 else servers[::-1]))
        yield Training(job, addresses, metrics=metrics, seed=number)
    for number, (tenant, secret) in enumerate(secrets.items()):
        security = Security(root_certificates=authority.file, token=secret)
        job = Job(policy=f"{tenant}-1", rule="ema_sign", batch=32, pause_s=0.2)
        yield Training(job, guarded.address, metrics=metrics, security=security, seed=100 + number)


def _hurried(file: Path, folder: Path) -> Path:
    copy = folder / file.name
    copy.write_text(re.sub(r"^( *for): .*", r"\1: 1s", file.read_text(encoding="utf-8"), flags=re.M))
    return copy


def _config(servers: list[str], trainers: str, scrape_s: float, rules: list[Path]) -> dict[str, object]:
    every = f"{round(scrape_s * 1000)}ms"
    return {
        "global": {"scrape_interval": every, "evaluation_interval": every},
        "rule_files": [str(file) for file in rules],
        "scrape_configs": [
            {"job_name": "equipoise", "static_configs": [{"targets": servers}]},
            {"job_name": "trainers", "static_configs": [{"targets": [trainers]}]},
        ],
    }


def shell(command: str, *, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a command as a reader would."""
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
