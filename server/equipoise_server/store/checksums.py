"""CRC-32 of what is stored: a damaged byte is found, and so are log entries that do not follow each other.

Redis checks nothing that it reads from its append-only file. A log entry carries its own checksum, which covers that of
the entry before it, and the latter: so an entry that took another one's place is found at its successor.
"""

import struct
from collections.abc import Mapping
from zlib import crc32

from equipoise_server.store.errors import Damaged
from equipoise_server.store.records import LogEntry

_SEAL = struct.Struct("<II")
_NUMBER = struct.Struct("<Q")


def seal(entry: LogEntry, *, after: int) -> LogEntry:
    """The entry with its checksum, behind one whose checksum is `after` (0: not known)."""
    return LogEntry(version=entry.version, fields=entry.fields, seal=_SEAL.pack(after, _of_entry(entry, after)))


def checksum(entry: LogEntry) -> int:
    """Of a sealed entry; 0 of one that has none, as releases before 0.2 wrote them."""
    own: int = _SEAL.unpack(entry.seal)[1] if entry.seal else 0
    return own


def check(policy: str, entry: LogEntry, *, before: int) -> None:
    """Raises Damaged unless the entry is what was sealed, behind an entry of checksum `before` (0: not known)."""
    if not entry.seal:
        return
    what = f"log entry {entry.version}"
    if len(entry.seal) != _SEAL.size:
        raise Damaged(policy, what=what)
    after, own = _SEAL.unpack(entry.seal)
    if own != _of_entry(entry, after):
        raise Damaged(policy, what=what)
    if before and after and after != before:
        raise Damaged(policy, what=f"log entry {entry.version - 1}, which is not the one that {entry.version} followed")


def of_columns(version: int, columns: Mapping[str, bytes]) -> bytes:
    """Of a page or header, in any order of its columns."""
    total = crc32(_NUMBER.pack(version))
    for name in sorted(columns):
        total = _of_pair(name, columns[name], total)
    return b"%08x" % total


def sealed_text(text: str) -> str:
    """A text with its checksum on a line of its own."""
    return f"{text}\n{crc32(text.encode()):08x}"


def opened_text(policy: str, sealed: str) -> str:
    """The text of `sealed_text`, or one without a checksum. Raises Damaged."""
    text, line, own = sealed.rpartition("\n")
    if not line:
        return sealed
    if own != f"{crc32(text.encode()):08x}":
        raise Damaged(policy, what="the specification")
    return text


def _of_entry(entry: LogEntry, after: int) -> int:
    total = crc32(_NUMBER.pack(entry.version), after)
    for name, value in entry.fields.items():
        total = _of_pair(name, value, total)
    return total


def _of_pair(name: str, value: bytes, total: int) -> int:
    key = name.encode()
    total = crc32(key, crc32(_NUMBER.pack(len(key)), total))
    return crc32(value, crc32(_NUMBER.pack(len(value)), total))
