"""A loss far above those before it, which is worth a look at the rows of its batch.

With m the median and d the median distance from it (MAD) of the losses of the last WINDOW steps, one is flagged above

    m + max(LEAST, K · 1.4826 · d)

1.4826 · MAD estimates the standard deviation of normal noise (Hampel 1974, J. Am. Stat. Assoc. 69, p. 383), and
neither median nor MAD is moved by less than half of the values, so a spike does not hide the next one: Hampel's
identifier (Davies and Gather 1993, J. Am. Stat. Assoc. 88, p. 782). K is 6, not their 3: of a million steps with
normal noise none would be flagged, and losses of small batches have longer tails than that. A falling loss only widens
the bound. LEAST, 0.2 nats, is a perplexity a fifth higher: less is no spike, however even the losses were (late in a
run that fits its rows, d is tiny).

The window is read back from events.jsonl when a run is resumed, so the same steps are flagged.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from statistics import median

import orjson

from luthier.train.events import newest_steps

__all__ = ["LEAST", "WINDOW", "K", "Spikes"]

WINDOW = 50
K = 6.0
LEAST = 0.2
"""Nats per labelled token."""
_ENOUGH = 20
_SIGMA = 1.4826


class Spikes:
    """The losses of the last WINDOW steps."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    @classmethod
    def read(cls, events: Path) -> Spikes:
        """What stands in an event log; nothing where there is none."""
        found = cls()
        found._losses.extend(float(orjson.loads(line)["loss"]) for line in newest_steps(events, WINDOW))
        return found

    def add(self, loss: float) -> float | None:
        """Take in the loss of one step; the bound where it is above it, else None (also before the 20th step)."""
        bound = self._bound()
        self._losses.append(loss)
        return bound if bound is not None and loss > bound else None

    def _bound(self) -> float | None:
        if len(self._losses) < _ENOUGH:
            return None
        middle = median(self._losses)
        spread = median(abs(loss - middle) for loss in self._losses)
        return middle + max(LEAST, K * _SIGMA * spread)
