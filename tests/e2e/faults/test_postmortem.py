"""A wait that fails tells how the server and the trainers were: else nobody could understand why."""

import pytest

from tests.e2e.faults.history import History
from tests.e2e.faults.house import House
from tests.e2e.faults.postmortem import postmortem
from tests.e2e.faults.proxy import until
from tests.e2e.faults.trainers import KINDS, Trainer


@pytest.fixture
def trainers(house: House) -> list[Trainer]:
    history = History()
    return [
        kind(house.address, policy="p", num_examples=100, history=history, seed=number)
        for number, kind in enumerate(KINDS)
    ]


def test_it_tells_what_trainers_wait_for_and_what_the_server_does(house: House, trainers: list[Trainer]) -> None:
    for trainer in trainers:
        trainer.start()
    until(lambda: all(trainer.stats[0].applied for trainer in trainers), what="every trainer is answered")
    told = postmortem(house.server, trainers)
    for trainer in trainers:
        trainer.stop()
        trainer.join()
        assert f"{trainer.trainer_id}: Stats(steps=" in told
    for expected in (
        "outage active: False", "is open", "trainers.py", "stream.py",  # the clients
        "active_streams 4.0", "redis_up 1.0", '"event": "serving"',  # the server
        "_watch_redis", "_serve", "(most recent call first)",  # its tasks, and its threads
    ):  # fmt: skip
        assert expected in told, f"{expected!r} is not in\n{told}"


def test_it_tells_of_a_server_that_does_not_answer(house: House, trainers: list[Trainer]) -> None:
    house.server.pause()
    told = postmortem(house.server, trainers[:1])
    house.server.resume()
    assert "not to be had" in told
    assert "its event loop does not turn" in told
    house.server.kill()
    assert "the server does not run" in postmortem(house.server, trainers[:1])
