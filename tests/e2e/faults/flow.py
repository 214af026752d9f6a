"""A stream of steps by the generated stub alone: none is kept, sent again or answered behind a test's back."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import grpc
import numpy as np

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests.e2e.faults.calls import OWN_CONNECTION
from tests.e2e.faults.proxy import until

VARIANTS = 16
"""Different steps, sent in turn: the same one again and again would change little."""
FOREVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to a step.

    Attributes:
        at: when it came (monotonic, seconds).
        sequence: of the step.
        durable_sequence: what was durable then.
        epoch: of the policy.
        version: of the policy.
    """

    at: float
    sequence: int
    durable_sequence: int
    epoch: int
    version: int

    @property
    def is_durable(self) -> bool:
        """Whether the step was durable when it was answered."""
        return self.durable_sequence >= self.sequence


def steps_of(rows: int, *, low: int = 0, high: int, seed: int = 0) -> list[pb.StepRequest]:
    """Some steps over examples in [low, high), each at most once in a step; their answers carry no weights."""
    random = np.random.default_rng(seed)
    return [
        pb.StepRequest(
            example_ids=(low + random.choice(high - low, rows, replace=False)).astype("<u8").tobytes(),
            contributions=random.standard_normal(rows).astype("<f4").tobytes(),
            omit_weights=True,
        )
        for _ in range(VARIANTS)
    ]


class Flow:
    """One open stream. Use as a context manager: leaving it ends the stream in order, unless the server has ended it.

    Args:
        address: of the server.
        steps: what is sent, in turn; may be replaced.
        policy: it exists.
        trainer_id: of the stream.
        in_flight: most steps that wait for their answers.
    """

    def __init__(
        self,
        address: str,
        steps: Sequence[pb.StepRequest],
        *,
        policy: str = "p",
        trainer_id: str = "flow",
        in_flight: int = 32,
    ) -> None:
        self.steps = steps
        self.sent = 0
        self.opened: pb.OpenResponse | None = None
        self.replies: list[Reply] = []
        self.failure: grpc.RpcError | None = None
        """What ended the stream."""
        self._opening = pb.OpenRequest(policy=policy, trainer_id=trainer_id)
        self._in_flight = in_flight
        self._most = 0
        self._leaving = False
        self._changed = threading.Condition()
        self._channel = grpc.insecure_channel(address, options=OWN_CONNECTION)
        self._call: Any = PolicyServiceStub(self._channel).Exchange(self._messages())
        self._reader = threading.Thread(target=self._read, name=f"flow-{trainer_id}", daemon=True)
        self._reader.start()

    @property
    def has_ended(self) -> bool:
        """Whether the server has ended the stream."""
        return not self._reader.is_alive()

    def run(self) -> None:
        """Makes steps without end, until `pause`."""
        self._allow(FOREVER)

    def pause(self, *, within_s: float = 60.0) -> None:
        """Makes no more steps and waits until all that were made are answered."""
        with self._changed:
            self._most = self.sent
        self.wait(within_s=within_s)

    def make(self, count: int, *, within_s: float = 60.0) -> None:
        """Makes so many steps and waits for their answers."""
        self._allow(self.sent + count)
        self.wait(within_s=within_s)

    def wait(self, *, within_s: float = 60.0) -> None:
        """Waits until every step that may be made is answered."""
        until(
            lambda: self.has_ended or len(self.replies) == self._most,
            within_s=within_s,
            what=lambda: f"{self._most} answers; there are {len(self.replies)} to {self.sent} steps",
        )
        assert not self.has_ended, f"the stream ended: {self.failure}"

    def finish(self) -> None:
        """Ends the stream in order: what was sent is answered."""
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        self._reader.join(60)
        assert not self._reader.is_alive(), "the stream does not end"
        self._channel.close()

    def __enter__(self) -> "Flow":
        until(lambda: self.opened or self.has_ended, within_s=60, what="the stream opens")
        assert self.opened, f"the stream did not open: {self.failure}"
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._call.cancel()
        self.finish()

    def _allow(self, most: int) -> None:
        with self._changed:
            self._most = most
            self._changed.notify_all()

    def _messages(self) -> Iterator[pb.ExchangeRequest]:
        yield pb.ExchangeRequest(open=self._opening)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._leaving or self._may_send)
                if self._leaving:
                    return
                self.sent += 1
                step = self.steps[self.sent % len(self.steps)]
            message = pb.ExchangeRequest(step=step)
            message.step.sequence = self.sent
            yield message

    @property
    def _may_send(self) -> bool:
        return self.sent < self._most and self.sent - len(self.replies) < self._in_flight

    def _read(self) -> None:
        try:
            for message in self._call:
                self._take(message)
        except grpc.RpcError as failure:
            self.failure = failure
        finally:
            with self._changed:
                self._leaving = True
                self._changed.notify_all()

    def _take(self, message: pb.ExchangeResponse) -> None:
        if message.HasField("opened"):
            self.opened = message.opened
        elif message.HasField("step"):
            step = message.step
            assert step.outcome == pb.OUTCOME_APPLIED, step
            with self._changed:
                self.replies.append(Reply(monotonic(), step.sequence, step.durable_sequence, step.epoch, step.version))
                self._changed.notify_all()
        else:  # asked to go elsewhere: what was sent is still answered
            with self._changed:
                self._leaving = True
                self._changed.notify_all()
