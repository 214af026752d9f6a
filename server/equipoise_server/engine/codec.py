"""Log entries: what a rule consumed, as named fields of a Redis stream entry.

Fields, all optional but `at` and `step`: `trainer` and `sequence`; `at` (seconds since 1970); `step` (training step);
`target`, `guard` (losses, nats); `scalars` and `evidence` (JSON); `row` (of a trajectory); `ids` (int64, absent: all
examples); `n` (int32, rows of each id, absent: one); `c`, `l` and `ref` (float32 contributions, losses and reference
losses, nats); `refused` (the reason). Numbers are text that keeps every bit; arrays are little-endian.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from equipoise_server.engine.step import Kind, Step
from equipoise_server.errors import Code, ServiceError
from equipoise_server.rules import Evidence, Scalars, Statistics

_ARRAYS = {"contributions": "c", "losses": "l", "reference_losses": "ref"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedStep:
    """A step as the log keeps it: enough to replay it page by page.

    Attributes:
        step: the step.
        scalars: what its row updates need beside the statistics.
        evidence: what it showed, which a page that is ahead of the step would not show again; None: not looked at.
        at: when it was applied, seconds since 1970.
    """

    step: Step
    scalars: Scalars
    evidence: Evidence | None
    at: float


def encode(logged: LoggedStep) -> dict[str, bytes]:
    """The fields of a log entry."""
    step = logged.step
    fields = {"at": repr(logged.at).encode(), "step": str(step.training_step).encode()}
    if step.sequence:
        fields |= {"trainer": step.trainer_id.encode(), "sequence": str(step.sequence).encode()}
    if step.kind is Kind.REFUSED:
        assert step.error is not None
        return fields | {"refused": step.error.reason.encode()}
    if step.target_loss is not None:
        fields["target"] = repr(step.target_loss).encode()
    if step.guard_loss is not None:
        fields["guard"] = repr(step.guard_loss).encode()
    if step.statistics is not None:
        fields |= _encode_statistics(step.statistics)
        fields["scalars"] = json.dumps(logged.scalars).encode()
    if logged.evidence is not None:
        fields["evidence"] = json.dumps(asdict(logged.evidence)).encode()
    return fields


def decode(fields: Mapping[str, bytes]) -> LoggedStep:
    """The step that a log entry keeps."""
    refused = fields.get("refused")
    step = Step(
        kind=Kind.STEP if refused is None else Kind.REFUSED,
        trainer_id=fields.get("trainer", b"").decode(),
        sequence=int(fields.get("sequence", b"0")),
        training_step=int(fields["step"]),
        statistics=_decode_statistics(fields),
        target_loss=float(fields["target"]) if "target" in fields else None,
        guard_loss=float(fields["guard"]) if "guard" in fields else None,
        wants_weights=False,
        error=None if refused is None else ServiceError(Code.INVALID_ARGUMENT, refused.decode(), "refused earlier"),
    )
    return LoggedStep(
        step=step,
        scalars=json.loads(fields["scalars"].decode()) if "scalars" in fields else {},
        evidence=Evidence(**json.loads(fields["evidence"].decode())) if "evidence" in fields else None,
        at=float(fields["at"]),
    )


def _encode_statistics(statistics: Statistics) -> dict[str, bytes]:
    fields = {}
    if statistics.ids is not None:
        fields["ids"] = statistics.ids.astype("<i8", copy=False).tobytes()
    for name, key in _ARRAYS.items():
        if (values := getattr(statistics, name)) is not None:
            fields[key] = values.astype("<f4", copy=False).tobytes()
    if statistics.trajectory_row is not None:
        fields["row"] = str(statistics.trajectory_row).encode()
    if statistics.counts is not None:
        fields["n"] = statistics.counts.astype("<i4").tobytes()
    return fields


def _decode_statistics(fields: Mapping[str, bytes]) -> Statistics | None:
    arrays = {name: np.frombuffer(fields[key], "<f4") for name, key in _ARRAYS.items() if key in fields}
    if not arrays:
        return None
    return Statistics(
        ids=np.frombuffer(fields["ids"], "<i8") if "ids" in fields else None,
        counts=np.frombuffer(fields["n"], "<i4").astype(np.int64) if "n" in fields else None,
        trajectory_row=int(fields["row"]) if "row" in fields else None,
        **arrays,
    )
