"""Rule `trajectory` over a socket: rows read by range and by step, moved exactly once, whatever dies on the way."""

import itertools

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from equipoise import Outcome, PolicyClient, Source
from equipoise.admin import PolicyAdmin
from equipoise.aio import PolicyClient as AioPolicyClient
from equipoise.errors import InvalidRequestError, PolicyExistsError, StepRefusedError
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from equipoise_server.rules import aggregate, build
from tests.e2e.test_contract import answers, exchange, f32, failure, floats, u64
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve

NUM_EXAMPLES, ROWS = 300, 8
SETTINGS = {"rows": ROWS, "learning_rate": 2e-3, "policy_epochs": 3}
FRESH = itertools.count()

Rows = NDArray[np.float32]


def contributions(seed: int) -> Rows:
    random = np.random.default_rng(seed)
    return (random.standard_normal(NUM_EXAMPLES) + np.sin(np.arange(NUM_EXAMPLES))).astype(np.float32)


def trainer(address: str, name: str, **options: object) -> PolicyClient:
    return PolicyClient(
        address,
        policy=name,
        num_examples=NUM_EXAMPLES,
        rule="trajectory",
        settings=SETTINGS,
        when_lost="wait",
        **options,  # type: ignore[arg-type]
    )


def in_process(epochs: int, *, seed: int = 0) -> tuple[Rows, Rows]:
    """All rows after some policy epochs, and the mean weight of each example, without any server."""
    rule = build("trajectory", SETTINGS)
    state = rule.init(NUM_EXAMPLES, device=torch.device("cpu"))
    for epoch in range(epochs):
        for row in reversed(range(ROWS)):
            given = contributions(seed + ROWS * epoch + row)
            state = rule.update(state, aggregate(contributions=given, trajectory_row=row))
    return rule.trajectory_weights(state, slice(0, ROWS), None), rule.weights(state, None)


@pytest.fixture
def policy(stub: PolicyServiceStub) -> str:
    """A fresh policy of 4 rows over 3 examples; its first updates have step size 0.1."""
    name = f"rows-{next(FRESH)}"
    settings = {"rows": pb.SettingValue(number=4), "learning_rate": pb.SettingValue(number=0.1)}
    spec = pb.PolicySpec(name=name, num_examples=3, rule=pb.RuleSpec(name="trajectory", settings=settings))
    stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec))
    return name


def row_step(sequence: int, row: int, *values: float, **fields: object) -> pb.StepRequest:
    return pb.StepRequest(sequence=sequence, step=row, all_examples=True, contributions=f32(*values), **fields)  # type: ignore[arg-type]


def read_rows(stub: PolicyServiceStub, policy: str, **fields: object) -> list[pb.ReadWeightsResponse]:
    return list(stub.ReadWeights(pb.ReadWeightsRequest(policy=policy, **fields)))  # type: ignore[arg-type]


def test_a_step_moves_its_row_and_is_answered_with_it(stub: PolicyServiceStub, policy: str) -> None:
    """By hand, in thirds: (1, 1, 1) + .3·(1, 0, -1) has mean 1; (1.3, 1, .7) + .3·(2, 0, -3) has a negative entry, and
    without it .05 too little for each of the others."""
    first, second, read, other, omitted = answers(
        exchange(
            stub,
            policy,
            row_step(1, 2, 1.0, 0.0, -1.0),
            row_step(2, 2, 2.0, 0.0, -3.0),
            pb.StepRequest(step=2, example_ids=u64(2, 0)),
            pb.StepRequest(step=1, all_examples=True),
            row_step(3, 1, 1.0, 0.0, -1.0, omit_weights=True),
        )
    )
    np.testing.assert_allclose(floats(first.weights), [1.3, 1.0, 0.7], rtol=1e-6)
    np.testing.assert_allclose(floats(second.weights), [1.95, 1.05, 0.0], rtol=1e-6)
    assert floats(second.weights)[2] == 0.0
    assert (read.outcome, read.version) == (pb.OUTCOME_READ, 2)
    np.testing.assert_allclose(floats(read.weights), [0.0, 1.95], rtol=1e-6)
    assert floats(other.weights) == [1.0, 1.0, 1.0]
    assert (omitted.outcome, omitted.weights) == (pb.OUTCOME_APPLIED, b"")


def test_rows_are_read_in_ranges_and_means_without(stub: PolicyServiceStub, policy: str) -> None:
    answers(exchange(stub, policy, row_step(1, 2, 1.0, 0.0, -1.0)))
    moved = np.array([1.3, 1.0, 0.7])
    (chunk,) = read_rows(stub, policy, first_row=1, num_rows=2)
    assert (chunk.offset, chunk.version) == (0, 1)
    np.testing.assert_allclose(floats(chunk.values), [1, 1, 1, *moved], rtol=1e-6)
    (some,) = read_rows(stub, policy, first_row=2, num_rows=2, example_ids=u64(2, 0))
    np.testing.assert_allclose(floats(some.values), [0.7, 1.3, 1, 1], rtol=1e-6)
    (means,) = read_rows(stub, policy)
    np.testing.assert_allclose(floats(means.values), (3 + moved) / 4, rtol=1e-6)
    (scores,) = read_rows(stub, policy, field=pb.FIELD_SCORE)
    assert scores.values == means.values
    drawn = stub.SampleExamples(pb.SampleExamplesRequest(policy=policy, count=3, seed=1))
    assert sorted(np.frombuffer(drawn.example_ids, "<u8").tolist()) == [0, 1, 2]


def test_long_ranges_come_in_chunks_of_whole_rows(stub: PolicyServiceStub) -> None:
    settings = {"rows": pb.SettingValue(number=7), "learning_rate": pb.SettingValue(number=1e-6)}
    spec = pb.PolicySpec(name="long-rows", num_examples=100_000, rule=pb.RuleSpec(name="trajectory", settings=settings))
    stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec))
    chunks = read_rows(stub, "long-rows", first_row=1, num_rows=6)
    assert [chunk.offset for chunk in chunks] == [0, 200_000, 400_000]
    assert [len(chunk.values) for chunk in chunks] == [800_000] * 3


@pytest.mark.parametrize(
    ("fields", "reason", "field", "message"),
    [
        ({"first_row": 3, "num_rows": 2}, "OUT_OF_RANGE_VALUE", "num_rows", "2 from row 3 on, but rule 'trajectory'"),
        ({"first_row": 2**64 - 1, "num_rows": 2**64 - 1}, "OUT_OF_RANGE_VALUE", "num_rows", "has rows [0, 4)"),
        ({"first_row": 2}, "INVALID_FIELD", "num_rows", "0 with first_row = 2"),
        ({"num_rows": 2, "field": pb.FIELD_SCORE}, "INVALID_FIELD", "field", "rows have WEIGHT alone"),
        ({"num_rows": 2, "example_ids": u64(3)}, "ID_OUT_OF_RANGE", "example_ids[0]", "id 3 is not in [0, 3)"),
    ],
)
def test_rows_that_are_not_there_are_refused(
    stub: PolicyServiceStub, policy: str, fields: dict[str, object], reason: str, field: str, message: str
) -> None:
    code, why, _, violations = failure(lambda: read_rows(stub, policy, **fields))
    assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert message in violations[field]


@pytest.mark.parametrize(
    ("step", "reason", "field", "message"),
    [
        (row_step(1, 4, 1.0, 0.0, -1.0), "OUT_OF_RANGE_VALUE", "step", "4: rule 'trajectory' has rows [0, 4)"),
        (pb.StepRequest(step=9, all_examples=True), "OUT_OF_RANGE_VALUE", "step", "9: rule"),
        (row_step(1, 0, 1.0, 0.0), "SHAPE_MISMATCH", "contributions", "8 bytes for 3 rows"),
        (row_step(1, 0, 1.0, 0.0, 1.0, scored=b"\1\1\0"), "UNUSABLE_STATISTICS", "contributions", "needs all"),
        (
            pb.StepRequest(sequence=1, example_ids=u64(0, 2), contributions=f32(1, 2)),
            "UNUSABLE_STATISTICS",
            "contributions",
            "contributions of 2 of 3 examples",
        ),
        (
            pb.StepRequest(sequence=1, all_examples=True, losses=f32(1, 2, 3)),
            "UNUSABLE_STATISTICS",
            "contributions",
            "contributions is absent",
        ),
    ],
)
def test_an_unusable_row_is_refused_and_the_stream_goes_on(
    stub: PolicyServiceStub, policy: str, step: pb.StepRequest, reason: str, field: str, message: str
) -> None:
    refused, applied = answers(exchange(stub, policy, step, row_step(1 + step.sequence, 0, 0.0, 0.0, 0.0)))
    assert (refused.outcome, applied.outcome) == (pb.OUTCOME_REFUSED, pb.OUTCOME_APPLIED)
    assert reason in str(refused.error)
    assert field in str(refused.error)
    assert message in refused.error.message
    assert floats(applied.weights) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("num_examples", "settings", "field", "message"),
    [
        (262_145, {"rows": 1, "learning_rate": 1}, "policy.num_examples", "takes at most 262144 here"),
        (200_000, {"rows": 30_000, "learning_rate": 1}, "policy.rule.settings.rows", "max_examples, 4000000000"),
        (3, {"learning_rate": 1}, "policy.rule.settings.rows", "is absent"),
        (3, {"rows": 2}, "policy.rule.settings.learning_rate", "is absent"),
        (3, {"rows": 2.5, "learning_rate": 1}, "policy.rule.settings.rows", "whole"),
    ],
)
def test_a_trajectory_that_cannot_be_is_refused_at_its_creation(
    stub: PolicyServiceStub, num_examples: int, settings: dict[str, float], field: str, message: str
) -> None:
    values = {name: pb.SettingValue(number=value) for name, value in settings.items()}
    rule = pb.RuleSpec(name="trajectory", settings=values)
    request = pb.CreatePolicyRequest(policy=pb.PolicySpec(name="never", num_examples=num_examples, rule=rule))
    code, _, _, violations = failure(lambda: stub.CreatePolicy(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in violations[field]


def test_a_trajectory_is_created_once_and_forked(server: ServerProcess) -> None:
    with trainer(server.address, "rows-source") as source, PolicyAdmin(server.address) as admin:
        source.step(all_examples=True, contributions=contributions(0), step=3)
        settings = source.status().spec.settings
        asked = {"rows": 8.0, "learning_rate": 2e-3, "policy_epochs": 3.0}
        assert settings == asked | {"guard": False, "guard_stretch": 0.125}
        admin.fork("rows-source", "rows-fork")
        forked = admin.read_weights("rows-fork", rows=range(ROWS))
        np.testing.assert_array_equal(forked, source.read_weights(rows=range(ROWS)))
        assert (forked[3] == 0).any()
        with (
            pytest.raises(PolicyExistsError),
            PolicyClient(
                server.address,
                policy="rows-source",
                num_examples=NUM_EXAMPLES,
                rule="trajectory",
                settings={"rows": 9.0},
                timeout=PATIENT,
            ) as other,
        ):
            other.admin.create(other._options.spec)


def test_policy_epochs_over_a_socket_equal_those_in_process(server: ServerProcess) -> None:
    expected, means = in_process(3)
    with trainer(server.address, "rows-exact") as client:
        for epoch in range(3):
            for row in reversed(range(ROWS)):
                client.submit(
                    all_examples=True, contributions=contributions(ROWS * epoch + row), step=row, omit_weights=True
                )
        third = client.read(step=3)  # behind all that was submitted
        assert (third.outcome, third.source, third.version) == (Outcome.READ, Source.SERVED, 3 * ROWS)
        np.testing.assert_array_equal(third.weights, expected[3])
        np.testing.assert_array_equal(client.read([7, 1], step=3).weights, expected[3][[7, 1]])
        np.testing.assert_array_equal(client.read_weights(rows=range(ROWS)), expected)
        np.testing.assert_array_equal(client.read_weights(ids=[4, 2], rows=range(2, 5)), expected[2:5][:, [4, 2]])
        np.testing.assert_array_equal(client.read_weights(), means)
        np.testing.assert_array_equal(client.read_weights("score"), means)
        status = client.status()
        effective = (1 / np.square(expected.astype(np.float64) / NUM_EXAMPLES).sum(axis=1)).mean()
        assert status.effective_examples == pytest.approx(effective, rel=1e-5)
        assert (status.version, status.training_step, status.scored_examples) == (3 * ROWS, 0, NUM_EXAMPLES)
        assert status.bytes == ROWS * (4 * NUM_EXAMPLES + 8)


async def test_the_asyncio_client_reads_and_moves_rows_alike(server: ServerProcess) -> None:
    expected, means = in_process(1)
    client = AioPolicyClient(
        server.address, policy="rows-aio", num_examples=NUM_EXAMPLES, rule="trajectory", settings=SETTINGS,
        when_lost="wait",
    )  # fmt: skip
    async with client:
        for row in reversed(range(ROWS)):
            client.submit(all_examples=True, contributions=contributions(row), step=row, omit_weights=True)
        np.testing.assert_array_equal((await client.read(step=5)).weights, expected[5])
        np.testing.assert_array_equal(await client.read_weights(rows=range(2, ROWS)), expected[2:])
        np.testing.assert_array_equal(await client.read_weights(), means)


def test_rows_are_moved_exactly_once_though_the_server_is_killed_in_mid_epoch() -> None:
    expected, _ = in_process(3)
    with serve() as server, trainer(server.address, "rows-killed") as client:
        for sequence in range(3 * ROWS):
            epoch, back = divmod(sequence, ROWS)
            row = ROWS - 1 - back
            if sequence == 13:
                server.restart()
            client.submit(
                all_examples=True, contributions=contributions(ROWS * epoch + row), step=row, omit_weights=True
            )
        assert client.flush(durable=True)
        np.testing.assert_array_equal(client.read_weights(rows=range(ROWS)), expected)
        assert client.status().version == 3 * ROWS


def test_export_and_import_keep_every_bit(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("export") / "rows.npz"
    with trainer(server.address, "rows-export") as client, PolicyAdmin(server.address) as admin:
        for row in (5, 5, 2):
            client.step(all_examples=True, contributions=contributions(row), step=row)
        admin.export_policy("rows-export", path)
        admin.import_policy(path, "rows-import")
        kept = client.read_weights(rows=range(ROWS))
        np.testing.assert_array_equal(admin.read_weights("rows-import", rows=range(ROWS)), kept)
        with np.load(path) as file:
            np.testing.assert_array_equal(file["columns/weight"].reshape(ROWS, NUM_EXAMPLES), kept)
            assert file["columns/updates"].tolist() == [0, 0, 1, 0, 0, 2, 0, 0]
        client.step(all_examples=True, contributions=contributions(9), step=5)  # its third update, with a third of ε₀
        with PolicyClient(server.address, policy="rows-import", when_lost="wait") as other:
            other.step(all_examples=True, contributions=contributions(9), step=5)
            np.testing.assert_array_equal(other.read_weights(rows=range(5, 6)), client.read_weights(rows=range(5, 6)))


@pytest.mark.parametrize(
    ("column", "lengths", "field"),
    [("weight", {"weight": 7}, "header.lengths.weight"), ("updates", {"weight": 12}, "header.lengths.updates")],
)
def test_an_import_of_another_shape_is_refused(
    stub: PolicyServiceStub, policy: str, column: str, lengths: dict[str, int], field: str
) -> None:
    header = next(iter(stub.ExportPolicy(pb.ExportPolicyRequest(policy=policy)))).header
    assert dict(header.lengths) == {"weight": 12, "updates": 4, "effective": 4}
    header.spec.name = f"{policy}-{column}"
    header.ClearField("lengths")
    header.lengths.update(lengths)
    code, reason, _, violations = failure(lambda: stub.ImportPolicy(iter([pb.ImportPolicyRequest(header=header)])))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_STATE")
    assert field in violations


def test_misuse_of_the_client_is_refused_before_anything_is_sent(server: ServerProcess) -> None:
    with trainer(server.address, "rows-misused") as client:
        for rows in (range(0), range(0, 4, 2), range(-1, 3), range(5, 2)):
            with pytest.raises(InvalidRequestError, match="rows"):
                client.read_weights(rows=rows)
        with pytest.raises(InvalidRequestError, match="step"):
            client.read(step=-1)
        with pytest.raises(StepRefusedError, match=r"8: rule 'trajectory' has rows \[0, 8\)"):
            client.read(step=ROWS)
    with (
        PolicyClient(server.address, policy="rows-misused", timeout=PATIENT) as client,
        pytest.raises(InvalidRequestError, match="ids"),
    ):
        client.read(step=0)


@pytest.mark.slow
def test_a_long_search_survives_kills_in_the_midst_of_its_sweeps() -> None:
    """Three policy epochs of 4 MiB, each swept several times, with two kills: the rows are those of a run without."""
    rows, examples, epochs = 256, 4096, 3
    settings = {"rows": rows, "learning_rate": 0.3 / examples, "policy_epochs": 4}
    given = np.random.default_rng(7).standard_normal((rows, examples), dtype=np.float32)
    rule = build("trajectory", settings)
    state = rule.init(examples, device=torch.device("cpu"))
    order = list(reversed(range(rows))) * epochs
    for row in order:
        state = rule.update(state, aggregate(contributions=given[row], trajectory_row=row))
    expected = rule.trajectory_weights(state, slice(0, rows), None)
    kills = set(np.random.default_rng(8).choice(len(order), 2, replace=False).tolist())
    with serve() as server:
        client = PolicyClient(
            server.address, policy="long", num_examples=examples, rule="trajectory", settings=settings, when_lost="wait"
        )
        with client:
            for position, row in enumerate(order):
                client.submit(all_examples=True, contributions=given[row], step=row, omit_weights=True)
                if position in kills:
                    server.restart()
            assert client.flush(durable=True)
            server.restart()
            np.testing.assert_array_equal(client.read_weights(rows=range(rows)), expected)
            assert client.status().version == len(order)
            assert server.log.count("swept") >= 2
