"""What of a session goes into the trainer's checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from equipoise import wire
from equipoise.errors import InvalidRequestError
from equipoise.v1 import policy_pb2 as pb
from equipoise.view import PolicyView
from equipoise.window import Ticket, Window

FORMAT = 1


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
            message = pb.StepRequest.FromString(data)
            ids = wire.answer_ids(message, view.bounds.num_examples)
            request = wire.Request(message=message, answer_ids=ids, reads=False)
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
        for field, want in (("format", FORMAT), ("policy", policy)):
            if state.get(field) != want:
                raise InvalidRequestError(
                    field=f"state[{field!r}]", value=repr(state.get(field)), rule=f"must be {want!r}"
                )
        try:
            return cls(**state)
        except TypeError as error:
            raise InvalidRequestError(field="state", rule=f"must be what state_dict() gave ({error})") from error
