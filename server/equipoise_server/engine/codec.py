"""Log entries: what a rule consumed, as named fields of a Redis stream entry.

Fields, all optional but `at` and `step`: `trainer` and `sequence`; `at` (seconds since 1970); `step` (training step);
`target`, `guard` (losses, nats); `scalars` and `evidence` (JSON); `s.NAME` (float64, the scalars `NAME.0`, `NAME.1`,
...); `row` (of a trajectory); `ids` (int64, absent: all examples); `n` (int32, rows of each id, absent: one); `g`
(uint32, groups); `won` and `tried` (uint64, successes of attempts); `c`, `l` and `ref` (float32 contributions, losses
and reference losses, nats); `refused` (the reason). Numbers are text that keeps every bit; arrays
are little-endian.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from equipoise_server.engine.step import Kind, Step
from equipoise_server.errors import Code, ServiceError
from equipoise_server.rules import Evidence, Scalars, Statistics
from equipoise_server.values import value

_FAMILY = "s."
_ARRAYS = {"contributions": "c", "losses": "l", "reference_losses": "ref", "target_losses": "tl"}
_INT64, _INT32, _UINT32, _UINT64, _FLOAT32, _FLOAT64 = (
    np.dtype(name) for name in ("<i8", "<i4", "<u4", "<u8", "<f4", "<f8")
)
_COUNTS = {"successes": "won", "attempts": "tried"}


@value
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
        fields["trainer"] = step.trainer_id.encode()
        fields["sequence"] = str(step.sequence).encode()
    if step.kind is Kind.REFUSED:
        assert step.error is not None
        return fields | {"refused": step.error.reason.encode()}
    if step.target_loss is not None:
        fields["target"] = repr(step.target_loss).encode()
    if step.guard_loss is not None:
        fields["guard"] = repr(step.guard_loss).encode()
    if step.statistics is not None:
        fields |= _encode_statistics(step.statistics)
        fields |= _encode_scalars(logged.scalars)
    if logged.evidence is not None:
        fields["evidence"] = _encode_evidence(logged.evidence)
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
        scalars=_decode_scalars(fields),
        evidence=Evidence(**json.loads(fields["evidence"].decode())) if "evidence" in fields else None,
        at=float(fields["at"]),
    )


def _encode_evidence(evidence: Evidence) -> bytes:
    named = {"sim": evidence.sim, "positive_share": evidence.positive_share, "largest_weight": evidence.largest_weight}
    return json.dumps(named).encode()


def _encode_scalars(scalars: Scalars) -> dict[str, bytes]:
    """Scalars with numbers in their names come together, in the order of these, as arrays: a third of the bytes."""
    single, families = _layout(tuple(scalars))
    fields = {"scalars": json.dumps({name: scalars[name] for name in single}).encode()}
    for family, names in families.items():
        fields[family] = np.array([scalars[name] for name in names], _FLOAT64).tobytes()
    return fields


@lru_cache(maxsize=64)
def _layout(names: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """Which scalars stand alone, and those of each field that is an array: a rule has the same ones in every step."""
    single: list[str] = []
    families: dict[str, list[str]] = {}
    for name in names:
        family, _, index = name.rpartition(".")
        field = _FAMILY + family
        if family and index == str(len(families.get(field, ()))):
            families.setdefault(field, []).append(name)
        else:
            single.append(name)
    return single, families


def _decode_scalars(fields: Mapping[str, bytes]) -> Scalars:
    scalars: Scalars = json.loads(fields["scalars"].decode()) if "scalars" in fields else {}
    for field, data in fields.items():
        if field.startswith(_FAMILY):
            name = field.removeprefix(_FAMILY)
            scalars |= {f"{name}.{index}": value for index, value in enumerate(np.frombuffer(data, _FLOAT64).tolist())}
    return scalars


def _encode_statistics(statistics: Statistics) -> dict[str, bytes]:
    fields = {}
    if statistics.ids is not None:
        fields["ids"] = statistics.ids.astype(_INT64, copy=False).tobytes()
    for name, key in _ARRAYS.items():
        if (values := getattr(statistics, name)) is not None:
            fields[key] = values.astype(_FLOAT32, copy=False).tobytes()
    if statistics.trajectory_row is not None:
        fields["row"] = str(statistics.trajectory_row).encode()
    if statistics.counts is not None:
        fields["n"] = statistics.counts.astype(_INT32).tobytes()
    if statistics.groups is not None:
        fields["g"] = statistics.groups.astype(_UINT32).tobytes()
    if statistics.target_groups is not None:
        fields["tg"] = statistics.target_groups.astype(_UINT32).tobytes()
    for name, key in _COUNTS.items():
        if (values := getattr(statistics, name)) is not None:
            fields[key] = values.astype(_UINT64).tobytes()
    return fields


def _decode_statistics(fields: Mapping[str, bytes]) -> Statistics | None:
    arrays: dict[str, Any] = {
        name: np.frombuffer(fields[key], _FLOAT32) for name, key in _ARRAYS.items() if key in fields
    }
    told = {name: fields[key] for name, key in _COUNTS.items() if key in fields}
    arrays |= {name: np.frombuffer(data, _UINT64).astype(np.int64) for name, data in told.items()}
    if not arrays:
        return None
    return Statistics(
        ids=np.frombuffer(fields["ids"], _INT64) if "ids" in fields else None,
        counts=np.frombuffer(fields["n"], _INT32).astype(np.int64) if "n" in fields else None,
        groups=np.frombuffer(fields["g"], _UINT32).astype(np.int64) if "g" in fields else None,
        target_groups=np.frombuffer(fields["tg"], _UINT32).astype(np.int64) if "tg" in fields else None,
        trajectory_row=int(fields["row"]) if "row" in fields else None,
        **arrays,
    )
