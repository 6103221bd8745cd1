"""How the readers here say what is wrong with a file, and what they take a JSON object to be."""

from __future__ import annotations

__all__ = ["Wrong", "once"]


class Wrong(Exception):  # noqa: N818  (never leaves guard)
    """What is wrong, as the rest of a sentence that begins with the file's name."""


def once(pairs: list[tuple[str, object]], *, or_same: bool = False) -> dict[str, object]:
    """The object of these pairs: an `object_pairs_hook` of json. With `or_same`, a key may stand again with its value.

    Raises:
        Wrong: a key stands twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, value in pairs:
            if or_same and (made[key] != value or type(made[key]) is not type(value)):
                raise Wrong(f"gives {key[:200]!r} twice, with two values")
            if not or_same and key in seen:
                raise Wrong(f"names {key[:200]!r} twice")
            seen.add(key)
    return made
