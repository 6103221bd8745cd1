"""Which languages the rows are in: guessed by py3langid on an evenly spaced sample of at most 500 rows.

A guess needs some words: texts with few letters, and guesses of low probability, count as not known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

__all__ = ["SAMPLED", "UNKNOWN", "languages"]

SAMPLED = 500
"""How many rows are looked at."""
UNKNOWN = "unknown"
_READ = 400
_FEWEST = 20
_SURE = 0.6


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages(texts: Sequence[str]) -> dict[str, int]:
    """ISO 639 code -> how many of the texts are in it, most frequent first; `UNKNOWN` last."""
    counted = Counter(_language(text[:_READ]) for text in texts)
    unknown = counted.pop(UNKNOWN, 0)
    return dict(counted.most_common()) | ({UNKNOWN: unknown} if unknown else {})


def _language(text: str) -> str:
    if sum(map(str.isalpha, text)) < _FEWEST:
        return UNKNOWN
    name, probability = _identifier().classify(text)
    return str(name) if probability >= _SURE else UNKNOWN
