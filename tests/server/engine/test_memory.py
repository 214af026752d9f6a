"""A policy that does not fit is refused before anything is stored or taken."""

from pathlib import Path

import pytest
import torch

from equipoise_server.engine import Durability, PolicySpec, memory
from equipoise_server.engine.memory import check_room, free_bytes
from equipoise_server.errors import ServiceError

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with 1000 KiB available."""
    (tmp_path / "meminfo").write_text("MemTotal:       5000 kB\nMemFree:  10 kB\nMemAvailable:   1000 kB\n")
    return tmp_path


def container(folder: Path, most: str) -> None:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text("300000\n")
    (folder / "memory.stat").write_text("anon 1\nfile 100000\ninactive_file 40000\nactive_file 10000\n")


def spec(num_examples: int, rule: str = "uniform") -> PolicySpec:
    return PolicySpec(name="p", num_examples=num_examples, rule=rule, settings={}, durability=Durability.LOGGED,
                      reference_nats=None)  # fmt: skip


def test_free_is_the_lesser_of_machine_and_container(machine: Path) -> None:
    def free() -> int | None:
        return free_bytes(CPU, meminfo=machine / "meminfo", cgroup=machine)

    assert free() == 1_024_000
    for most, left in (("max", 1_024_000), ("400000", 150_000), ("9000000", 1_024_000), ("100000", 0)):
        container(machine, most)
        assert free() == left
    assert free_bytes(CPU, meminfo=machine / "absent", cgroup=machine / "absent") is None


def test_this_machine_knows_what_is_free() -> None:
    free = free_bytes(CPU)
    assert free is not None
    assert 1 << 20 < free < 1 << 50


def test_what_does_not_fit_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    large = spec(10_000_000, "ema_sign")
    needed = sum(column.numel() * column.element_size() for column in large.outline().columns.values())
    assert needed >= 80_000_000
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * needed)
    check_room(large, CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    with pytest.raises(
        ServiceError, match=rf"needs {needed} bytes of cpu memory, of which {needed} are free"
    ) as caught:
        check_room(large, CPU)
    assert caught.value.reason == "DEVICE_FULL"
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    check_room(spec(1000, "ema_sign"), CPU)  # small ones fit even where the estimate is wrong
