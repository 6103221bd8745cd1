"""A choice as a value: what was chosen, why, on whose word, and what was not chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["DEFAULT", "YOURS", "Decision"]

T_co = TypeVar("T_co", covariant=True)

YOURS = "your recipe"
"""The source of a value that the user set."""
DEFAULT = "the recipe's default"
"""The source of a value that the recipe leaves as it is."""


@dataclass(frozen=True)
class Decision(Generic[T_co]):
    """One setting, under its name in the recipe (`train.learning_rate`).

    reason: a sentence with the numbers it rests on. source: a paper, a measurement, `YOURS` or `DEFAULT`.
    rejected: what else was possible, each with why not.
    """

    setting: str
    value: T_co
    reason: str
    source: str
    rejected: tuple[str, ...] = ()
