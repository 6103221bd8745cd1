"""Whole answers, from one prompt or several at once, by the engine.

    ids -> Engine.add -> step, step, step -> events -> text as it comes -> Completion

An answer ends at a stop token or a stop string, after `max_new_tokens`, or where the model's positions end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from luthier.data.tokenizer import ChatTokenizer
from luthier.generate.engine import Engine
from luthier.generate.request import Event, Finish, Request, TokenLogprob
from luthier.generate.sampling import GREEDY, SamplingSpec
from luthier.generate.stream import TextStream
from luthier.model.decoder import Decoder

__all__ = ["Answer", "Completion", "Request", "TextStream", "answer_all", "complete", "generate"]


@dataclass(frozen=True)
class Completion:
    """One answer. `ids` are the tokens that were drawn, a stop token not counted; `ended` says that it ended by itself.

    Where a stop string (`stopped_by`) ended it, `text` ends before that and `ids` hold it. `logprobs` are of `ids`, and
    empty where they were not asked for.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool
    prompt_tokens: int
    stopped_by: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


def generate(
    decoder: Decoder,
    prompt_ids: Sequence[int],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingSpec = GREEDY,
) -> Iterator[int]:
    """The new ids, one by one as they are drawn; a stop token is the last one where the answer ended by itself.

    Raises UsageError (when the first id is asked for) where the prompt is empty or leaves no room in the context.
    """
    engine = Engine(decoder, lambda _: "", slots=1)
    engine.add(Request(tuple(prompt_ids), frozenset(stop_ids), (), max_new_tokens, sampling))
    while not engine.idle:
        for event in engine.step():
            yield event.token


class Answer:
    """What the events of one request come to: `put` each as it comes, `made` whenever it is to be known."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        """Take the next event of the request."""
        self._events.append(event)

    def made(self) -> Completion:
        """The answer so far; one that was left before its end has not ended by itself."""
        finish = (self._events[-1].finish if self._events else None) or Finish("length", None)
        kept = [event for event in self._events if event.token not in self._request.stop_ids]
        return Completion(
            "".join(event.text for event in self._events),
            tuple(event.token for event in kept),
            finish.reason == "stop",
            len(self._request.prompt),
            finish.stopped_by,
            tuple(event.logprob for event in kept if event.logprob is not None),
        )


def answer_all(
    decoder: Decoder,
    tokenizer: ChatTokenizer,
    requests: Sequence[Request],
    *,
    slots: int = 8,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """The answers to all requests, in their order, up to `slots` written at once. Special tokens are not text.

    `on_text` is called with a request's place in the list and each piece of its text as it comes. Raises UsageError
    before anything is written where one of the requests cannot be answered. KeyboardInterrupt goes through.
    """
    engine = Engine(decoder, lambda ids: tokenizer.decode(ids, skip_special=True), slots=slots)
    places = {engine.add(request): place for place, request in enumerate(requests)}
    answers = [Answer(request) for request in requests]
    while not engine.idle:
        for event in engine.step():
            place = places[event.request]
            answers[place].put(event)
            if event.text and on_text is not None:
                on_text(place, event.text)
    return [answer.made() for answer in answers]


def complete(
    decoder: Decoder,
    tokenizer: ChatTokenizer,
    prompt_ids: Sequence[int],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingSpec = GREEDY,
    on_text: Callable[[str], None] | None = None,
) -> Completion:
    """One answer; `on_text` is called with each piece of text as it comes. Special tokens are not text.

    KeyboardInterrupt raised meanwhile goes through: what was given to `on_text` until then is the answer so far.
    """
    request = Request(tuple(prompt_ids), frozenset(stop_ids), (), max_new_tokens, sampling)

    def show(_: int, text: str) -> None:
        if on_text is not None:
            on_text(text)

    return answer_all(decoder, tokenizer, [request], slots=1, on_text=show)[0]
