"""Arrays to and from the wire: little-endian bytes, checked before they are sent."""

from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.channel import MAX_MESSAGE_BYTES
from equipoise.errors import InvalidRequestError
from equipoise.v1 import policy_pb2 as pb

FRAME_BYTES = 4096
"""Room that a message leaves for its framing and the fields around the arrays, bytes."""

MAX_EXAMPLES = 1 << 63
"""Ids are below it, whatever the policy."""

FLOAT32 = np.dtype("<f4")

ROW_STATISTICS = ("contributions", "losses", "reference_losses")
"""Fields of a step with one float per row."""
OUTCOMES = ("successes", "attempts")
"""Fields of a step with one count per row."""
PER_ROW = (*ROW_STATISTICS, *OUTCOMES, "gradient_sketches")
STATISTICS = (*ROW_STATISTICS, "successes", "gradient_sketches", "target_loss", "guard_loss")
"""Fields that make a request a step."""


class StepFields(TypedDict, total=False):
    """What a step may carry beside the ids of its rows. B is the number of rows.

    Arrays may be anything that NumPy takes: lists, arrays, CPU tensors without gradient.

    Attributes:
        contributions: float [B], finite where scored: ∇L_target·∇l_n, the inner product of the target gradient with the
            gradient of the row's unweighted loss.
        losses: float [B], finite where scored: the unweighted loss of each row, nats.
        reference_losses: float [B], finite where scored: the loss of each row under a reference model, nats; for
            rules `rho` and `excess_loss`.
        gradient_sketches: float16 or float32 [B, k], finite where scored: instead of contributions, a sketch of each
            row's gradient, such as a random projection. The server multiplies it with `target_sketch`. Other types are
            sent as float32.
        target_sketch: float [k]: the same sketch of the target gradient ∇L_target.
        scored: bool or 0/1 [B]. The statistics of a row that is not scored are ignored, and may be NaN. Default: all
            rows are scored.
        measured: bool or 0/1 [B]: which rows have a contribution, for trainers that measure it for some rows alone.
            The others' are ignored, and may be NaN; their losses count. Default: all rows that are scored. A rule that
            needs contributions ignores the rows without.
        groups: integers [B] in [0, 2^32): the group of each row's example, such as its label or source, for rule
            `strata`; below the policy's setting `groups`.
        successes: integers [B], where scored at most `attempts`: how many attempts at each row's example succeeded, for
            rule `learnability`.
        attempts: integers [B] in [0, 2^32), where scored at least 1: how many there were, such as the completions of a
            prompt; rows of one id add up.
        target_losses: float [A], finite: the unweighted losses of single examples of the target set A under the model
            of this step, nats, for rule `strata`, which compares them with `losses`.
        target_groups: integers [A] in [0, 2^32): their groups; without, every group is compared with all of them.
        target_loss: mean loss on the target set A, nats.
        guard_loss: mean loss on the guard set B, nats.
        step: the number of the training step, in [0, 2^64), for people to read. For rule `trajectory` it is the row
            that the contributions move.
        weights_for: integers [M] in [0, N): the answer holds the weights of these ids instead of those of the rows.
        all_examples: the rows are all N examples in order; give no ids then.
        omit_weights: the answer holds no weights, for trainers that only report.
    """

    contributions: ArrayLike
    losses: ArrayLike
    reference_losses: ArrayLike
    gradient_sketches: ArrayLike
    target_sketch: ArrayLike
    scored: ArrayLike
    measured: ArrayLike
    groups: ArrayLike
    successes: ArrayLike
    attempts: ArrayLike
    target_losses: ArrayLike
    target_groups: ArrayLike
    target_loss: float
    guard_loss: float
    step: int
    weights_for: ArrayLike
    all_examples: bool
    omit_weights: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a request must keep to, as far as it is known yet.

    Attributes:
        num_examples: ids are below it; 0: not known.
        max_batch_examples: most rows; 0: not known.
        max_message_bytes: largest message.
    """

    num_examples: int = 0
    max_batch_examples: int = 0
    max_message_bytes: int = MAX_MESSAGE_BYTES


@dataclass(slots=True, kw_only=True)
class Request:
    """A checked step or read.

    Attributes:
        exchange: what is sent, without its sequence.
        answer_ids: uint64: the examples whose weights the answer holds.
        reads: whether it carries no statistics.
        of_row: whether it asks for a row of a trajectory, which says nothing about the weights of other rows.
        size: bytes of what is sent, without its sequence.
    """

    exchange: pb.ExchangeRequest
    answer_ids: NDArray[np.uint64]
    reads: bool
    of_row: bool = False
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = self.exchange.ByteSize()

    @property
    def message(self) -> pb.StepRequest:
        """The step in what is sent."""
        return self.exchange.step


def build_step(ids: ArrayLike | None, fields: StepFields, bounds: Bounds) -> Request:
    """A step with statistics.

    Raises:
        InvalidRequestError: something breaks a rule; nothing was sent.
    """
    _check_names(fields)
    exchange = pb.ExchangeRequest(step=pb.StepRequest(step=_training_step(fields.get("step", 0))))
    message = exchange.step
    rows = _rows(message, ids, fields, bounds)
    scored = _mask("scored", fields.get("scored"), len(rows))
    if scored is not None:
        message.scored = scored.tobytes()
    measured = _measured(fields, len(rows))
    if measured is not None:
        message.measured = measured.tobytes()
        measured = measured if scored is None else measured & scored
    else:
        measured = scored
    for name in ROW_STATISTICS:
        if (values := fields.get(name)) is not None:
            there = measured if name == "contributions" else scored
            setattr(message, name, _row_statistic(name, values, len(rows), there).tobytes())
    _sketches(message, fields, len(rows), measured)
    if (groups := fields.get("groups")) is not None:
        message.groups = _counts("groups", groups, len(rows)).tobytes()
    _outcomes(message, fields, len(rows), scored)
    _target(message, fields, len(rows), bounds)
    if (target_loss := fields.get("target_loss")) is not None:
        message.target_loss = _loss("target_loss", target_loss)
    if (guard_loss := fields.get("guard_loss")) is not None:
        message.guard_loss = _loss("guard_loss", guard_loss)
    if all(fields.get(name) is None for name in STATISTICS):
        raise InvalidRequestError(
            field="contributions", rule=f"a step needs one of {', '.join(STATISTICS)}; `read` needs none"
        )
    weights_for = fields.get("weights_for")
    if weights_for is not None:
        rows = example_ids("weights_for", weights_for, bounds)
        message.weights_for = rows.tobytes()
    if fields.get("omit_weights", False):
        message.omit_weights = True
        rows = np.zeros(0, np.uint64)
    return _sized(Request(exchange=exchange, answer_ids=rows, reads=False), bounds)


def build_read(ids: ArrayLike | None, bounds: Bounds, *, step: int | None = None) -> Request:
    """A read of the weights of ids, None: of all examples; with a step, in that row of a trajectory.

    Raises:
        InvalidRequestError: the ids break a rule; nothing was sent.
    """
    exchange = pb.ExchangeRequest(step=pb.StepRequest(step=0 if step is None else _training_step(step)))
    message = exchange.step
    if ids is not None:
        rows = example_ids("ids", ids, bounds)
        message.example_ids = rows.tobytes()
    elif bounds.num_examples:
        _check_rows("ids", bounds.num_examples, bounds)
        rows = np.arange(bounds.num_examples, dtype=np.uint64)
        message.all_examples = True
    else:
        raise InvalidRequestError(field="ids", rule="must be given, or num_examples to the client, before it connects")
    return _sized(Request(exchange=exchange, answer_ids=rows, reads=True, of_row=step is not None), bounds)


def example_ids(field: str, values: ArrayLike, bounds: Bounds) -> NDArray[np.uint64]:
    """Example ids as little-endian uint64 [B], checked against what is known of the policy."""
    array = _array(field, values)
    if array.size == 0:
        raise InvalidRequestError(field=field, rule="must hold at least one id")
    if array.dtype.kind not in "iu":
        rule = "ids must be integers in [0, 2^63)"
        if array.dtype.kind in "USOT":
            rule += "; `equipoise.ExampleKeys` gives ids to names"
        raise InvalidRequestError(field=field, value=f"{array.dtype} values", rule=rule)
    _check_rows(field, len(array), bounds)
    ids = array.astype("<u8")
    if ids.max() >= (bounds.num_examples or MAX_EXAMPLES):  # what was negative is 2^63 and more
        signed = ids.view("<i8")
        _check_all(field, signed, signed >= 0, "ids must not be negative, or 2^63 and more")
        _check_all(field, ids, ids < bounds.num_examples, f"ids must be below num_examples = {bounds.num_examples}")
    return ids


def oversize(request: Request, bounds: Bounds) -> InvalidRequestError | None:
    """What is wrong with a message that is too large; None: it is not."""
    if request.size <= bounds.max_message_bytes - FRAME_BYTES:
        return None
    rule = f"a message holds at most {bounds.max_message_bytes} bytes (max_message_bytes of the server)"
    return InvalidRequestError(
        field="ids", value=f"a message of {request.size} bytes", rule=f"{rule}; send fewer rows at once"
    )


def float32s(data: bytes) -> NDArray[np.float32]:
    """float32 values of little-endian bytes; an array of its own, as torch.from_numpy wants it."""
    return np.frombuffer(data, "<f4").astype(np.float32)


def uint64s(data: bytes) -> NDArray[np.uint64]:
    """uint64 values of little-endian bytes; an array of its own."""
    return np.frombuffer(data, "<u8").astype(np.uint64)


def answer_ids(message: pb.StepRequest, num_examples: int) -> NDArray[np.uint64]:
    """Ids whose weights the answer to a step holds."""
    if message.omit_weights:
        return np.zeros(0, np.uint64)
    if message.HasField("weights_for"):
        return uint64s(message.weights_for)
    return np.arange(num_examples, dtype=np.uint64) if message.all_examples else uint64s(message.example_ids)


def _rows(message: pb.StepRequest, ids: ArrayLike | None, fields: StepFields, bounds: Bounds) -> NDArray[np.uint64]:
    everything = fields.get("all_examples", False)
    if everything and ids is not None:
        raise InvalidRequestError(field="ids", rule="give ids or all_examples=True, not both")
    if ids is not None:
        rows = example_ids("ids", ids, bounds)
        message.example_ids = rows.tobytes()
        return rows
    if everything:
        message.all_examples = True
        count = bounds.num_examples or max(_length(fields.get(name)) for name in PER_ROW)
        _check_rows("all_examples", count, bounds)
        return np.arange(count, dtype=np.uint64)
    for name in (*PER_ROW, "scored", "measured", "groups"):
        if fields.get(name) is not None:
            raise InvalidRequestError(field="ids", rule=f"{name} need the ids of their rows, or all_examples=True")
    return np.zeros(0, np.uint64)


def _target(message: pb.StepRequest, fields: StepFields, rows: int, bounds: Bounds) -> None:
    """Losses of single target examples, and their groups."""
    losses, groups = fields.get("target_losses"), fields.get("target_groups")
    if losses is None:
        if groups is not None:
            raise InvalidRequestError(field="target_groups", rule="needs target_losses")
        return
    if not rows or fields.get("losses") is None:
        raise InvalidRequestError(field="target_losses", rule="needs losses of the rows, to be compared with")
    count = _length(losses)
    _check_rows("target_losses", count, bounds)
    message.target_losses = _row_statistic("target_losses", losses, count, None).tobytes()
    if groups is not None:
        message.target_groups = _counts("target_groups", groups, count).tobytes()


def _mask(field: str, values: ArrayLike | None, rows: int) -> NDArray[np.uint8] | None:
    if values is None:
        return None
    array = _array(field, values)
    _check_length(field, len(array), rows)
    if array.dtype.kind not in "biu":
        raise InvalidRequestError(field=field, value=array.dtype, rule="must be booleans, or integers 0 and 1")
    _check_all(field, array, (array == 0) | (array == 1), "must be 0 or 1")
    return array.astype(np.uint8)


def _measured(fields: StepFields, rows: int) -> NDArray[np.uint8] | None:
    mask = _mask("measured", fields.get("measured"), rows)
    if mask is not None and fields.get("contributions") is None and fields.get("gradient_sketches") is None:
        raise InvalidRequestError(field="measured", rule="needs contributions or gradient_sketches")
    return mask


def _counts(field: str, values: ArrayLike, rows: int) -> NDArray[np.uint32]:
    array = _array(field, values)
    _check_length(field, len(array), rows)
    if array.dtype.kind not in "iu":
        raise InvalidRequestError(field=field, value=array.dtype, rule="must be integers in [0, 2^32)")
    _check_all(field, array, (array >= 0) & (array < 2**32), "must be in [0, 2^32)")
    return array.astype("<u4")


def _outcomes(message: pb.StepRequest, fields: StepFields, rows: int, scored: NDArray[np.uint8] | None) -> None:
    successes, attempts = fields.get("successes"), fields.get("attempts")
    if successes is None and attempts is None:
        return
    if successes is None or attempts is None:
        missing = "successes" if successes is None else "attempts"
        raise InvalidRequestError(field=missing, rule="must be given: successes and attempts go together")
    won, tried = _counts("successes", successes, rows), _counts("attempts", attempts, rows)
    free = np.zeros(rows, np.bool_) if scored is None else scored == 0
    _check_all("attempts", tried, free | (tried > 0), "must be at least 1 where scored")
    _check_all("successes", won, free | (won <= tried), "must be at most the row's attempts")
    message.successes, message.attempts = won.tobytes(), tried.tobytes()


def _length(values: Any) -> int:
    return 0 if values is None else int(np.shape(values)[0]) if np.ndim(values) else 1


def _row_statistic(field: str, values: Any, rows: int, scored: NDArray[np.uint8] | None) -> NDArray[np.float32]:
    array = _array(field, values)
    _check_length(field, len(array), rows)
    if array.dtype.kind not in "fiu":
        raise InvalidRequestError(field=field, value=array.dtype, rule="must be real numbers")
    if array.dtype == FLOAT32:
        single = array
    else:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            single = array.astype(FLOAT32)
    fine = np.isfinite(single)
    if scored is not None:
        fine |= scored == 0
    _check_all(field, array, fine, "must be finite as float32 where scored")
    return single


def _sketches(message: pb.StepRequest, fields: StepFields, rows: int, scored: NDArray[np.uint8] | None) -> None:
    sketches, target = fields.get("gradient_sketches"), fields.get("target_sketch")
    if sketches is None and target is None:
        return
    if sketches is None or target is None:
        missing, given = ("gradient_sketches", "target_sketch")[:: 1 if sketches is None else -1]
        raise InvalidRequestError(field=missing, rule=f"must be given with {given}")
    if fields.get("contributions") is not None:
        raise InvalidRequestError(field="gradient_sketches", rule="give contributions or sketches, not both")
    matrix, vector = _array("gradient_sketches", sketches, dimensions=2), _array("target_sketch", target)
    _check_length("gradient_sketches", len(matrix), rows)
    if matrix.shape[1] != len(vector) or not len(vector):
        shapes = f"shapes {matrix.shape} and {vector.shape}"
        raise InvalidRequestError(field="target_sketch", value=shapes, rule="must have the sketches' k values, k >= 1")
    half = matrix.dtype == np.float16 and vector.dtype == np.float16
    message.sketch_type = pb.SKETCH_TYPE_FLOAT16 if half else pb.SKETCH_TYPE_FLOAT32
    for name, array in (("gradient_sketches", matrix), ("target_sketch", vector)):
        if array.dtype.kind not in "fiu":
            raise InvalidRequestError(field=name, value=array.dtype, rule="must be real numbers")
        with np.errstate(over="ignore"):
            values = array.astype("<f2" if half else "<f4")
        fine = np.isfinite(values)
        if name == "gradient_sketches":
            fine = fine.all(axis=1) if scored is None else fine.all(axis=1) | (scored == 0)
        _check_all(name, array, fine, "must be finite where scored")
        setattr(message, name, values.tobytes())


def _loss(field: str, value: float) -> float:
    try:
        loss = float(value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(field=field, value=value, rule="must be a number") from error
    if not np.isfinite(loss):
        raise InvalidRequestError(field=field, value=value, rule="must be finite")
    return loss


def _training_step(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**64:
        raise InvalidRequestError(field="step", value=value, rule="must be an integer from 0 to 2**64 - 1")
    return int(value)


def _array(field: str, values: ArrayLike, *, dimensions: int = 1) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors on a GPU or with gradients
        raise InvalidRequestError(field=field, rule=f"must convert to a numpy array ({error})") from error
    if array.ndim != dimensions:
        words = {1: "one dimension", 2: "two dimensions"}
        raise InvalidRequestError(field=field, value=f"shape {array.shape}", rule=f"must have {words[dimensions]}")
    return array


def _check_names(fields: StepFields) -> None:
    for name in fields:
        if name not in StepFields.__annotations__:
            raise TypeError(
                f"unexpected argument {name!r}; a step takes {', '.join(sorted(StepFields.__annotations__))}"
            )


def _check_length(field: str, length: int, rows: int) -> None:
    if length != rows:
        raise InvalidRequestError(
            field=field, value=f"length {length}", rule=f"must have one value for each of {rows} rows"
        )


def _check_rows(field: str, rows: int, bounds: Bounds) -> None:
    if bounds.max_batch_examples and rows > bounds.max_batch_examples:
        raise InvalidRequestError(
            field=field,
            value=f"{rows} rows",
            rule=f"the server takes at most {bounds.max_batch_examples} in one step; make several steps of them",
        )


def _check_all(field: str, values: NDArray[Any], fine: NDArray[np.bool_], rule: str) -> None:
    if not fine.all():
        index = int(np.argmin(fine))
        raise InvalidRequestError(field=field, index=index, value=values[index], rule=rule)


def _sized(request: Request, bounds: Bounds) -> Request:
    if (error := oversize(request, bounds)) is not None:
        raise error
    return request
