"""What Redis's append-only file says about a policy's log: every entry that ever reached it, in order."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedVersion:
    """One entry of the log.

    Attributes:
        version: of the policy.
        trainer_id: who sent the step.
        sequence: the trainer's number.
        refused: whether the step was refused.
    """

    version: int
    trainer_id: str
    sequence: int
    refused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """A policy's log over its whole life.

    Attributes:
        entries: in the order in which Redis took them.
        taken_over_at: by epoch: the last version in the log when the epoch began.
    """

    entries: list[LoggedVersion] = field(default_factory=list)
    taken_over_at: dict[int, int] = field(default_factory=dict)

    def keeps(self, epoch: int, version: int) -> bool:
        """Whether what an owner had at a version became part of the log: no later owner began before it."""
        return all(version <= begun for later, begun in self.taken_over_at.items() if later > epoch)


def read_log(file: Path, *, policy: str) -> Log:
    """The log of a policy that was neither flushed nor rolled back."""
    return read_logs(file)[policy]


def read_logs(file: Path) -> Mapping[str, Log]:
    """The logs of all policies, by name; see `read_log`."""
    logs: dict[str, Log] = defaultdict(Log)
    for command in commands(file.read_bytes()):
        word, key = command[0].upper(), command[1] if len(command) > 1 else b""
        if not (word == b"XADD" and key.endswith(b":log")) and not (word == b"HINCRBY" and key.endswith(b":owner")):
            continue
        log = logs[key[key.index(b"{") + 1 : key.index(b"}")].decode()]
        last = log.entries[-1].version if log.entries else 0
        if word == b"HINCRBY" and command[2] == b"epoch":
            log.taken_over_at[len(log.taken_over_at) + 1] = last
        if word == b"XADD":
            fields = dict(zip(command[3::2], command[4::2], strict=True))
            if b"at" not in fields:  # the entry that starts a log
                continue
            entry = LoggedVersion(
                version=int(command[2].split(b"-")[0]),
                trainer_id=fields.get(b"trainer", b"").decode(),
                sequence=int(fields.get(b"sequence", b"0")),
                refused=b"refused" in fields,
            )
            log.entries.append(entry)
    return logs


def commands(data: bytes) -> Iterator[list[bytes]]:
    """The commands of a file; a last one that was cut off is left out, as Redis does."""
    position = 0
    while position < len(data):
        command, position = _command(data, position)
        if not command:
            return
        yield command


def _command(data: bytes, position: int) -> tuple[list[bytes], int]:
    count, position = _number(data, position, b"*")
    words = []
    for _ in range(count):
        length, position = _number(data, position, b"$")
        if length < 0 or position + length + 2 > len(data):
            return [], len(data)
        words.append(data[position : position + length])
        position += length + 2
    return words, position


def _number(data: bytes, position: int, mark: bytes) -> tuple[int, int]:
    end = data.find(b"\r\n", position)
    if end < 0:
        return -1, len(data)
    assert data[position : position + 1] == mark, f"the file is damaged at byte {position}"
    return int(data[position + 1 : end]), end + 2
