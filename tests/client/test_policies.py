"""Policies to and from the contract, and value objects that refuse nonsense."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise import Backoff, Limits, PolicySpec, Timeout
from equipoise.errors import InvalidRequestError
from equipoise.v1 import policy_pb2 as pb

SETTINGS = st.dictionaries(
    st.text(max_size=5), st.one_of(st.floats(allow_nan=False), st.booleans(), st.text(max_size=5))
)


@given(SETTINGS, st.sampled_from(["logged", "behind"]), st.none() | st.floats(0.1, 20))
def test_a_spec_survives_the_wire(settings: dict[str, float | bool | str], durability: str, nats: float | None) -> None:
    spec = PolicySpec(
        name="a",
        num_examples=7,
        rule="r",
        settings=settings,
        durability=durability,  # type: ignore[arg-type]
        reference_nats=nats,
    )
    again = PolicySpec.from_proto(pb.PolicySpec.FromString(spec.to_proto().SerializeToString()))
    assert again == spec
    assert {k: type(v) for k, v in again.settings.items()} == {k: type(v) for k, v in settings.items()}


def test_what_is_left_out_is_left_to_the_server() -> None:
    message = PolicySpec(name="a", num_examples=1).to_proto()
    assert message.durability == pb.DURABILITY_UNSPECIFIED
    assert message.rule.name == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"num_examples": -1},
        {"num_examples": 2**64},
        {"num_examples": 1.0},
        {"num_examples": "7"},
        {"rule": None},
        {"durability": "now"},
        {"settings": {"floor": [1]}},
        {"settings": {3: 1.0}},
        {"settings": [("floor", 1.0)]},
        {"reference_nats": "5"},
        {"reference_nats": -1.0},
        {"reference_nats": float("nan")},
    ],
)
def test_bad_specs_are_refused_and_the_field_is_named(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(fields))):
        PolicySpec(**({"name": "a", "num_examples": 1} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "field"), [(Timeout, "step"), (Backoff, "first"), (Limits, "in_flight")])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_values_must_be_positive(kind: type, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        kind(**{field: value})


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_backoff_is_bounded_and_jittered(attempt: int, random: float) -> None:
    backoff = Backoff(first=0.1, longest=5.0)
    bound = 5.0 if attempt > 6 else min(5.0, 0.1 * 2**attempt)
    assert backoff.delay(attempt, lambda: random) == pytest.approx(random * bound)
