"""What was damaged is found, wherever it lies: in Redis's file, which Redis loads without a look."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise_server.store import Damaged, EmbeddedRedis, LogEntry, Page, RedisStore, checksum, seal
from equipoise_server.store.checksums import check, of_columns, opened_text, sealed_text
from tests.server.store.conftest import logged, policy, write_header, write_page

FIELDS = st.dictionaries(st.text(min_size=1, max_size=4), st.binary(max_size=8), min_size=1, max_size=3)


def chained(*contents: bytes, after: int = 0) -> list[LogEntry]:
    """Sealed entries from version 1."""
    entries = []
    for version, content in enumerate(contents, 1):
        entries.append(seal(LogEntry(version=version, fields={"ids": content}), after=after))
        after = checksum(entries[-1])
    return entries


@given(FIELDS, st.integers(0, 2**32 - 1), st.data())
def test_any_changed_byte_is_found(fields: dict[str, bytes], after: int, data: st.DataObject) -> None:
    entry = seal(LogEntry(version=7, fields=fields), after=after)
    check("p", entry, before=after)
    name = data.draw(st.sampled_from(sorted(fields)))
    value = bytearray(fields[name] or b"\0")
    value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for changed in (
        LogEntry(version=7, fields=fields | {name: bytes(value)}, seal=entry.seal),
        LogEntry(version=8, fields=fields, seal=entry.seal),
        LogEntry(version=7, fields=fields, seal=entry.seal[:-1]),
    ):
        with pytest.raises(Damaged, match=f"log entry {changed.version} is damaged"):
            check("p", changed, before=after)
    assert of_columns(7, fields) != of_columns(7, fields | {name: bytes(value)})
    assert of_columns(7, fields) != of_columns(8, fields)


def test_an_entry_in_another_ones_place_is_found_at_its_successor() -> None:
    first, second, third = chained(b"a", b"b", b"c")
    _, other, _ = chained(b"a", b"x", b"c")
    check("p", other, before=checksum(first))
    with pytest.raises(Damaged, match="log entry 2, which is not the one that 3 followed"):
        check("p", third, before=checksum(other))
    check("p", third, before=checksum(second))


def test_entries_and_texts_of_earlier_releases_have_no_checksum() -> None:
    check("p", LogEntry(version=1, fields={"ids": b"x"}), before=3)
    assert opened_text("p", '{"rule": "ema_sign"}') == '{"rule": "ema_sign"}'


@given(st.text(alphabet=st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1), st.data())
def test_a_text_that_was_changed_is_found(text: str, data: st.DataObject) -> None:
    sealed = sealed_text(text)
    assert opened_text("p", sealed) == text
    place = data.draw(st.integers(0, len(text) - 1))
    changed = sealed[:place] + ("a" if sealed[place] != "a" else "b") + sealed[place + 1 :]
    with pytest.raises(Damaged, match="the specification"):
        opened_text("p", changed)


WRITTEN = {b"log-content": "log entry 2", b"page-content": "page 3", b"header-content": "the header"}


@pytest.mark.parametrize("content", [*WRITTEN, b"spec-content"])
async def test_a_byte_that_changed_in_rediss_file_is_found(tmp_path: Path, content: bytes) -> None:
    redis = EmbeddedRedis(tmp_path)
    await redis.start()
    store = RedisStore.connect(redis.url)
    await store.create(policy(spec='{"x": "spec-content"}'))
    owner = await store.acquire("lm", address="a:1")
    await store.append(owner, chained(b"first", b"log-content", b"third"))
    await write_page(store, owner, 3, Page(version=3, columns={"raw": b"page-content"}))
    await write_header(store, owner, {"scalars": b"header-content"})
    await store.close()
    await redis.stop()
    change(tmp_path, content)
    await redis.start()
    store = RedisStore.connect(redis.url)
    try:
        if content == b"spec-content":
            with pytest.raises(Damaged, match="the specification"):
                await store.get("lm")
            assert await store.list_policies(limit=10) == []
            return
        reads = {
            "log entry 2": logged(store),
            "page 3": store.read_page(owner, 3),
            "the header": store.read_header(owner),
        }
        for what, read in reads.items():
            if what == WRITTEN[content]:
                with pytest.raises(Damaged, match=what):
                    await read
            else:
                await read
    finally:
        await store.close()
        await redis.stop()


def change(data_dir: Path, content: bytes) -> None:
    """Changes a byte of what has this content."""
    (file,) = [path for pattern in ("*.aof", "appendonlydir/*.incr.aof") for path in data_dir.glob(pattern)]
    written = file.read_bytes()
    assert content in written
    file.write_bytes(written.replace(content, content[:-1] + b"X"))
