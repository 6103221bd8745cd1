"""A conversation as it stands: what was asked, what every side answered, and how it becomes a row to train on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import orjson

from luthier.data.conversation import Source, Turn
from luthier.data.formats import FORMATS, RowError
from luthier.errors import UsageError
from luthier.generate.generate import Completion

__all__ = ["Exchange", "History"]


@dataclass(frozen=True)
class Exchange:
    """A question and each side's answer; `tries` counts the answers to it that were thrown away before."""

    question: str
    answers: tuple[Completion, ...]
    tries: int = 0


@dataclass
class History:
    """What was said so far. The system message stands before it, whenever it was set."""

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def turns(self, side: int) -> list[Turn]:
        """The conversation as this side of it has it."""
        turns = [] if self.system is None else [Turn("system", self.system)]
        for exchange in self.exchanges:
            answer = exchange.answers[side]
            turns += [Turn("user", exchange.question), Turn("assistant", answer.text, answer.ended)]
        return turns

    def row(self, place: Path) -> bytes:
        """The last side's conversation as a line of JSONL in the format `messages`, and read back as such.

        An answer that was cut or stopped is marked `"train": false`: nobody should learn to end there. `place` is
        where it is to go. Raises UsageError where it is no row to learn from.
        """
        if not self.exchanges:
            raise UsageError("there is nothing to save: no question has been answered", "ask something first")
        messages = [
            {"role": turn.role, "content": turn.content}
            | ({"train": False} if turn.role == "assistant" and not turn.train else {})
            for turn in self.turns(-1)
        ]
        row = {"messages": messages}
        try:
            FORMATS["messages"].read(row, Source(str(place), 1))
        except RowError as error:
            raise UsageError(
                f"the conversation is no row to train on: {error.reason}", "/undo or /retry that answer, then save"
            ) from error
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
