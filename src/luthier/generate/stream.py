"""Text as soon as it is certain, and never half a character.

A token may hold a part of a UTF-8 sequence, and some decoders drop a leading space, so text is taken as the difference
of two decodings (as text-generation-inference and vLLM do it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a decoder shows for bytes that are not a whole character (yet)."""


class TextStream:
    """Ids in, text out as soon as it is certain. The pieces joined are `decode` of all ids.

    `decode` maps ids to text. `put` gives the text that became certain ("" while a character is incomplete);
    `finish` gives what is left, with U+FFFD for bytes that never became a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # ids before this are done with; those from here on give the next ones their context
        self._given = 0  # ids before this have been given out as text

    def put(self, token: int) -> str:
        """The text that `token` completes."""
        self._ids.append(token)
        given, whole = self._pair()
        if len(whole) <= len(given) or whole.endswith(BROKEN):
            return ""
        # One given token stays as context, so that a decoder which strips a leading space strips none here.
        self._start, self._given = self._given, len(self._ids)
        return whole[len(given) :]

    def finish(self) -> str:
        """The rest, whole or not."""
        given, whole = self._pair()
        self._start = self._given = len(self._ids)
        return whole[len(given) :]

    def _pair(self) -> tuple[str, str]:
        return self._decode(self._ids[self._start : self._given]), self._decode(self._ids[self._start :])
