"""The answers to one request while they are made, and the two forms in which they are told: chat and text.

Answer     the jobs of one request: its events as they come, its time limit, its end when the client goes
Choice     what the events of one job come to
Form       OpenAI's JSON for both: a whole document, or chunks of a stream
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from luthier.generate.request import Event, Request, TokenLogprob
from luthier.serve.pieces import Pieces
from luthier.serve.refusals import Refusal
from luthier.serve.scheduler import Job, Scheduler

__all__ = ["Answer", "ChatForm", "Choice", "Form", "TextForm", "document", "usage"]


REST = 0.001
"""Seconds between two pieces of a stream for each stream that is under way. A piece costs a quarter of a millisecond to
write, whatever it holds: so many clients at once take a quarter of a processor, and each gets more tokens a piece."""


class Answer:
    """The jobs of one request, one for each choice; queued when it is made. Raises Refusal as Scheduler.submit.

    It is in `under_way` until it is closed.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model: str,
        requests: Sequence[Request],
        seconds: float,
        under_way: set[Answer],
        *,
        whole: bool,
    ) -> None:
        """`whole`: nothing is looked at before a choice has ended, so nobody is woken for single tokens."""
        self._scheduler, self._whole, self._under_way = scheduler, whole, under_way
        self.seconds = seconds
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._resting: asyncio.TimerHandle | None = None
        self.jobs = [Job(model, request, self._woken) for request in requests]
        scheduler.submit(self.jobs)
        said = f"The answer was not through after {seconds:g} seconds."
        self._clock = self._loop.call_later(seconds, self.end, Refusal(504, said, code="timeout"))
        under_way.add(self)

    def _woken(self, job: Job) -> None:
        if job.ended or not (self._whole or self._resting):
            self._wake.set()

    def _rested(self) -> None:
        self._resting = None
        if any(job.events for job in self.jobs):
            self._wake.set()

    @property
    def through(self) -> bool:
        """Whether all of it has been made, though it may not all be sent."""
        return all(job.ended for job in self.jobs)

    def end(self, failure: Refusal) -> None:
        """End what has not ended, with an error; its slots are free at once."""
        left = [job for job in self.jobs if not job.ended]
        self._scheduler.cancel(left)
        for job in left:
            job.failure = failure
        self._wake.set()

    def close(self) -> None:
        """Nobody waits for the rest."""
        self._clock.cancel()
        if self._resting is not None:
            self._resting.cancel()
        self._under_way.discard(self)
        self._scheduler.cancel(self.jobs)

    async def events(self) -> AsyncIterator[list[tuple[int, list[Event]]]]:
        """What has come since the last time, by choice, until all have ended. Raises Refusal where one failed.

        Between two of them lies a rest, unless one ends meanwhile.
        """
        open_ = set(range(len(self.jobs)))
        while open_:
            await self._wake.wait()
            self._wake.clear()
            found: list[tuple[int, list[Event]]] = []
            for index in sorted(open_):
                job = self.jobs[index]
                if job.failure is not None:
                    raise job.failure
                if job.events:
                    found.append((index, job.events))
                    job.events = []
                if job.ended:
                    open_.discard(index)
            if found:
                if open_ and not self._whole:
                    if self._resting is not None:
                        self._resting.cancel()
                    self._resting = self._loop.call_later(REST * len(self._under_way), self._rested)
                yield found


@dataclass
class Choice:
    """What the events of one job come to. `drawn`: tokens with their logprobs, stop tokens left out."""

    request: Request
    text: list[str] = field(default_factory=list)
    drawn: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    tokens: int = 0
    finish: str | None = None

    def put(self, events: Sequence[Event]) -> None:
        """More of it."""
        for event in events:
            if event.text:
                self.text.append(event.text)
            if event.finish is not None:
                self.finish = event.finish.reason
            if event.token not in self.request.stop_ids:
                self.tokens += 1
                if event.logprob is not None:
                    self.drawn.append((event.token, event.logprob))

    def take(self) -> tuple[str, list[tuple[int, TokenLogprob]]]:
        """The text and the logprobs since the last time."""
        text, drawn = "".join(self.text), self.drawn
        self.text, self.drawn = [], []
        return text, drawn


def usage(prompt: int, choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens of the prompts and of the answers, stop tokens not counted."""
    written = sum(choice.tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class Form(Protocol):
    """One of the two ways in which answers are told. `drawn` is None where logprobs were not asked for."""

    prefix: str
    whole_kind: str
    chunk_kind: str

    def choice(self, index: int, text: str, drawn: list[tuple[int, TokenLogprob]] | None, finish: str | None) -> object:
        """A whole choice."""

    def opening(self, index: int, /) -> object | None:
        """What a stream says of a choice before its first token; None: nothing."""

    def part(self, index: int, text: str, drawn: list[tuple[int, TokenLogprob]] | None) -> object:
        """More of a choice in a stream."""

    def closing(self, index: int, finish: str | None) -> object:
        """The end of a choice in a stream."""


class ChatForm:
    """/v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces

    def choice(self, index: int, text: str, drawn: list[tuple[int, TokenLogprob]] | None, finish: str | None) -> object:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(drawn), "finish_reason": finish}

    def opening(self, index: int) -> object | None:
        return self._delta(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def part(self, index: int, text: str, drawn: list[tuple[int, TokenLogprob]] | None) -> object:
        return self._delta(index, {"content": text}, self._logprobs(drawn), None)

    def closing(self, index: int, finish: str | None) -> object:
        return self._delta(index, {}, None, finish)

    def _delta(self, index: int, delta: object, logprobs: object, finish: str | None) -> object:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, drawn: list[tuple[int, TokenLogprob]] | None) -> object:
        if drawn is None:
            return None
        content = [
            {**self._told(token, found.logprob), "top_logprobs": [self._told(*one) for one in found.top]}
            for token, found in drawn
        ]
        return {"content": content, "refusal": None}

    def _told(self, token: int, logprob: float) -> dict[str, object]:
        text, raw = self._pieces(token)
        return {"token": text, "logprob": logprob, "bytes": raw}


class TextForm:
    """/v1/completions. `text_offset` counts the characters of the tokens before, in the answer."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, text: str, drawn: list[tuple[int, TokenLogprob]] | None, finish: str | None) -> object:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, drawn), "finish_reason": finish}

    def opening(self, _index: int) -> object | None:
        return None

    def part(self, index: int, text: str, drawn: list[tuple[int, TokenLogprob]] | None) -> object:
        return self.choice(index, text, drawn, None)

    def closing(self, index: int, finish: str | None) -> object:
        return self.choice(index, "", None, finish)

    def _logprobs(self, index: int, drawn: list[tuple[int, TokenLogprob]] | None) -> object:
        if drawn is None:
            return None
        tokens = [self._pieces(token)[0] for token, _ in drawn]
        offsets, at = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[index] = at
        top = [self._top((token, found.logprob), found) for token, found in drawn]
        return {
            "tokens": tokens,
            "token_logprobs": [found.logprob for _, found in drawn],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, drawn: tuple[int, float], found: TokenLogprob) -> dict[str, float]:
        """The likeliest and the one that was drawn; of parts of characters that show alike, the likeliest."""
        told: dict[str, float] = {}
        for token, logprob in (*found.top, drawn):
            told.setdefault(self._pieces(token)[0], logprob)
        return told


async def document(answer: Answer, form: Form) -> tuple[list[object], list[Choice]]:
    """The choices of an answer once all have ended, as JSON and as counts. Raises Refusal where one failed."""
    choices = [Choice(job.request) for job in answer.jobs]
    async for batch in answer.events():
        for index, events in batch:
            choices[index].put(events)
    told: list[object] = []
    for index, choice in enumerate(choices):
        text, drawn = choice.take()
        told.append(form.choice(index, text, None if choice.request.logprobs is None else drawn, choice.finish))
    return told, choices
