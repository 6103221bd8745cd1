"""What a single token is, as text and as bytes: for logprobs, which name tokens one by one.

A token may hold a part of a character. Its text then shows U+FFFD, and its bytes are what joined with its neighbours'
make the character. Three ways of writing bytes into a vocabulary are read:

    byte-level BPE     each byte is one printable character (Radford et al. 2019: GPT-2's table)
    byte fallback      <0xE4>, one byte a token, in SentencePiece's vocabularies
    otherwise          the token's own text, U+2581 for a space
"""

from __future__ import annotations

import json
import re
from functools import cached_property

from luthier.data.tokenizer import ChatTokenizer

__all__ = ["Pieces"]

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of() -> dict[str, int]:
    """GPT-2's table: bytes that print stand for themselves, the others for what follows after 255, in order."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + at): byte for at, byte in enumerate(others)}


class Pieces:
    """Tokens of `tokenizer` one by one."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def __call__(self, token: int) -> tuple[str, list[int]]:
        """The text and the bytes of a token; both empty for an id that the vocabulary does not have."""
        found = self._known.get(token)
        if found is None:
            raw = self._bytes(token)
            found = self._known[token] = (raw.decode("utf-8", "replace"), list(raw))
        return found

    def _bytes(self, token: int) -> bytes:
        text = self._tokenizer.token_text(token)
        if text is None:
            return b""
        if token in self._added:
            return text.encode()
        if self._byte_level and all(sign in _BYTES for sign in text):
            return bytes(_BYTES[sign] for sign in text)
        fallback = _FALLBACK.fullmatch(text)
        return bytes([int(fallback[1], 16)]) if fallback else text.replace("\u2581", " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.backend.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        decoder = json.loads(self._tokenizer.backend.to_str()).get("decoder")
        return '"ByteLevel"' in json.dumps(decoder)


_BYTES = _byte_of()
