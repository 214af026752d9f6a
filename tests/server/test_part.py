"""What one of several processes is told."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from equipoise_server.part import DIVIDED, Part, own_addresses
from equipoise_server.settings import Settings


def part(number: int = 0, *, processes: int = 3, directory: str = "/nowhere") -> Part:
    return Part(
        number=number,
        processes=processes,
        shared="127.0.0.1:50051",
        own=f"127.0.0.1:{50052 + number}",
        advertise="",
        redis_url="",
        directory=directory,
    )


def test_bounds_of_memory_are_divided_and_nothing_is_lost() -> None:
    whole = Settings(processes=3, metrics_max_policies=34, max_queued_steps=7)
    parts = [part(number).settings(whole) for number in range(3)]
    for name in (*DIVIDED, "metrics_max_policies"):
        shares = [getattr(each, name) for each in parts]
        assert sum(shares) == getattr(whole, name)
        assert max(shares) - min(shares) <= 1
    assert {each.max_queued_steps for each in parts} == {7}


def test_an_order_holds_everything_secrets_too() -> None:
    whole = Settings(
        processes=3, redis_url="redis://:secret@nowhere:6379/0", tokens_file=Path("/tokens"), owner_timeout_s=2.5
    )
    mine = part(1).settings(whole)
    told, settings = Part.from_order(part(1).order(mine))
    assert told == part(1)
    assert settings == mine
    assert settings.redis is not None
    assert settings.redis.password == "secret"


def test_an_order_holds_whatever_has_become_of_what_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is replaced a year later is as the others are: the file is read once, by the parent."""
    file = tmp_path / "equipoise.toml"
    file.write_text("max_streams = 7\nprocesses = 3")
    monkeypatch.setenv("EQUIPOISE_CONFIG", str(file))
    mine = part().settings(Settings())
    assert mine.max_streams == 7
    for later in ("max_streams = 8", "nonsense"):
        file.write_text(later)
        assert Part.from_order(part().order(mine))[1].model_copy(update={"config": file}) == mine


def test_processes_have_the_ports_behind_the_shared_one() -> None:
    listening = Settings(processes=2, listen="127.0.0.1:6000")
    assert own_addresses(listening) == [("127.0.0.1:6001", ""), ("127.0.0.1:6002", "")]
    told = Settings(processes=2, listen=":0", advertise="[fd00::1]:7000", allow_insecure=True)
    assert own_addresses(told) == [(":0", "[fd00::1]:7001"), (":0", "[fd00::1]:7002")]


def test_ports_must_be_there() -> None:
    with pytest.raises(ValidationError, match=r"listen: processes = 2 need the ports up to 65537"):
        Settings(processes=2, listen="127.0.0.1:65535")
