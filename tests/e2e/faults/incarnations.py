"""What servers say of a policy that is deleted and created again and again: written down, and judged afterwards."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic, sleep

import grpc

from equipoise.v1 import policy_pb2 as pb
from tests.e2e.faults.calls import connected, reason

ASK_EVERY_S = 0.01
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A status that a server gave, or why it gave none.

    Attributes:
        asked_at: when it was asked (monotonic, seconds).
        uid: of the incarnation.
        epoch: of the policy.
        version: of the policy.
        reason: why there is no status.
    """

    asked_at: float
    uid: str = ""
    epoch: int = 0
    version: int = 0
    reason: str = ""


class Observer:
    """Asks one server for one policy's status, one call after another, in a thread. Use as a context manager."""

    def __init__(self, address: str, policy: str) -> None:
        self.seen: list[Sighting] = []
        self._address = address
        self._policy = policy
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"observer-{address}", daemon=True)

    @property
    def last(self) -> Sighting:
        """The newest sighting."""
        return self.seen[-1] if self.seen else Sighting(asked_at=0.0, reason="NOT_ASKED")

    def __enter__(self) -> "Observer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(2 * PATIENCE_S)
        assert not self._thread.is_alive(), "the observer hangs"

    def _run(self) -> None:
        request = pb.GetPolicyRequest(policy=self._policy)
        with connected(self._address) as stub:
            while not self._stopping.is_set():
                asked_at = monotonic()
                try:
                    status = stub.GetPolicy(request, timeout=PATIENCE_S).status
                except grpc.RpcError as failure:
                    self.seen.append(Sighting(asked_at=asked_at, reason=reason(failure)))
                else:
                    self.seen.append(
                        Sighting(asked_at=asked_at, uid=status.uid, epoch=status.epoch, version=status.version)
                    )
                sleep(ASK_EVERY_S)


def violations(seen: Sequence[Sighting], incarnations: Sequence[str]) -> Iterator[str]:
    """What does not fit in what one server said, in words; `incarnations`: uids in the order of their creation."""
    newest, reached = -1, (0, 0)
    for sighting in seen:
        if sighting.reason:
            continue
        if sighting.uid not in incarnations:
            yield f"{sighting}: nobody created this incarnation"
            continue
        incarnation, now = incarnations.index(sighting.uid), (sighting.epoch, sighting.version)
        if incarnation < newest:
            yield f"{sighting}: incarnation {incarnation} after {newest} had been seen"
        if now < reached:
            yield f"{sighting}: (epoch, version) went back from {reached}"
        newest, reached = max(newest, incarnation), max(reached, now)
