"""Answers as they come: server-sent events, as OpenAI's clients read them, and what is done when a client goes.

    data: {chunk}      for each choice, all that has come since the last one
    data: [DONE]

Where many streams are under way a chunk carries several tokens (answers.py: REST), and where a client reads slowly
too: the engine waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from luthier.serve.answers import Answer, Choice, Form, usage
from luthier.serve.refusals import Refusal

__all__ = ["GONE", "Envelope", "EventStream", "chunks", "watched"]

GONE = 499
"""The status that is counted for a client that left (nginx's number; nobody is sent it)."""

_READING = 10.0
"""Seconds after an answer's own time in which its client may read the rest of it."""

_DONE = b"data: [DONE]\n\n"


class Envelope:
    """What all chunks of a stream have in common. `count` says that the last one counts tokens."""

    def __init__(self, head: dict[str, object], prompt_tokens: int, *, count: bool) -> None:
        self.prompt_tokens, self.count = prompt_tokens, count
        self._head = {**head, "usage": None} if count else head

    def line(self, *told: object) -> bytes:
        """A chunk with these choices."""
        return b"data: %b\n\n" % orjson.dumps({**self._head, "choices": told})

    def ending(self, choices: list[Choice]) -> bytes:
        """The chunk that counts, where it was asked for, and the mark of the end."""
        if not self.count:
            return _DONE
        last = {**self._head, "choices": [], "usage": usage(self.prompt_tokens, choices)}
        return b"data: %b\n\n%b" % (orjson.dumps(last), _DONE)


async def chunks(answer: Answer, form: Form, envelope: Envelope) -> AsyncIterator[bytes]:
    """The stream's bytes, in pieces to be sent at once. A failure on the way is its last event."""
    choices = [Choice(job.request) for job in answer.jobs]
    opened = [form.opening(index) for index in range(len(choices))]
    if first := b"".join(envelope.line(one) for one in opened if one is not None):
        yield first
    try:
        async for batch in answer.events():
            lines: list[bytes] = []
            for index, events in batch:
                choice = choices[index]
                choice.put(events)
                text, drawn = choice.take()
                asked = choice.request.logprobs is not None
                if text or (asked and drawn):
                    lines.append(envelope.line(form.part(index, text, drawn if asked else None)))
                if choice.finish is not None:
                    lines.append(envelope.line(form.closing(index, choice.finish)))
            if lines:
                yield b"".join(lines)
    except Refusal as failure:
        yield b"data: %b\n\n" % orjson.dumps(failure.document)
        return
    yield envelope.ending(choices)


@contextmanager
def watched(answer: Answer, receive: Receive) -> Iterator[None]:
    """While the block runs, the answer ends when the client goes; at its end nothing of it goes on."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        answer.end(Refusal(GONE, "The client has gone."))

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        answer.close()


class EventStream(Response):
    """A response that is written as `answer` comes."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, form: Form, envelope: Envelope) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Response has set the length of the body that it does not have.
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._answer, self._form, self._envelope = answer, form, envelope

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        with watched(self._answer, receive), suppress(asyncio.TimeoutError):
            # A client that reads nothing would keep it for ever: what is returned from unfinished is closed.
            await asyncio.wait_for(self._write(send), self._answer.seconds + _READING)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in chunks(self._answer, self._form, self._envelope):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
