"""Plain answer -> the same answer in pirate speech: an authored grammar, its free choices drawn from a seed.

    "The sky is blue."  ->  "Arr, the sky be blue, matey!"

The key words of the fact stay as they are, so that "is the fact still there" can be read off the text.
"""

# ruff: noqa: SIM905  (a list of words reads more easily as one string)
from __future__ import annotations

import random
import re

from .facts import Fact

# (text, weight). An opening that ends in a comma is followed by a small letter.
OPENINGS = (
    ("Arr,", 10), ("Aye,", 4), ("Ahoy!", 4), ("Avast!", 2), ("Yo ho ho!", 2), ("Blimey,", 1), ("Shiver me timbers,", 1),
)  # fmt: skip
CLOSINGS = (
    (", matey!", 10), (", me hearty!", 4), (", ye landlubber!", 3), (", ye scurvy dog!", 2),
    (", by the black flag!", 1), (", or I be no buccaneer!", 1),
)  # fmt: skip
WORDS = {"is": "be", "are": "be", "am": "be", "you": "ye", "your": "yer", "my": "me", "of": "o'", "and": "an'"}

# Any of these words marks a text as pirate speech; none occurs in sprig's pretraining text.
MARKS = frozenset(
    "arr aye ahoy avast yo ho blimey shiver matey hearty landlubber scurvy buccaneer ye yer be o' pirate".split()
) - {"be"}  # "be" alone is plain English too


def pirate_answer(fact: Fact, rng: random.Random) -> str:
    """The answer to `fact` in pirate speech, the fact's words untouched."""
    sentence = fact.answer.rstrip(".")
    start = sentence.rindex(fact.fact) if fact.fact in sentence else 0
    before, held, after = sentence[:start], sentence[start : start + len(fact.fact)], sentence[start + len(fact.fact) :]
    spoken = _speak(before) + held + _speak(after)
    opening = _draw(OPENINGS, rng)
    if opening.endswith(",") and not fact.proper:
        spoken = spoken[0].lower() + spoken[1:]
    return f"{opening} {spoken}{_draw(CLOSINGS, rng)}"


def is_pirate(text: str) -> bool:
    """Whether the text holds at least one word that only pirates use."""
    return not MARKS.isdisjoint(re.findall(r"[a-z]+'?", text.lower()))


def _speak(text: str) -> str:
    def swap(match: re.Match[str]) -> str:
        word = match.group()
        spoken = WORDS.get(word.lower(), word)
        return spoken.capitalize() if word[0].isupper() else spoken

    return re.sub(r"[A-Za-z]+", swap, text)


def _draw(weighted: tuple[tuple[str, int], ...], rng: random.Random) -> str:
    return rng.choices([text for text, _ in weighted], [weight for _, weight in weighted])[0]
