"""The methods of `equipoise.v1.PolicyService`."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeAlias

import grpc

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1 import policy_pb2_grpc
from equipoise_server.engine import Engine, PolicyRunner, PolicySpec, Telemetry, Wish
from equipoise_server.engine.sampling import draw
from equipoise_server.engine.spec import check_name
from equipoise_server.errors import Code, ServiceError, invalid, quoted
from equipoise_server.interceptors import POLICY_HEADER, wished
from equipoise_server.rules import names
from equipoise_server.security import Scope, StorageQuotas, caller
from equipoise_server.servicer import reading, specs, transfer
from equipoise_server.servicer.convert import check_trainer_id, convert_step, to_response
from equipoise_server.servicer.exchange import Exchange
from equipoise_server.servicer.fields import StepFields
from equipoise_server.servicer.in_flight import InFlightBytes
from equipoise_server.servicer.limits import ServiceLimits
from equipoise_server.servicer.lookups import Lookups

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

MAX_WAIT_S = 60.0
"""Longest wait of a call without a deadline for a policy that is being loaded."""
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
DEFAULT_WATCH_INTERVAL_MS = 1000
MIN_WATCH_INTERVAL_MS = 100


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Validates and converts; the engine does the rest. Errors are raised as ServiceError, see `interceptors`."""

    def __init__(
        self, engine: Engine, *, limits: ServiceLimits, telemetry: Telemetry, share: Callable[[str], str] = str
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._telemetry = telemetry
        self.in_flight = InFlightBytes(
            max_bytes=limits.max_inflight_bytes, max_share_bytes=limits.max_tenant_inflight_bytes, share=share
        )
        self.imports = transfer.ImportMemory(limits.max_import_bytes)
        self._lookups = Lookups(engine)
        self._quotas = StorageQuotas(self._sizes, self._engine.lock)
        self.open_streams = 0
        """Exchange streams that are open now."""

    async def CreatePolicy(self, request: pb.CreatePolicyRequest, context: Context) -> pb.CreatePolicyResponse:  # noqa: N802
        """See the contract."""
        message = request.policy
        _check_policy(message.name, context, field="policy.name")
        try:
            stored = await self._lookups.find(message.name)
            created = False
        except ServiceError as error:
            if error.reason != "POLICY_NOT_FOUND":
                raise
            stored, created = await self._create(request, context)
        if not created:
            existing = PolicySpec.from_json(stored.spec)
            specs.check_same(message, existing)
            await self._check_fork(getattr(request, "from"), existing)
        # What was just created belongs here, and a fork that is there already is not made again elsewhere.
        wish = Wish.HERE if created or getattr(request, "from") else None
        runner = await self._lookups.runner(message.name, uid=stored.uid, wait_s=_wait_s(context), wish=wish)
        return pb.CreatePolicyResponse(status=specs.status_message(runner), created=created)

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Context) -> pb.GetPolicyResponse:  # noqa: N802
        """See the contract."""
        runner = await self._runner(request.policy, context)
        return pb.GetPolicyResponse(status=specs.status_message(runner, with_strata=True))

    async def ListPolicies(self, request: pb.ListPoliciesRequest, context: Context) -> pb.ListPoliciesResponse:  # noqa: N802
        """See the contract; the page token is the last name of the page before."""
        if request.page_token:
            try:
                check_name(request.page_token, field="page_token")
            except ServiceError as error:
                description = f"{quoted(request.page_token)} is no token of this server"
                raise invalid("INVALID_PAGE_TOKEN", "page_token", description) from error
        size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        prefix = caller().visible_prefix(request.prefix)
        if prefix is None:
            return pb.ListPoliciesResponse()
        async with self._lookups.turn():
            found = await self._engine.list_policies(after=request.page_token, prefix=prefix, limit=size + 1)
        page = found[:size]
        return pb.ListPoliciesResponse(
            policies=[specs.listed_message(stored) for stored in page],
            next_page_token=page[-1].name if len(found) > size else "",
        )

    async def DeletePolicy(self, request: pb.DeletePolicyRequest, context: Context) -> pb.DeletePolicyResponse:  # noqa: N802
        """See the contract."""
        _check_policy(request.policy, context, field="policy")
        async with self._lookups.turn():
            return pb.DeletePolicyResponse(uid=await self._engine.delete(request.policy, uid=request.uid))

    async def Exchange(  # type: ignore[override]  # noqa: N802  # answers through context.write
        self, request_iterator: object, context: Context
    ) -> None:
        """See the contract."""
        if self.open_streams >= self._limits.max_streams:
            raise _too_many_streams(self._limits.max_streams)
        exchange = Exchange(
            self._lookups,
            context,
            limits=self._limits,
            in_flight=self.in_flight,
            telemetry=self._telemetry,
        )
        self.open_streams += 1
        try:
            await exchange.serve(header_policy=_header_policy(context))
        finally:
            self.open_streams -= 1

    async def UpdateWeights(self, request: pb.UpdateWeightsRequest, context: Context) -> pb.UpdateWeightsResponse:  # noqa: N802
        """See the contract."""
        if request.trainer_id:
            check_trainer_id(request.trainer_id, field="trainer_id")
        elif request.step.sequence:
            raise invalid("INVALID_TRAINER_ID", "trainer_id", "is empty; a step with a sequence needs one")
        runner = await self._runner(request.policy, context)
        give_back = self.in_flight.take_now(request.policy, request.ByteSize())
        try:
            step = await convert_step(
                StepFields.of(request.step), trainer_id=request.trainer_id, runner=runner, limits=self._limits
            )
            answer = await runner.submit_now(replace(step, in_stream=False))
        finally:
            give_back()
        response = to_response(answer, runner=runner, trainer_id=request.trainer_id)
        return pb.UpdateWeightsResponse(step=response)

    async def ReadWeights(  # noqa: N802
        self, request: pb.ReadWeightsRequest, context: Context
    ) -> AsyncIterator[pb.ReadWeightsResponse]:
        """See the contract."""
        runner = await self._runner(request.policy, context)
        for piece in reading.pieces(request, runner.policy, limits=self._limits):
            # the mean over the rows of a trajectory reads all of them
            version, values = await runner.read(piece.read, long=runner.policy.rule.trajectory_rows > 0)
            yield pb.ReadWeightsResponse(offset=piece.offset, values=values, epoch=runner.epoch, version=version)

    async def SampleExamples(self, request: pb.SampleExamplesRequest, context: Context) -> pb.SampleExamplesResponse:  # noqa: N802
        """See the contract."""
        runner = await self._runner(request.policy, context)
        most = self._limits.max_batch_examples
        if not 1 <= request.count <= most:
            raise invalid("OUT_OF_RANGE_VALUE", "count", f"{request.count} is not in [1, {most}] (max_batch_examples)")
        seed = request.seed if request.HasField("seed") else secrets.randbits(63)

        async with runner.snapshot() as snapshot:
            ids = await runner.read_slices(
                draw(
                    snapshot,
                    request.count,
                    num_examples=runner.policy.spec.num_examples,
                    with_replacement=request.with_replacement,
                    seed=seed,
                )
            )
        return pb.SampleExamplesResponse(
            example_ids=ids.astype("<u8").tobytes(), epoch=runner.epoch, version=snapshot.header.version, seed=seed
        )

    async def WatchPolicy(  # noqa: N802
        self, request: pb.WatchPolicyRequest, context: Context
    ) -> AsyncIterator[pb.WatchPolicyResponse]:
        """See the contract."""
        runner = await self._runner(request.policy, context)
        interval_ms = max(request.min_interval_ms or DEFAULT_WATCH_INTERVAL_MS, MIN_WATCH_INTERVAL_MS)
        changed = asyncio.Event()
        runner.changed.add(changed)
        try:
            while runner.closed is None:
                changed.clear()
                yield pb.WatchPolicyResponse(status=specs.status_message(runner))
                await asyncio.sleep(interval_ms / 1000)
                await changed.wait()
            raise runner.closed
        finally:
            runner.changed.discard(changed)

    async def ExportPolicy(  # noqa: N802
        self, request: pb.ExportPolicyRequest, context: Context
    ) -> AsyncIterator[pb.ExportPolicyResponse]:
        """See the contract."""
        runner = await self._runner(request.policy, context)
        async with aclosing(transfer.export_messages(runner)) as messages:
            async for message in messages:
                yield message

    async def ImportPolicy(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ImportPolicyRequest], context: Context
    ) -> pb.ImportPolicyResponse:
        """See the contract."""
        arriving = transfer.Import(request_iterator, limits=self._limits)
        spec = await arriving.read_header(admit=lambda name: _check_policy(name, context, field="header.spec.name"))
        size = specs.num_weights(spec)
        await self._quotas.check(caller().tenant, num_examples=size)
        with self.imports.holding(arriving.num_bytes):
            imported = await arriving.read_columns()
            async with self._quotas.adding(caller().tenant, num_examples=size):
                await self._engine.check_tables(spec, imported.header, imported.pages())
                await self._engine.create_from(spec, imported.header, imported.pages())
        runner = await self._lookups.runner(spec.name, wait_s=_wait_s(context), wish=Wish.HERE)
        return pb.ImportPolicyResponse(status=specs.status_message(runner))

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:  # noqa: N802
        """See the contract."""
        return pb.GetServerInfoResponse(
            api_version="v1",
            build_version=self._limits.build_version,
            device=self._limits.device,
            max_batch_examples=self._limits.max_batch_examples,
            max_examples=self._limits.max_examples,
            max_message_bytes=self._limits.max_message_bytes,
            rules=names(),
        )

    async def _runner(self, policy: str, context: Context) -> PolicyRunner:
        _check_policy(policy, context, field="policy")
        return await self._lookups.runner(policy, wait_s=_wait_s(context))

    async def _sizes(self, prefix: str) -> list[int]:
        sizes: list[int] = []
        after = ""
        while page := await self._engine.list_policies(after=after, prefix=prefix, limit=MAX_PAGE_SIZE):
            sizes.extend(specs.num_weights(PolicySpec.from_json(stored.spec)) for stored in page)
            after = page[-1].name
        return sizes

    async def _check_fork(self, source: str, existing: PolicySpec) -> None:
        """Raises ServiceError (POLICY_EXISTS) when a policy cannot be the fork of `source` that is asked for again."""
        if not source:
            return
        caller().check_policy(source, field="from")
        try:
            origin = specs.spec_message(PolicySpec.from_json((await self._lookups.find(source)).spec))
        except ServiceError as error:
            if error.reason == "POLICY_NOT_FOUND":  # deleted since: the request is repeated, and there is its policy
                return
            raise
        specs.check_same(pb.PolicySpec(num_examples=origin.num_examples, rule=origin.rule), existing)

    async def _create(self, request: pb.CreatePolicyRequest, context: Context) -> tuple[Any, bool]:
        if not request.HasField("policy") or not getattr(request, "from"):
            spec = specs.resolve_spec(request.policy, limits=self._limits)
            async with self._quotas.adding(caller().tenant, num_examples=specs.num_weights(spec)):
                return await self._engine.create(spec, wish=wished.get())
        caller().check_scope(Scope.READ, what="CreatePolicy with `from`")
        caller().check_policy(getattr(request, "from"), field="from")
        source = await self._lookups.runner(getattr(request, "from"), wait_s=_wait_s(context))
        spec = specs.forked_spec(request.policy, source.policy.spec)
        adding = self._quotas.adding(caller().tenant, num_examples=specs.num_weights(spec))
        async with adding, source.snapshot() as snapshot:
            pages = source.pages(snapshot, version=0)
            return await self._engine.create_from(spec, snapshot.header, pages), True


def _wait_s(context: Context) -> float:
    """How long a call may wait for a policy that is being loaded: its answer has to come before its deadline."""
    remaining = context.time_remaining()
    return MAX_WAIT_S if remaining is None else min(MAX_WAIT_S, max(0.0, 0.9 * remaining - 0.2))


def _header_policy(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == POLICY_HEADER:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None


def _check_header(context: Context, policy: str) -> None:
    header = _header_policy(context)
    if header is not None and header != policy:
        raise invalid("POLICY_MISMATCH", "policy", f"{quoted(policy)}, but header {POLICY_HEADER} says {header!r}")


def _check_policy(policy: str, context: Context, *, field: str) -> None:
    """Raises ServiceError unless this is a policy's name, one of the caller's, and what the header says."""
    check_name(policy, field=field)
    caller().check_policy(policy, field=field)
    _check_header(context, policy)


def _too_many_streams(most: int) -> ServiceError:
    message = f"{most} streams are open, the server's limit max_streams"
    return ServiceError(Code.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", message, retry_after_s=1.0)
