"""A session without a network: a model of the server, and a transport that does one thing at a time."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from equipoise import Backoff, Limits, PolicySpec, Timeout, errors
from equipoise.options import SessionOptions, WhenLost
from equipoise.session import Session
from equipoise.tickets import Ticket
from equipoise.v1 import policy_pb2 as pb

NUM_EXAMPLES = 8


def make_session(when_lost: WhenLost = "continue", *, max_staleness: int = 1000, **limits: int) -> Session:
    options = SessionOptions(
        spec=PolicySpec(name="p", num_examples=NUM_EXAMPLES),
        when_lost=when_lost,
        max_staleness=max_staleness,
        timeout=Timeout(),
        backoff=Backoff(),
        limits=Limits(**limits),
    )
    return Session(options, trainer_id="t", random=lambda: 0.5)


@dataclass
class Server:
    """What a server holds of one trainer: the training step of each applied step; the first `durable` are safe."""

    uid: str = "u1"
    epoch: int = 1
    applied: list[int] = field(default_factory=list)
    durable: int = 0
    max_message_bytes: int = 0

    def open(self) -> pb.ExchangeResponse:
        opened = pb.OpenResponse(
            uid=self.uid,
            epoch=self.epoch,
            version=len(self.applied),
            last_sequence=len(self.applied),
            durable_sequence=self.durable,
            num_examples=NUM_EXAMPLES,
            max_message_bytes=self.max_message_bytes,
        )
        return pb.ExchangeResponse(opened=opened)

    def answer(self, step: pb.StepRequest) -> pb.ExchangeResponse:
        assert step.sequence <= len(self.applied) + 1, "a gap"
        outcome = pb.OUTCOME_DUPLICATE if step.sequence else pb.OUTCOME_READ
        if step.sequence == len(self.applied) + 1:
            outcome = pb.OUTCOME_APPLIED
            self.applied.append(step.step)
        weights = np.full(len(step.example_ids) // 8, 1 + len(self.applied), "<f4")
        answer = pb.StepResponse(
            sequence=step.sequence,
            epoch=self.epoch,
            version=len(self.applied),
            durable_sequence=self.durable,
            outcome=outcome,
            weights=weights.tobytes(),
        )
        return pb.ExchangeResponse(step=answer)

    def crash(self) -> None:
        """What is not durable is gone; another owner takes over."""
        del self.applied[self.durable :]
        self.epoch += 1


class Conversation:
    """A session, a server and the wires between them."""

    def __init__(self, session: Session, server: Server | None = None) -> None:
        self.session = session
        self.server = server or Server()
        self.now = 0.0
        self.generation = 0
        self.sent: list[int] = []
        self.openings: list[tuple[str, int]] = []
        self.upstream: deque[pb.ExchangeRequest] = deque()
        self.downstream: deque[pb.ExchangeResponse] = deque()

    def step(self, number: int, *, waits: bool = True) -> Ticket:
        return self.session.step([number % NUM_EXAMPLES], {"losses": [1.0], "step": number}, now=self.now, waits=waits)

    def connect(self) -> bool:
        """Opens a stream if the session wants one (its backoff over)."""
        if self.session.connect_at is None:
            return False
        self.now = max(self.now, self.session.connect_at)
        self.generation = self.session.begin().generation
        self.sent = []
        return True

    def send(self) -> bool:
        """The session's next message leaves."""
        message = self.session.next_message(self.generation)
        if message is None:
            return False
        self.upstream.append(message)
        if message.WhichOneof("message") == "step" and message.step.sequence:
            assert not self.sent or message.step.sequence == self.sent[-1] + 1, "twice or out of order in one stream"
            self.sent.append(message.step.sequence)
        return True

    def serve(self) -> bool:
        """The server takes a message and answers it."""
        if not self.upstream:
            return False
        message = pb.ExchangeRequest.FromString(self.upstream.popleft().SerializeToString())
        is_opening = message.WhichOneof("message") == "open"
        if is_opening:
            self.openings.append((message.open.client_id, message.open.attempt))
        self.downstream.append(self.server.open() if is_opening else self.server.answer(message.step))
        return True

    def receive(self) -> bool:
        """An answer arrives."""
        if not self.downstream:
            return False
        self.session.received(self.downstream.popleft(), self.now)
        return True

    def cut(self, error: errors.EquipoiseError | None = None) -> None:
        """The stream ends, with all that is under way."""
        self.upstream.clear()
        self.downstream.clear()
        if not self.session.is_void(self.generation):
            self.session.ended(error or errors.UnavailableError("cut"), self.now)

    def settle(self) -> None:
        """Everything happens that can."""
        while any([self.connect(), self.send(), self.serve(), self.receive()]):
            pass
