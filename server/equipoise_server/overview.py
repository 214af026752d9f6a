"""What the server is doing at one moment, for its metrics: gathered from all its parts, as far as they are there."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from equipoise_server.engine import Device, Engine, ServiceStatus, free_bytes
from equipoise_server.health import Health
from equipoise_server.metrics import LoadingStatus, ServerStatus, TenantStatus, Use
from equipoise_server.security import Access, Calls, Certificates
from equipoise_server.servicer import PolicyServicer
from equipoise_server.settings import Settings
from equipoise_server.store import EmbeddedRedis, Usage


@dataclass(slots=True, kw_only=True)
class Overview:
    """The parts of a server; those that are None have not been started.

    Attributes:
        redis_up: whether the last word from Redis was an answer.
        address_shared: whether another server advertises this one's address.
        own_redis_usage: what the server's own Redis took when it was last looked at.
    """

    settings: Settings
    health: Health
    access: Access
    calls: Calls
    engine: Engine | None = None
    device: Device | None = None
    servicer: PolicyServicer | None = None
    certificates: Certificates | None = None
    own_redis: EmbeddedRedis | None = None
    own_redis_usage: Usage | None = None
    redis_up: bool = False
    address_shared: bool = False

    def status(self) -> ServerStatus:
        """The picture of now; taken on the event loop."""
        settings, engine, servicer = self.settings, self.engine, self.servicer
        policies = tuple(engine.services) if engine else ()
        return ServerStatus(
            checks=self.health.checks(),
            policies=policies,
            loading=self._loading(),
            streams=Use(servicer.open_streams if servicer else 0, settings.max_streams),
            calls=Use(self.calls.total, settings.max_concurrent_rpcs),
            inflight_bytes=Use(servicer.in_flight.total if servicer else 0, settings.max_inflight_bytes),
            import_bytes=Use(servicer.imports.taken if servicer else 0, settings.max_import_bytes),
            log_memory_bytes=Use(engine.backlogs.total if engine else 0, settings.max_backlogs_bytes),
            tasks=len(asyncio.all_tasks()),
            tenants=tuple(self._tenants(policies)),
            device=self.device.device.type if self.device else "",
            device_bytes=_device_bytes(self.device.device, policies) if self.device else {},
            redis_up=self.redis_up,
            address_shared=self.address_shared,
            draining=self.health.draining,
            certificate_expires=self.certificates.expires if self.certificates else None,
            reloads={
                **({"tokens": self.access.reloads} if settings.tokens_file else {}),
                **({"certificates": self.certificates.reloads} if self.certificates else {}),
            },
            own_redis=self.own_redis_usage,
            own_redis_exits=self.own_redis.exits if self.own_redis else None,
        )

    def _loading(self) -> LoadingStatus:
        loadings = self.engine.loadings if self.engine else []
        return LoadingStatus(
            policies=len(loadings),
            pages=sum(each.pages for each in loadings),
            read_pages=sum(each.read_pages for each in loadings),
            entries=sum(each.entries for each in loadings),
            replayed=sum(each.replayed for each in loadings),
            longest_s=max((each.seconds for each in loadings), default=0.0),
        )

    def _tenants(self, policies: tuple[ServiceStatus, ...]) -> list[TenantStatus]:
        tenants = self.access.tenants
        if not tenants:
            return []
        owned: Counter[str] = Counter()
        table_bytes: Counter[str] = Counter()
        for each in policies:
            owner = self.access.tenant_of(each.policy.name)
            owned[owner] += each.in_memory
            table_bytes[owner] += each.table_bytes
        found = []
        for tenant in tenants:
            calls, streams = self.calls.of_tenant(tenant.name)
            share = self.access.share_of_tenant(tenant.name)
            found.append(
                TenantStatus(
                    name=tenant.name,
                    policies=owned[tenant.name],
                    table_bytes=table_bytes[tenant.name],
                    calls=calls,
                    max_calls=tenant.max_calls or self.settings.max_tenant_rpcs,
                    streams=streams,
                    max_streams=tenant.max_streams,
                    inflight_bytes=self.servicer.in_flight.of_share(share) if self.servicer else 0,
                )
            )
        return found


def _device_bytes(device: torch.device, policies: tuple[ServiceStatus, ...]) -> Mapping[str, int]:
    """What the tables take, what is free, and of a GPU what there is and what torch holds of it."""
    told = {"tables": sum(each.table_bytes for each in policies)}
    if device.type == "cuda":
        told["free"], told["total"] = torch.cuda.mem_get_info(device)
        told["reserved"] = torch.cuda.memory_reserved(device)
    elif (free := free_bytes(device)) is not None:
        told["free"] = free
    return told
