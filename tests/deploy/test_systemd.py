"""The system service starts the server as the settings understand it."""

import shlex
from configparser import RawConfigParser
from pathlib import Path

import pytest

from equipoise import cli
from equipoise_server.settings import ENV_PREFIX, Settings, load

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "equipoise.service"


@pytest.fixture(scope="module")
def service() -> dict[str, str]:
    parser = RawConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return dict(parser["Service"])


def test_it_starts_a_command_with_flags_that_exist(service: dict[str, str], tmp_path: Path) -> None:
    program, command, *flags = shlex.split(service["ExecStart"])
    assert Path(program).is_absolute()
    assert command in cli.commands()
    file = tmp_path / "equipoise.toml"
    file.write_text("max_streams = 7\n")
    assert load([flag.replace("/etc/equipoise/equipoise.toml", str(file)) for flag in flags]).max_streams == 7


def test_it_runs_as_nobody_in_particular_and_writes_nothing_but_its_state(service: dict[str, str]) -> None:
    assert (service["DynamicUser"], service["NoNewPrivileges"], service["ProtectSystem"]) == ("yes", "yes", "strict")
    assert service["CapabilityBoundingSet"] == ""
    assert "ReadWritePaths" not in service


def test_its_variables_are_settings(service: dict[str, str]) -> None:
    name, value = service["Environment"].split("=")
    assert name.removeprefix(ENV_PREFIX).lower() in Settings.model_fields
    assert value == f"/var/lib/{service['StateDirectory']}"


def test_the_server_has_time_to_drain_and_its_redis_outlives_it(service: dict[str, str]) -> None:
    flush_s = 10.0
    assert float(service["TimeoutStopSec"].removesuffix("s")) > load([]).drain_grace_s + flush_s
    assert service["KillMode"] == "mixed"
