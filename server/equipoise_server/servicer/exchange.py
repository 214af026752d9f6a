"""The training loop's stream: requests in, answers out in the same order, many in flight."""

import asyncio
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import grpc

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import Answer, PolicyRunner, Session, Step, Telemetry
from equipoise_server.errors import Code, ServiceError, invalid, quoted
from equipoise_server.interceptors import whole
from equipoise_server.patience import Patience
from equipoise_server.security import caller
from equipoise_server.servicer.convert import (
    check_trainer_id,
    convert_step,
    to_opener,
    to_refused,
    to_response,
)
from equipoise_server.servicer.fields import StepFields
from equipoise_server.servicer.in_flight import InFlightBytes
from equipoise_server.servicer.limits import ServiceLimits
from equipoise_server.servicer.lookups import Lookups

MAX_IN_FLIGHT = 1024
"""Answers that may wait in one stream before it is read no further."""
MAX_UNREAD_BYTES = 2 << 20
"""Weights of such answers, bytes: a client that does not read must not fill the memory. One answer always fits."""
RECONNECT_WITHIN_MS = 1000
LAST_ANSWERS_S = 1.0
"""How long a stream that has to end may go on sending the answers that are there."""


@dataclass(slots=True, eq=False)
class InFlight:
    """A request under way: when (loop time, seconds) it came, its weights' bytes, and what came of it, once it has."""

    since: float
    size: int
    result: Answer | Exception | None = None


Outgoing: TypeAlias = InFlight | ServiceError | pb.ReconnectRequest | None


class Context(Protocol):
    """What this module needs of `grpc.aio.ServicerContext`."""

    async def read(self) -> Any:
        """Next message, a `Received`, or `grpc.aio.EOF`."""
        ...

    def write(self, message: pb.ExchangeResponse) -> Coroutine[Any, Any, None]:
        """Sends a message."""
        ...


class Exchange:
    """One stream, from its opening to its end."""

    def __init__(
        self,
        lookups: Lookups,
        context: Context,
        *,
        limits: ServiceLimits,
        in_flight: InFlightBytes,
        telemetry: Telemetry,
    ) -> None:
        self._lookups = lookups
        self._context = context
        self._limits = limits
        self._in_flight = in_flight
        self._telemetry = telemetry
        self._outgoing: deque[Outgoing] = deque()
        self._ready = asyncio.Event()
        """Set when the first of them may go out."""
        self._patience = Patience(limits.write_timeout_s)
        self._unread = 0
        self._written = asyncio.Event()

    async def serve(self, *, header_policy: str | None) -> None:
        """Serves the stream. Raises ServiceError for what ends it before its client does."""
        opening = await self._read_opening()
        if opening is None:
            return
        caller().check_policy(opening.policy, field="open.policy")
        if header_policy is not None and header_policy != opening.policy:
            description = f"{quoted(opening.policy)}, but header x-equipoise-policy says {header_policy!r}"
            raise invalid("POLICY_MISMATCH", "open.policy", description)
        opener = to_opener(opening)
        runner = await self._lookups.runner(opening.policy, uid=opening.uid)
        session, answer = await runner.open(opening.trainer_id, opener)
        try:
            opened = _opened(runner, answer, opening.trainer_id, self._limits)
            await whole(self._context.write(pb.ExchangeResponse(opened=opened)))
            await self._serve(runner, session)
        finally:
            runner.close_session(session)

    async def _serve(self, runner: PolicyRunner, session: Session) -> None:
        reader = asyncio.create_task(self._read(runner, session.trainer_id))
        writer = asyncio.create_task(self._write(runner, session.trainer_id))
        session.when_draining(self._ask_to_reconnect)
        try:
            ends: set[asyncio.Future[Any]] = {reader, writer, session.ended}
            while not writer.done():
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if reader in ends and reader.done():
                    reader.result()  # a bug; what is wrong with a request is told by the writer, in its turn
                    ends.discard(reader)
                if session.ended.done():
                    await self._finish(reader, writer, session.ended.result())
                    break
            if writer.done():
                await writer
            else:
                raise session.ended.result()
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _finish(self, reader: asyncio.Task[None], writer: asyncio.Task[None], error: ServiceError) -> None:
        """Sends the answers that are there, and the error behind them; a client that does not read misses them."""
        reader.cancel()
        await asyncio.wait([reader])
        self._put(error)
        await asyncio.wait([writer], timeout=LAST_ANSWERS_S)

    async def _read_opening(self) -> pb.OpenRequest | None:
        try:
            async with asyncio.timeout(self._limits.first_message_timeout_s):
                message = await self._context.read()
        except TimeoutError:
            description = f"no opening message within {self._limits.first_message_timeout_s} s"
            raise ServiceError(Code.DEADLINE_EXCEEDED, "NOT_OPENED", description) from None
        if message is grpc.aio.EOF:
            return None
        request: pb.ExchangeRequest = await message.message()
        if request.WhichOneof("message") != "open":
            raise invalid("NOT_OPENED", "message", "the first message of a stream must be `open`")
        check_trainer_id(request.open.trainer_id, field="open.trainer_id")
        return request.open

    async def _read(self, runner: PolicyRunner, trainer_id: str) -> None:
        """Queues every request; what ends the stream is answered behind all that came before it."""
        try:
            while (received := await self._context.read()) is not grpc.aio.EOF:
                num_bytes = received.num_bytes
                request = _step_fields(await received.message())
                del received  # up to 16 MiB, and the next may not come for long; the same below
                await self._queue(request, num_bytes, runner, trainer_id)
                del request
        except ServiceError as error:
            self._put(error)
        else:
            self._put(None)

    async def _queue(self, request: StepFields, num_bytes: int, runner: PolicyRunner, trainer_id: str) -> None:
        loop = asyncio.get_running_loop()
        since = loop.time()
        size = request.answer_bytes(num_examples=runner.policy.spec.num_examples)
        await self._room_for(size)
        give_back = await self._in_flight.take(runner.spec_name, num_bytes)
        under_way = InFlight(since, size)

        def told(result: Answer | Exception) -> None:
            give_back()
            under_way.result = result
            if self._outgoing and self._outgoing[0] is under_way:
                self._ready.set()

        try:
            step = await self._to_step(request, runner, trainer_id)
            self._telemetry.stage(method="Exchange", stage="decode", seconds=loop.time() - since)
            await runner.give(step, told)
        except BaseException:
            give_back()
            raise
        self._outgoing.append(under_way)

    def _put(self, outgoing: ServiceError | pb.ReconnectRequest | None) -> None:
        self._outgoing.append(outgoing)
        self._ready.set()

    async def _next(self) -> Outgoing:
        """What goes out next, once it may."""
        while not self._outgoing or _is_open(self._outgoing[0]):
            self._ready.clear()
            await self._ready.wait()
        return self._outgoing.popleft()

    async def _room_for(self, size: int) -> None:
        while len(self._outgoing) >= MAX_IN_FLIGHT or (self._unread and self._unread + size > MAX_UNREAD_BYTES):
            self._written.clear()
            await self._written.wait()
        self._unread += size

    async def _to_step(self, request: StepFields, runner: PolicyRunner, trainer_id: str) -> Step:
        try:
            step = await convert_step(request, trainer_id=trainer_id, runner=runner, limits=self._limits)
        except ServiceError as error:
            if error.code is not Code.INVALID_ARGUMENT:
                raise  # nothing is wrong with the step: it keeps its sequence, and is sent again
            step = to_refused(request, error, trainer_id=trainer_id)
        if request.is_step and not request.sequence:
            raise invalid("MALFORMED_REQUEST", "step.sequence", "0 on a step; in a stream steps are numbered from 1")
        return step

    async def _write(self, runner: PolicyRunner, trainer_id: str) -> None:
        loop = asyncio.get_running_loop()
        while (outgoing := await self._next()) is not None:
            if isinstance(outgoing, ServiceError):
                raise outgoing
            if isinstance(outgoing, pb.ReconnectRequest):
                await self._context.write(pb.ExchangeResponse(reconnect=outgoing))
                continue
            answer = outgoing.result
            if isinstance(answer, Exception):
                raise answer
            assert answer is not None
            started = loop.time()
            response = to_response(answer, runner=runner, trainer_id=trainer_id)
            await self._send(pb.ExchangeResponse(step=response))
            self._unread -= outgoing.size
            self._written.set()
            now = loop.time()
            self._telemetry.stage(method="Exchange", stage="encode", seconds=now - started)
            self._telemetry.stage(method="Exchange", stage="total", seconds=now - outgoing.since)

    async def _send(self, response: pb.ExchangeResponse) -> None:
        """Who reads nothing for so long has gone, or holds what he is not to hold."""
        try:
            with self._patience:
                await self._context.write(response)
        except TimeoutError:
            description = f"no answer was read for {self._limits.write_timeout_s:g} s (write_timeout_s)"
            raise ServiceError(Code.DEADLINE_EXCEEDED, "NOT_READ", description) from None

    def _ask_to_reconnect(self) -> None:
        if len(self._outgoing) < MAX_IN_FLIGHT:  # a stream this far behind learns of the end by its status
            self._put(pb.ReconnectRequest(within_ms=RECONNECT_WITHIN_MS))


def _is_open(outgoing: Outgoing) -> bool:
    return isinstance(outgoing, InFlight) and outgoing.result is None


def _step_fields(message: pb.ExchangeRequest) -> StepFields:
    if message.WhichOneof("message") != "step":
        raise invalid("MALFORMED_REQUEST", "message", "after the opening, every message must be `step`")
    return StepFields.of(message.step)


def _opened(runner: PolicyRunner, answer: Answer, trainer_id: str, limits: ServiceLimits) -> pb.OpenResponse:
    return pb.OpenResponse(
        uid=runner.policy.uid,
        epoch=runner.epoch,
        version=answer.version,
        last_sequence=answer.last_sequence,
        durable_sequence=runner.durable_sequence(trainer_id),
        num_examples=runner.policy.spec.num_examples,
        max_batch_examples=limits.max_batch_examples,
        max_message_bytes=limits.max_message_bytes,
    )
