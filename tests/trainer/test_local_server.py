"""The local server of a command."""

import os

import pytest

from equipoise import PolicyClient
from equipoise_trainer.commands.local_server import local_server
from tests.patience import PATIENT


def test_it_knows_nothing_of_the_environment_s_settings_nor_do_its_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {
        "EQUIPOISE_TLS": "true",
        "EQUIPOISE_TOKEN": "of-another-server",
        "EQUIPOISE_REDIS_URL": "redis://127.0.0.1:1",
    }
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    with (
        local_server() as server,
        PolicyClient(server.address, policy="local", num_examples=3, timeout=PATIENT) as client,
    ):
        assert client.step([0, 1], contributions=[1.0, -1.0]).source.name == "SERVED"
        assert client.status().version == 1
    assert {name: os.environ.get(name) for name in foreign} == foreign
