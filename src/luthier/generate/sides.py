"""One prompt's answers from a base and from what was tuned on it, side by side, with one copy of the weights.

    base    engine, adapter off  ┐ a step each in turn
    tuned   engine, adapter on   ┘

The base is the same decoder with its LoRA switched off, so a second model takes no memory but that of its text's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from luthier.data.tokenizer import ChatTokenizer
from luthier.generate.engine import Engine
from luthier.generate.generate import Answer, Completion
from luthier.generate.request import Request
from luthier.model.decoder import Decoder
from luthier.model.lora import lora_enabled

__all__ = ["Show", "Side", "answer_sides"]

Show = Callable[[int, str, bool], None]
"""Called with the place of a side, the next piece of its text (may be empty), and whether its answer ends with it."""


@dataclass(frozen=True)
class Side:
    """A request, answered with the decoder's adapter or without; where it has none that is the same."""

    request: Request
    adapted: bool = True


def answer_sides(
    decoder: Decoder, tokenizer: ChatTokenizer, sides: Sequence[Side], *, show: Show, stopped: Callable[[], bool]
) -> list[Completion]:
    """The answers, in the order of `sides`; each is what it would be alone. Special tokens are not text.

    `stopped` is asked between steps: where it says so, what there is until then is the answer. Raises UsageError before
    anything is written where one of the requests cannot be answered. The adapter is on again afterwards.
    """
    engines: list[Engine] = []
    for side in sides:
        with lora_enabled(decoder, side.adapted):
            engine = Engine(decoder, lambda ids: tokenizer.decode(ids, skip_special=True), slots=1)
        engine.add(side.request)
        engines.append(engine)
    answers = [Answer(side.request) for side in sides]
    while not stopped() and not all(engine.idle for engine in engines):
        for place, (side, engine) in enumerate(zip(sides, engines, strict=True)):
            with lora_enabled(decoder, side.adapted):
                events = engine.step()
            for event in events:
                answers[place].put(event)
                show(place, event.text, event.finish is not None)
    return [answer.made() for answer in answers]
