from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise_server.redis_url import SCHEMES, RedisUrl


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://h", RedisUrl(topology="single", hosts=(("h", 6379),))),
        ("redis://h:7000/3", RedisUrl(topology="single", hosts=(("h", 7000),), database=3)),
        ("redis://h?db=3", RedisUrl(topology="single", hosts=(("h", 6379),), database=3)),
        ("redis://:p%40ss@h/", RedisUrl(topology="single", hosts=(("h", 6379),), password="p@ss")),
        (
            "rediss://user:secret@[::1]:7000",
            RedisUrl(topology="single", hosts=(("::1", 7000),), tls=True, username="user", password="secret"),
        ),
        ("unix:///run/a@b.sock?db=2", RedisUrl(topology="single", socket="/run/a@b.sock", database=2)),
        (
            "unix://u:p@/run/redis.sock",
            RedisUrl(topology="single", socket="/run/redis.sock", username="u", password="p"),
        ),
        (
            "redis+sentinel://u:p@a:1,b,[::1]:3/main/2",
            RedisUrl(
                topology="sentinel",
                hosts=(("a", 1), ("b", 26379), ("::1", 3)),
                master="main",
                database=2,
                username="u",
                password="p",
            ),
        ),
        ("rediss+sentinel://a/main", RedisUrl(topology="sentinel", hosts=(("a", 26379),), tls=True, master="main")),
        ("redis+cluster://:p@a:1,b", RedisUrl(topology="cluster", hosts=(("a", 1), ("b", 6379)), password="p")),
        ("rediss+cluster://a", RedisUrl(topology="cluster", hosts=(("a", 6379),), tls=True)),
    ],
)
def test_a_url_says_where_redis_is(text: str, expected: RedisUrl) -> None:
    assert RedisUrl.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("http://user:hu5nter@h", "must start with one of redis://"),
        ("h:6379", "must start with one of redis://"),
        ("", "must start with one of redis://"),
        ("redis://user:hu5nter@", "must have a host"),
        ("redis://user:hu5nter@h:x", "name:port"),
        ("redis://user:hu5nter@h:99999", "name:port"),
        ("redis://user:hu5nter@h:0", "name:port"),
        ("redis://:hu5nter", "name:port"),
        ("redis://user:hu5nter@h,i", "must have one host"),
        ("redis://user:hu5nter@h/x", "a number as its database"),
        ("redis://user:hu5nter@h/1?db=2", "names the database twice"),
        ("redis://user:hu5nter@h?socket_timeout=5", "has no option 'socket_timeout'; known: db"),
        ("redis://h?password=hu5nter", "has no option 'password'"),
        ("redis://h?hu5nter-word", "has no option that"),
        ("redis://:hu5/nter@h", "percent-encoded"),
        ("redis://:hu5?nter@h", "percent-encoded"),
        ("redis://:hu5#nter@h", "percent-encoded"),
        ("redis://:hu5@nter@h", "percent-encoded"),
        ("redis://h#hu5nter", "must not contain '#'"),
        ("unix://", "path of a socket"),
        ("unix://h/s", "path of a socket"),
        ("redis+sentinel://user:hu5nter@h", "must name the master"),
        ("redis+sentinel://user:hu5nter@h/m/x", "a number as its database"),
        ("redis+sentinel://user:hu5nter@h,,i/m", "must have a host"),
        ("redis+sentinel://h/m?ssl=true", "has no option 'ssl'; TLS is rediss"),
        ("redis+sentinel://h/m?sentinel_password=hu5nter", "has no option 'sentinel_password'"),
        ("redis+cluster://user:hu5nter@h:1,h:y", "name:port"),
        ("redis+cluster://user:hu5nter@h/1", "no databases"),
    ],
)
def test_a_bad_url_is_refused_by_its_rule_and_not_repeated(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as caught:
        RedisUrl.parse(text)
    assert not any(piece in str(caught.value) for piece in ("hu5", "nter"))


@given(st.text(min_size=1), st.sampled_from(["redis://:{}@h/1", "redis+sentinel://:{}@h/m", "redis+cluster://:{}@h"]))
def test_every_password_can_be_written(password: str, shape: str) -> None:
    try:
        text = shape.format(quote(password, safe=""))
    except UnicodeEncodeError:  # surrogates are no text
        return
    url = RedisUrl.parse(text)
    assert (url.password, url.hosts[0][0]) == (password, "h")


@given(st.sampled_from(SCHEMES), st.text(alphabet="/?#@:[]%,&=zy", max_size=12), st.text("/?#@:[]%,&=", max_size=6))
def test_a_secret_written_as_it_is_is_understood_or_refused_but_never_told(
    scheme: str, before: str, after: str
) -> None:
    text = f"{scheme}://:{before}hunter2{after}@h/m"
    try:
        told = str(RedisUrl.parse(text))
    except ValueError as error:
        told = str(error)
    assert "hunter2" not in told


def test_a_url_as_text_is_the_same_without_its_password() -> None:
    for text, shown in {
        "rediss://user:hu5nter@h:1/2": "rediss://user:***@h:1/2",
        "redis://:hu5nter@[::1]": "redis://:***@[::1]:6379",
        "unix:///run/r.sock": "unix:///run/r.sock",
        "rediss+sentinel://a,b:2/m/3": "rediss+sentinel://a:26379,b:2/m/3",
        "redis+cluster://u:hu5nter@a": "redis+cluster://u:***@a:6379",
    }.items():
        url = RedisUrl.parse(text)
        assert str(url) == shown
        assert "hu5nter" not in repr(url)
