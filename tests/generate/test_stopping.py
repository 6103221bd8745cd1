"""Stop strings across any cutting of the text: what comes out never depends on it, and never holds a part of one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import UsageError
from luthier.generate.stopping import StopStrings

SHORT = st.text(alphabet="ab\n", max_size=14)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: the first moment at which the text ends with a stop string, the longest of them."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(pieces=st.lists(SHORT, max_size=8), stops=STOPS)
def test_it_is_the_definition_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    stopping = StopStrings(stops)
    given_out = ""
    for piece in pieces:
        given_out += stopping.put(piece)
        # Never a character that turns out to belong to the stop.
        assert first_stop("".join(pieces), stops)[0].startswith(given_out)
    found = stopping.found
    assert (given_out + stopping.finish(), found) == first_stop("".join(pieces), stops)


def test_what_cannot_be_the_beginning_is_not_held_back() -> None:
    stopping = StopStrings(["\n\nUser:"])
    assert stopping.put("one\n") == "one"
    assert stopping.put("two") == "\ntwo"
    assert stopping.put("\n\nUse") == ""
    assert stopping.finish() == "\n\nUse"


def test_strings_that_cannot_stop_anything_are_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStrings(["a", ""])
    with pytest.raises(UsageError, match="1,001 characters, 1,000 are the most"):
        StopStrings(["x" * 1001])
