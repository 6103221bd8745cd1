"""Many prompts answered at once, each begun and ended when its turn comes (continuous batching; Yu et al. 2022, Orca).

    add(request) -> id        it waits for one of the slots
    step() -> events          waiting requests take free slots and are read; every text being written gets a token
    cancel(id)                its slot and its memory are free at once

A slot is a cache, a source of chance and what is held back of the text; nothing of it is shared. A prompt is read
alone, CHUNK tokens at a time, and about CHUNK in a step beside those that are being written, so that a long prompt does
not make others wait for all of it. What a request answers depends on its own settings and seed; on what is decoded
beside it in nothing where `exact` is true, and else by the rounding of the logits.

The engine is for one thread. Legend: R texts, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from luthier.errors import UsageError
from luthier.generate.request import Event, Finish, Request, TokenLogprob, room
from luthier.generate.sampling import make_generator, sample
from luthier.generate.steps import Steps
from luthier.generate.stopping import StopStrings
from luthier.generate.stream import TextStream
from luthier.model.cache import Cache
from luthier.model.decoder import Decoder

__all__ = ["CHUNK", "Engine"]

CHUNK = 512
"""Tokens of a prompt that are read at once."""


@dataclass
class _Slot:
    """A text: what is still to be read of its prompt, then what is written."""

    number: int
    request: Request
    room: int
    cache: Cache
    chance: torch.Generator
    stream: TextStream
    stops: StopStrings
    history: list[int]
    read: int = 0
    drawn: int = 0

    @property
    def reading(self) -> bool:
        return self.drawn == 0


class Engine:
    """Answers requests with `decoder`; `decode` maps ids to text, special tokens left out.

    Up to `slots` texts are written at once; others wait in the order in which they came. Weights are taken as they are
    now: an engine is made anew after training. The decoder's mode is set to eval by each step and put back after it.
    """

    def __init__(self, decoder: Decoder, decode: Callable[[Sequence[int]], str], *, slots: int = 8) -> None:
        if slots < 1:
            raise UsageError(f"{slots} texts at once were asked for", "ask for 1 or more")
        self.decoder, self.slots = decoder, slots
        self._decode = decode
        self._steps = Steps(decoder)
        self._numbers = count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: list[_Slot] = []

    @property
    def exact(self) -> bool:
        """Whether an answer is the same, to the last bit of its logits, whatever is decoded beside it."""
        return self._steps.exact

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting and not self._running

    def add(self, request: Request) -> int:
        """Its number, by which its events and `cancel` name it.

        Raises UsageError where the prompt is empty, holds what is no token, or leaves no room in the context, and for a
        stop string that cannot be. Nothing is added then.
        """
        room(self.decoder.config, request)
        StopStrings(request.stops)
        number = next(self._numbers)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> bool:
        """End a request; no event of it comes after. False where it has ended already, or never was."""
        left = len(self._waiting) + len(self._running)
        self._waiting = deque(pair for pair in self._waiting if pair[0] != number)
        self._running = [slot for slot in self._running if slot.number != number]
        return len(self._waiting) + len(self._running) < left

    def step(self) -> list[Event]:
        """Read some of the prompts and write a token of each text that was read: an event for each token."""
        if self.idle:
            return []
        training = self.decoder.training
        if training:  # to walk through all modules takes a tenth of a step
            self.decoder.eval()  # LoRA's dropout is for training
        try:
            self._admit()
            writing = [slot for slot in self._running if not slot.reading]
            events = self._write(writing)
            events += self._read([slot for slot in self._running if slot.reading])
        finally:
            if training:
                self.decoder.train()
        ended = {event.request for event in events if event.finish is not None}
        self._running = [slot for slot in self._running if slot.number not in ended]
        return events

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.slots:
            number, request = self._waiting.popleft()
            decoder, limit = self.decoder, room(self.decoder.config, request)
            cache = Cache(decoder.config, len(request.prompt) + limit, decoder.dtype, decoder.device)
            chance = make_generator(request.sampling, decoder.device)
            stream, stops = TextStream(self._decode), StopStrings(request.stops)
            self._running.append(_Slot(number, request, limit, cache, chance, stream, stops, list(request.prompt)))

    def _read(self, slots: Sequence[_Slot]) -> list[Event]:
        """Read CHUNK tokens of prompts in all; where a prompt ends, its first token is drawn."""
        events: list[Event] = []
        left = CHUNK
        for slot in slots:
            while left > 0 and slot.reading:
                # A prompt's cuts are its own, wherever others stand: its numbers do not depend on them.
                chunk = slot.request.prompt[slot.read : slot.read + CHUNK]
                logits_V = self._steps.read(chunk, slot.cache)
                slot.read += len(chunk)
                left -= len(chunk)
                if slot.read == len(slot.request.prompt):
                    events.append(self._draw(slot, logits_V))
        return events

    def _write(self, slots: Sequence[_Slot]) -> list[Event]:
        if not slots:
            return []
        logits_RV = self._steps.step([slot.history[-1] for slot in slots], [slot.cache for slot in slots])
        return [self._draw(slot, logits_V) for slot, logits_V in zip(slots, logits_RV, strict=True)]

    @torch.inference_mode()
    def _draw(self, slot: _Slot, logits_V: Tensor) -> Event:
        """One token, and what it means for the text."""
        request = slot.request
        token = sample(logits_V, slot.history, request.sampling, slot.chance)
        found = None if request.logprobs is None else _logprobs(logits_V, token, request.logprobs)
        slot.drawn += 1
        if token in request.stop_ids:
            text = slot.stops.put(slot.stream.finish()) + slot.stops.finish()
            return Event(slot.number, token, text, found, Finish("stop", None))
        slot.history.append(token)
        text = slot.stops.put(slot.stream.put(token))
        if slot.stops.found is None and slot.drawn == slot.room:
            text += slot.stops.put(slot.stream.finish())
            if slot.stops.found is None:
                text += slot.stops.finish()
                return Event(slot.number, token, text, found, Finish("length", None))
        finish = None if slot.stops.found is None else Finish("stop", slot.stops.found)
        return Event(slot.number, token, text, found, finish)


def _logprobs(logits_V: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """Of the model itself: before penalty, temperature and what they rule out."""
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    best = torch.topk(logprobs_V, min(alternatives, logprobs_V.numel()))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(float(logprobs_V[token]), top)
