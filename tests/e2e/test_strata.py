"""Rule `strata` through a server: groups, sparse contributions, what can be read, and deaths on the way."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from equipoise import PolicyClient
from equipoise.commands import policy as command
from equipoise.errors import InvalidRequestError, StepRefusedError
from equipoise_server.rules import Statistics, aggregate, build
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve

NUM_EXAMPLES, ROWS, GROUPS = 400, 48, 2
SETTINGS = {"strata": 4, "groups": GROUPS, "min_count": 10, "memory": 60, "min_target_losses": 20}


def steps(count: int) -> Iterator[dict[str, Any]]:
    """Losses first, contributions of some rows behind them, then both at once; high losses harm in group 0 alone.

    Losses of the target come with the losses of every fifth step or so, and lie where those of the harmless do.
    """
    random = np.random.default_rng(3)
    for index in range(count):
        ids = random.integers(0, NUM_EXAMPLES, ROWS)
        losses = (ids % 10 + random.random(ROWS)).astype(np.float32)
        harm = np.where(ids % GROUPS == 0, losses - 5.0, 5.0 - losses)
        contributions = (random.standard_normal(ROWS) - 0.5 * harm).astype(np.float32)
        measured = random.random(ROWS) < 0.4
        told = {"losses": losses, "groups": ids % GROUPS}
        sparse = {"contributions": np.where(measured, contributions, np.float32(np.nan)), "measured": measured}
        if index % 5 == 0:
            groups = random.integers(0, GROUPS, 16)
            told |= {
                "target_losses": (groups * 5 + random.uniform(0, 6, 16)).astype(np.float32),
                "target_groups": groups,
            }
        if index % 2:
            yield {"ids": ids, **told, **sparse}
        else:
            yield {"ids": ids, **told}
            yield {"ids": ids, **sparse}


def statistics(step: dict[str, Any]) -> Statistics:
    """A step as the rule gets it."""
    target = {name: step.get(name) for name in ("target_losses", "target_groups")}
    rest = {name: values for name, values in step.items() if name not in target}
    return replace(aggregate(**({"contributions": None, "losses": None} | rest)), **target)


def client_of(server: ServerProcess, name: str, **options: Any) -> PolicyClient:
    return PolicyClient(
        server.address,
        policy=name,
        num_examples=NUM_EXAMPLES,
        rule="strata",
        settings=SETTINGS,
        when_lost="wait",
        **options,
    )


def read(client: PolicyClient) -> list[NDArray[np.float32]]:
    return [client.read_weights(field) for field in ("weight", "score", "loss", "stratum")]


def test_what_is_served_is_the_rule_s_own(server: ServerProcess) -> None:
    rule = build("strata", SETTINGS)
    state = rule.init(NUM_EXAMPLES, device=torch.device("cpu"))
    with client_of(server, "strata-exact") as client:
        for step in steps(40):
            served = client.step(**step).weights
            state = rule.update(state, statistics(step))
            np.testing.assert_array_equal(served, rule.weights(state, step["ids"]))
        tables = read(client)
        status = client.status()
    own = [rule.weights(state, None), rule.scores(state, None)]
    own += [rule.read_kept(state, name, None) for name in ("loss", "stratum")]
    np.testing.assert_array_equal(tables, own)
    report = rule.strata(state)
    assert report is not None
    assert status.strata_contrast == report.contrast
    assert [each.z for each in status.strata] == [each.z for each in report.strata]
    assert [each.ratio for each in status.strata] == [each.ratio for each in report.strata]
    assert min(each.ratio for each in status.strata) < 0.5
    weights = {(each.group, each.stratum): each.weight for each in status.strata}
    assert weights[0, 3] < 0.1 < 1.0 < weights[0, 0]  # high losses harm here,
    assert weights[1, 0] < 0.1 < 1.0 < weights[1, 3]  # and low ones there


def test_the_first_loss_of_an_example_gives_it_a_weight_in_the_same_step(server: ServerProcess) -> None:
    with client_of(server, "strata-first") as client:
        for step in steps(40):
            client.step(**{**step, "ids": step["ids"] // 2 * 2 % 300 + step["ids"] % 2})
        new = np.array([390, 391, 392, 393])
        served = client.step(new, losses=[9.5, 9.5, 0.5, 0.5], groups=[0, 1, 0, 1]).weights
    assert served[0] < 0.1 < served[2]
    assert served[3] < 0.1 < served[1]


def test_a_run_whose_server_is_killed_ends_like_one_whose_server_lives(tmp_path: Path) -> None:
    with serve() as server:
        ends = []
        for name, kills in (("spared", ()), ("killed", (11, 40))):
            with client_of(server, name) as client:
                for index, step in enumerate(steps(40)):
                    if index in kills:
                        server.kill()
                        server.start()
                    client.step(**step)
                assert client.flush(durable=True)
                ends.append(read(client))
        np.testing.assert_array_equal(ends[0], ends[1])
        with client_of(server, "killed") as client:
            client.admin.export_policy("killed", tmp_path / "killed.npz")
            client.admin.import_policy(tmp_path / "killed.npz", "copy")
            last = next(steps(1))
            grown = client.step(**last).weights
        with client_of(server, "copy") as copy:
            np.testing.assert_array_equal(copy.step(**last).weights, grown)


def test_it_is_shown_and_drawn(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    with client_of(server, "strata-shown") as client:
        for step in steps(40):
            client.step(**step)
        client.flush(durable=True)
    assert command.main(["show", "strata-shown", "--server", server.address]) == 0
    shown = capsys.readouterr().out
    assert "strata contrast" in shown
    lines = shown[shown.index("GROUP") :].splitlines()
    assert len(lines) == 1 + 4 * GROUPS
    bars = [line.count("#") for line in lines[1:]]
    assert bars[0] == 20 > bars[3] == 1


def test_what_does_not_fit_is_refused(server: ServerProcess) -> None:
    with client_of(server, "strata-refused") as client:
        for fields, message in (
            ({"losses": [1.0, 2.0]}, "groups is absent: rule strata with 2 groups"),
            ({"losses": [1.0, 2.0], "groups": [0, 2]}, "groups = 2 of example 1: rule strata has groups"),
            ({"losses": [1.0, 2.0], "groups": [0, 1], "reference_losses": [1.0, 2.0]}, "reference_losses"),
            (
                {"losses": [1.0, 2.0], "groups": [0, 1], "target_losses": [1.0, 1.0], "target_groups": [0, 2]},
                r"target_groups\[1\] = 2: rule strata has groups",
            ),
        ):
            with pytest.raises(StepRefusedError, match=message):
                client.step([0, 1], **fields)
        with pytest.raises(StepRefusedError, match="one group an example"):
            client.step([1, 1], losses=[1.0, 2.0], groups=[0, 1])
    with PolicyClient(server.address, policy="strata-none", num_examples=4, timeout=PATIENT) as client:
        client.step([0], contributions=[1.0])
        with pytest.raises(InvalidRequestError, match="keeps no such values"):
            client.read_weights("stratum")
