"""What a trainer remembers: reconciled with what the server holds of it, and saved in the trainer's checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from equipoise import wire
from equipoise.errors import InvalidRequestError, require
from equipoise.results import Stats
from equipoise.tickets import Ticket, Window
from equipoise.v1 import policy_pb2 as pb
from equipoise.view import PolicyView

FORMAT = 1
"""Version of the layout of a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a trainer remembers.

    Attributes:
        policy: name of the policy, for messages.
        view: what is known of it.
        window: steps that are not durable.
        stats: counters.
        complain: told of what does not go together, and when, before anything of the window is let go.
    """

    policy: str
    view: PolicyView
    window: Window
    stats: Stats
    complain: Callable[[str, float], None]

    def reconcile(self, opened: pb.OpenResponse, *, last_sequence: int, was_lost: bool, now: float) -> None:
        """Numbers the window so that it follows what the server holds.

        Args:
            opened: the server's answer to an opening.
            last_sequence: of the trainer's newest step, as it remembers.
            was_lost: whether the policy is known to have been lost, so that this one is another.
            now: seconds.
        """
        view, window, last = self.view, self.window, opened.last_sequence
        if view.uid != opened.uid:
            if view.uid or was_lost:
                self.stats.lost += view.durable_sequence
                self.complain(f"{self.policy} is another incarnation of the policy now", now)
            view.become(opened.uid)
            window.renumber(last)
        elif last > last_sequence:
            text = f"{self.policy} is {last - last_sequence} steps ahead of what this trainer remembers"
            self.complain(f"{text}: to resume an old checkpoint, fork or import a policy", now)
            self.stats.unacked -= window.drop(through=last_sequence)
            window.renumber(last)
        elif last + 1 < window.first_sequence:
            missing = window.first_sequence - 1 - last
            self.stats.lost += missing
            self.complain(f"{self.policy} has lost {missing} steps of this trainer that it had acknowledged", now)
            window.renumber(last)
        self.observe(opened.epoch, opened.version, now)

    def observe(self, epoch: int, version: int, now: float) -> None:
        """Holds the server to its promise that (epoch, version) never goes back."""
        seen = self.view.seen
        if not self.view.observe(epoch, version):
            self.stats.regressions += 1
            self.complain(f"{self.policy} went back from (epoch, version) {seen} to {(epoch, version)}", now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """State of a session.

    Attributes:
        format: version of this layout.
        policy: name of the policy.
        num_examples: N; 0: not known.
        uid: its incarnation; empty: never connected.
        trainer_id: id of the trainer.
        sequence: sequence of the newest step.
        durable_sequence: all steps up to it are in the server's store.
        epoch: newest epoch seen.
        version: newest version seen.
        window: the steps not known to be durable, serialised, the newest last.
    """

    format: int = FORMAT
    policy: str
    num_examples: int
    uid: str
    trainer_id: str
    sequence: int
    durable_sequence: int
    epoch: int
    version: int
    window: list[bytes]

    @classmethod
    def of(cls, view: PolicyView, window: Window, *, policy: str, trainer_id: str) -> "Checkpoint":
        """What a session holds now."""
        epoch, version = view.seen
        return cls(
            policy=policy,
            num_examples=view.bounds.num_examples,
            uid=view.uid,
            trainer_id=trainer_id,
            sequence=window.last_sequence,
            durable_sequence=view.durable_sequence,
            epoch=epoch,
            version=version,
            window=[ticket.request.message.SerializeToString() for ticket in window],
        )

    def restore(self, view: PolicyView, window: Window) -> None:
        """Puts it into what a new session holds."""
        view.uid = self.uid
        view.seen = (self.epoch, self.version)
        view.durable_sequence = self.durable_sequence
        view.resize(self.num_examples or view.bounds.num_examples)
        window.renumber(self.sequence - len(self.window))
        for data in self.window:
            exchange = pb.ExchangeRequest(step=pb.StepRequest.FromString(data))
            ids = wire.answer_ids(exchange.step, view.bounds.num_examples)
            request = wire.Request(exchange=exchange, answer_ids=ids, reads=False)
            window.add(Ticket(request=request, made=0, since=0.0, deadline=0.0, waits=False))

    def to_dict(self) -> dict[str, Any]:
        """Strings, integers and bytes, for any way of saving."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], *, policy: str) -> "Checkpoint":
        """Reads what `to_dict` gave.

        Raises:
            InvalidRequestError: it is something else, or of another policy.
        """
        require(isinstance(state, Mapping), field="state", value=state, rule="must be what state_dict() gave")
        for field, want in (("format", FORMAT), ("policy", policy)):
            if state.get(field) != want:
                raise InvalidRequestError(
                    field=f"state[{field!r}]", value=repr(state.get(field)), rule=f"must be {want!r}"
                )
        try:
            return cls(**state)
        except TypeError as error:
            raise InvalidRequestError(field="state", rule=f"must be what state_dict() gave ({error})") from error
