"""Typed reading of one JSON object: a wrong type or an impossible size is an error that names the file and the key."""

from __future__ import annotations

import math
from collections.abc import Mapping

from luthier.errors import ModelError

__all__ = ["LARGEST_SIZE", "Keys"]

LARGEST_SIZE = 2**31 - 1
"""What no size, position or token id of a model exceeds."""


class Keys:
    """One JSON object of a model's files; every reading method raises ModelError."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        """`where` names the object in messages: its file, and the key that holds it."""
        self.values = values
        self.where = where

    def _wrong(self, key: str, wanted: str) -> ModelError:
        value = self.values.get(key)
        said = "is missing" if value is None else f"is {repr(value)[:200]}"
        return ModelError(f"{self.where}: `{key}` {said}, it must be {wanted}", "Fetch the model again.")

    def _given(self, key: str, default: object) -> object:
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
        """A whole number from 1 to `most`; `default` where the key is absent or null."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, "a positive whole number")
        if value > most:
            raise self._wrong(key, f"at most {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number from 0."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise self._wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A text."""
        value = self._given(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def ids(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self.values.get(key, default)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= LARGEST_SIZE for one in found):
            raise self._wrong(key, "a token id or a list of them")
        return tuple(one for one in found if isinstance(one, int))

    def inside(self, key: str) -> Keys | None:
        """The object at a key; None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Keys(value, f"{self.where}: {key}")
