"""Whatever a caller sends, he gets an answer that fits what peers accept of a status."""

from urllib.parse import quote

from hypothesis import given
from hypothesis import strategies as st

from equipoise_server.errors import MAX_TEXT, invalid, shortened
from equipoise_server.status import trailing_metadata

SOFT_LIMIT = 8192


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=100), st.sampled_from([1, 7, 50, 5000]))
def test_a_status_fits(text: str, times: int) -> None:
    error = invalid("REASON", "field", f"{text * times} must be short")
    details = sum(len(key) + 4 * len(value) // 3 for key, value in trailing_metadata(error))
    assert len(quote(str(error), safe=" ")) + details < SOFT_LIMIT
    assert str(error).endswith(" must be short")


def test_what_is_short_is_left_as_it_is_and_a_half_character_is_left_out() -> None:
    assert shortened("ü" * (MAX_TEXT // 2)) == "ü" * (MAX_TEXT // 2)
    assert shortened("€" * 1000) == f"{'€' * 100} … 800 characters … {'€' * 100}"
    assert shortened("a\ud800" * 1000).startswith("a?a?")
