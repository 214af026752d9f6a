"""What the engine gives the store in format 2, by name. Where this has to change, FORMAT grows, unless older releases
rightly overlook it: see `store/format.py`, and tests/server/store/test_format.py for the keys around it."""

import json
from dataclasses import replace

import numpy as np

from equipoise_server.engine import Header, Kind, Step
from equipoise_server.engine.codec import LoggedStep, decode, encode
from equipoise_server.errors import invalid
from equipoise_server.rules import Evidence, Statistics, build, names
from equipoise_server.store import FORMAT
from tests.server.engine.runs import spec

ENTRY = {
    *("at", "step", "trainer", "sequence", "target", "guard", "scalars", "evidence", "s.NAME"),
    *("row", "ids", "n", "g", "won", "tried", "c", "l", "ref", "tl", "tg"),
}
COLUMNS: dict[str, set[str]] = {
    "boltzmann": set(),
    "ema_relu": {"ema", "raw"},
    "ema_sign": {"ema", "raw"},
    "excess_loss": {"excess", "raw", "mean_weight"},
    "exp3": {"reward", "raw"},
    "exponentiated_gradient": {"log_weight", "raw"},
    "group_dro": {"loss", "raw", "rows"},
    "group_softmax": {"loss", "raw"},
    "learnability": {"successes", "failures", "raw", "seen"},
    "loss_linear_upper": set(),
    "projected_gradient": {"ema", "raw"},
    "rho": {"ema", "raw"},
    "strata": {"loss", "stratum"},
    "trajectory": {"weight", "effective", "updates"},
    "uniform": {"ema", "raw"},
}
"""Of each rule that this release knows; a rule that comes needs no new number."""


def test_the_format_is_the_one_that_is_listed_here() -> None:
    assert FORMAT == 2


def test_an_entry_of_everything_has_these_fields() -> None:
    ones, counts = np.ones(2, np.float32), np.ones(2, np.int64)
    logged = LoggedStep(
        step=Step(
            kind=Kind.STEP,
            trainer_id="trainer",
            sequence=1,
            training_step=1,
            statistics=Statistics(
                ids=np.arange(2),
                contributions=ones,
                losses=ones,
                reference_losses=ones,
                groups=counts,
                target_losses=ones,
                target_groups=counts,
                successes=counts,
                attempts=counts,
                counts=counts,
                trajectory_row=1,
            ),
            target_loss=1.0,
            guard_loss=1.0,
        ),
        scalars={"rms": 1.0, "NAME.0": 1.0, "NAME.1": 2.0},
        evidence=Evidence(sim=1.0, positive_share=1.0, largest_weight=1.0),
        at=1.0,
    )
    assert set(encode(logged)) == ENTRY
    again = decode(encode(logged))
    assert again.scalars == logged.scalars
    assert again.step.statistics is not None
    np.testing.assert_array_equal(again.step.statistics.attempts, counts)
    refused = replace(logged.step, kind=Kind.REFUSED, error=invalid("SHAPE_MISMATCH", "losses", "two"))
    assert set(encode(replace(logged, step=refused))) == {"at", "step", "trainer", "sequence", "refused"}


def test_header_specification_and_pages_have_these() -> None:
    assert set(Header.from_fields({}).to_fields()) == {"progress", "trainers", "scalars", "guard"}
    listed = {"name", "num_examples", "rule", "settings", "durability", "reference_nats"}
    assert set(json.loads(spec().to_json())) == listed
    needed = {"trajectory": {"rows": 2, "learning_rate": 0.1}}
    assert {name: set(build(name, needed.get(name, {})).columns) for name in names()} == COLUMNS
