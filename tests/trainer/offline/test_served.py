"""Rows on a real server: the same policy as in this process, whoever is killed."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from equipoise import PolicyAdmin
from equipoise_trainer.offline.copies import RowsLostError
from equipoise_trainer.offline.rows import LocalRows, Weights
from equipoise_trainer.offline.search import Search
from equipoise_trainer.offline.served import ServedRows
from tests.servers import ServerProcess, serve
from tests.trainer.offline.searches import EPOCHS, ROWS, SETTINGS, small_search

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def expected() -> Weights:
    """Rows after an undisturbed search in this process."""
    holder = LocalRows(SETTINGS)
    small_search(holder=holder).run()
    return holder.fetch(0, ROWS)


def served(server: ServerProcess, policy: str) -> ServedRows:
    return ServedRows(server.address, policy=policy, settings=SETTINGS, reference_nats=1.0)


def test_a_served_search_is_the_one_in_this_process(server: ServerProcess, expected: Weights) -> None:
    with served(server, "same") as holder:
        measures, _ = small_search(holder=holder).run()
        found = holder.fetch(0, ROWS)
        assert holder.moves() == EPOCHS * ROWS
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(found == 0, expected == 0)
    assert measures[-1].area < measures[0].area
    with PolicyAdmin(server.address) as admin:
        status = admin.get("same")
    assert status.version == status.durable_version == EPOCHS * ROWS
    assert status.spec.settings["rows"] == ROWS


def test_a_server_that_is_killed_in_the_middle_of_an_epoch_loses_nothing(
    server: ServerProcess, expected: Weights
) -> None:
    rows = iter(range(1, 10_000))
    threads: list[threading.Thread] = []

    def accident() -> bool:
        if next(rows) == ROWS + ROWS // 2:
            server.kill()
            threads.append(threading.Thread(target=server.start))
            threads[0].start()
        return False

    with served(server, "killed") as holder:
        small_search(holder=holder, stop=accident).run()
        threads[0].join()
        assert holder.moves() == EPOCHS * ROWS
        np.testing.assert_allclose(holder.fetch(0, ROWS), expected, atol=1e-5)


CHILD = """
import sys, time
from pathlib import Path
from equipoise_trainer.offline.served import ServedRows
from tests.trainer.offline.searches import ROWS, SETTINGS, small_search

rows = iter(range(1, 10_000))

def stop():
    row = next(rows)
    if row == ROWS + 5:
        holder.flush()  # some have arrived for sure
    if row == ROWS + 11:
        print("there", flush=True)
        time.sleep(600)
    return False

with ServedRows(sys.argv[1], policy="orphan", settings=SETTINGS, reference_nats=1.0) as holder:
    small_search(Path(sys.argv[2]), holder, stop=stop).run()
"""


def test_a_trainer_that_is_killed_in_the_middle_of_an_epoch_goes_on_from_its_own_copy(
    server: ServerProcess, expected: Weights, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", CHILD, server.address, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        child.kill()
    with served(server, "orphan") as holder:
        # What had not been sent when it was killed is sent again; nothing is applied twice.
        assert ROWS + 5 <= holder.moves() <= ROWS + 12
        with pytest.raises(RowsLostError):
            Search.run(small_search(tmp_path / "elsewhere", holder))
        small_search(tmp_path, holder).run()
        assert holder.moves() == EPOCHS * ROWS
        np.testing.assert_allclose(holder.fetch(0, ROWS), expected, atol=1e-5)
        holder.delete()
