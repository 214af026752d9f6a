"""Requests: what is sent, and what is refused before anything is."""

from typing import Any

import numpy as np
import pytest

from equipoise.errors import InvalidRequestError
from equipoise.wire import Bounds, answer_ids, build_read, build_step

BOUNDS = Bounds(num_examples=10, max_batch_examples=4)


def test_a_step_is_little_endian_bytes() -> None:
    request = build_step(
        [3, 1],
        {
            "contributions": [1.0, -2.0],
            "losses": np.array([0.5, 0.25]),
            "scored": [True, False],
            "measured": [0, 1],
            "groups": [2, 2**32 - 1],
            "successes": [3, 7],
            "attempts": [8, 0],
            "target_loss": 1.5,
            "guard_loss": 2.5,
            "step": 7,
            "weights_for": np.array([9], np.int32),
        },
        BOUNDS,
    )
    message = request.message
    assert message.example_ids == (3).to_bytes(8, "little") + (1).to_bytes(8, "little")
    assert message.contributions == bytes.fromhex("0000803f000000c0")
    assert message.losses == bytes.fromhex("0000003f0000803e")
    assert (message.scored, message.measured) == (b"\x01\x00", b"\x00\x01")
    assert message.groups == bytes.fromhex("02000000ffffffff")
    assert message.successes == bytes.fromhex("0300000007000000")
    assert message.attempts == bytes.fromhex("0800000000000000")
    assert (message.target_loss, message.guard_loss, message.step) == (1.5, 2.5, 7)
    assert message.weights_for == (9).to_bytes(8, "little")
    assert request.answer_ids.tolist() == [9]


def test_what_was_not_given_is_absent() -> None:
    message = build_step([0], {"losses": [1.0]}, BOUNDS).message
    assert not message.HasField("target_loss")
    assert not message.HasField("weights_for")
    assert message.contributions == message.scored == message.measured == message.groups == b""


def test_all_examples_need_no_ids() -> None:
    bounds = Bounds(num_examples=3)
    request = build_step(None, {"contributions": [1, 2, 3], "all_examples": True}, bounds)
    assert request.message.all_examples
    assert request.answer_ids.tolist() == [0, 1, 2]


def test_an_answer_without_weights_is_asked_for() -> None:
    request = build_step([3, 1], {"losses": [1.0, 2.0], "omit_weights": True}, BOUNDS)
    assert request.message.omit_weights
    assert request.answer_ids.tolist() == []
    assert answer_ids(request.message, 10).tolist() == []


def test_a_read_is_of_ids_or_of_all_examples_and_of_a_row_where_it_names_a_step() -> None:
    some = build_read([3, 1], BOUNDS)
    assert (some.answer_ids.tolist(), some.of_row, some.message.step) == ([3, 1], False, 0)
    row = build_read(None, Bounds(num_examples=3), step=0)
    assert (row.answer_ids.tolist(), row.of_row, row.message.all_examples) == ([0, 1, 2], True, True)
    with pytest.raises(InvalidRequestError, match="ids: must be given, or num_examples"):
        build_read(None, Bounds(), step=0)
    with pytest.raises(InvalidRequestError, match="at most 4 in one step"):
        build_read(None, BOUNDS)


def test_a_loss_alone_needs_no_rows() -> None:
    assert build_step(None, {"guard_loss": 0.5}, BOUNDS).message.WhichOneof("rows") is None


def test_contributions_that_were_not_measured_may_hold_nan_and_losses_may_not() -> None:
    fields: Any = {"contributions": [1.0, np.nan], "losses": [1.0, 2.0], "measured": [1, 0]}
    assert build_step([0, 1], fields, BOUNDS).message.measured == b"\x01\x00"
    with pytest.raises(InvalidRequestError, match="losses"):
        build_step([0, 1], fields | {"losses": [1.0, np.nan]}, BOUNDS)


def test_unscored_rows_may_hold_nan() -> None:
    request = build_step([0, 1], {"contributions": [1.0, np.nan], "scored": [1, 0]}, BOUNDS)
    assert np.isnan(np.frombuffer(request.message.contributions, "<f4")[1])


@pytest.mark.parametrize(
    ("ids", "fields", "field", "index", "rule"),
    [
        ([1, 10], {"losses": [1, 1]}, "ids", 1, "below num_examples = 10"),
        ([1, -1], {"losses": [1, 1]}, "ids", 1, "negative"),
        ([1.0], {"losses": [1]}, "ids", None, "integers"),
        ([True], {"losses": [1]}, "ids", None, "integers"),
        ([[1]], {"losses": [1]}, "ids", None, "one dimension"),
        ([[1], [2, 3]], {"losses": [1]}, "ids", None, "numpy array"),
        ([], {"losses": []}, "ids", None, "at least one"),
        ([1] * 5, {"losses": [1] * 5}, "ids", None, "at most 4"),
        ([1], {}, "contributions", None, "needs"),
        (None, {"losses": [1]}, "ids", None, "all_examples"),
        ([1], {"losses": [1], "all_examples": True}, "ids", None, "not both"),
        ([1, 2], {"losses": [1]}, "losses", None, "2 rows"),
        ([1, 2], {"contributions": [1, np.nan]}, "contributions", 1, "finite"),
        ([1, 2], {"contributions": [1, np.inf]}, "contributions", 1, "finite"),
        ([1, 2], {"contributions": [1, 1e39]}, "contributions", 1, "finite as float32"),
        ([1], {"contributions": ["a"]}, "contributions", None, "real numbers"),
        ([1], {"contributions": [1j]}, "contributions", None, "real numbers"),
        ([1, 2], {"losses": [1, 2], "scored": [1, 2]}, "scored", 1, "0 or 1"),
        ([1, 2], {"contributions": [1, 2], "measured": [1, 2]}, "measured", 1, "0 or 1"),
        ([1, 2], {"losses": [1, 2], "measured": [1, 0]}, "measured", None, "needs contributions"),
        ([1, 2], {"losses": [1, 2], "groups": [1]}, "groups", None, "2 rows"),
        ([1, 2], {"losses": [1, 2], "groups": [0, -1]}, "groups", 1, "2^32"),
        ([1, 2], {"losses": [1, 2], "groups": [0.5, 1]}, "groups", None, "integers"),
        ([1], {"successes": [1]}, "attempts", None, "go together"),
        ([1], {"attempts": [1]}, "successes", None, "go together"),
        ([1, 2], {"successes": [1, 1], "attempts": [1]}, "attempts", None, "2 rows"),
        ([1, 2], {"successes": [1, 0.5], "attempts": [1, 1]}, "successes", None, "integers"),
        ([1, 2], {"successes": [1, -1], "attempts": [1, 1]}, "successes", 1, "2^32"),
        ([1, 2], {"successes": [1, 0], "attempts": [1, 0]}, "attempts", 1, "at least 1"),
        ([1, 2], {"successes": [1, 2], "attempts": [1, 1]}, "successes", 1, "at most"),
        ([1], {"losses": [1.0], "target_losses": [1.0, float("nan")]}, "target_losses", 1, "finite"),
        ([1], {"contributions": [1.0], "target_losses": [1.0]}, "target_losses", None, "needs losses"),
        (None, {"target_loss": 1.0, "target_losses": [1.0]}, "target_losses", None, "needs losses"),
        ([1], {"losses": [1.0], "target_groups": [0]}, "target_groups", None, "needs target_losses"),
        ([1], {"losses": [1.0], "target_losses": [1.0], "target_groups": [0, 1]}, "target_groups", None, "1 rows"),
        ([1], {"losses": [1.0], "target_losses": [1.0], "target_groups": [-1]}, "target_groups", 0, "2^32"),
        (None, {"successes": [1], "attempts": [1]}, "ids", None, "successes need the ids"),
        (None, {"target_loss": 1.0, "groups": [0]}, "ids", None, "groups need the ids"),
        ([1, 2], {"losses": [1, 2], "scored": [1]}, "scored", None, "2 rows"),
        ([1], {"losses": [1], "target_loss": np.nan}, "target_loss", None, "finite"),
        ([1], {"losses": [1], "guard_loss": "x"}, "guard_loss", None, "number"),
        ([1], {"losses": [1], "step": -1}, "step", None, "integer from 0"),
        ([1], {"losses": [1], "weights_for": [10]}, "weights_for", 0, "below num_examples = 10"),
        ([1], {"losses": [1], "weights_for": []}, "weights_for", None, "at least one"),
    ],
)
def test_bad_input_names_field_index_value_and_rule(
    ids: Any, fields: Any, field: str, index: int | None, rule: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_step(ids, fields, BOUNDS)
    error = caught.value
    assert (error.field, error.index) == (field, index)
    assert rule in error.rule
    assert error.rule in str(error)
    assert error.value in str(error)
    assert isinstance(error, ValueError)


def test_a_misspelt_statistic_is_no_silence() -> None:
    with pytest.raises(TypeError, match="contribution'"):
        build_step([1], {"contribution": [1.0]}, BOUNDS)  # type: ignore[typeddict-unknown-key]


def test_a_message_too_large_is_refused_here() -> None:
    with pytest.raises(InvalidRequestError, match="bytes"):
        build_read(np.arange(3_000_000), Bounds())
