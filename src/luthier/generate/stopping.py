"""Stop strings: the text ends before the first of them, and no part of one is shown.

A stop string may begin in one token and end in another, so text that could be the beginning of one is held back until
it is clear that it is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.errors import UsageError

__all__ = ["StopStrings"]

LONGEST = 1000
"""Characters of a stop string: what is held back is searched at each token."""


class StopStrings:
    """Text in, piece by piece; out comes what lies before the first stop string. `found` is that string, else None.

    Of several the one that ends first counts, and of those the longest, wherever tokens are cut. Raises UsageError
    for a string that is empty, or longer than 1,000 characters.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not stop:
                raise UsageError("a stop string is empty, so every answer would be", "leave it out")
            if len(stop) > LONGEST:
                raise UsageError(f"a stop string has {len(stop):,} characters, {LONGEST:,} are the most", "shorten it")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def put(self, piece: str) -> str:
        """What is certain now to lie before any stop string. Nothing comes after one was found."""
        if self.found is not None or not self._stops:
            return "" if self.found is not None else piece
        text = self._held + piece
        places = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            _, at, self.found = min(places)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`, at most all but one of them."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
