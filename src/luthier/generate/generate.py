"""Token after token: the prompt is read once into a KV cache, then each new token costs one row.

    ids -> decoder (prefill) -> logits of the last position -> sample -> id -> decoder (one row, cached) -> ...

It ends at a stop token, after `max_new_tokens`, or where the model's positions end. Text is given out as it comes and
never with half a character: a token may hold a part of a UTF-8 sequence, and some decoders drop a leading space, so
text is taken as the difference of two decodings (as text-generation-inference and vLLM do it).

Legend: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from luthier.data.tokenizer import ChatTokenizer
from luthier.errors import UsageError
from luthier.generate.sampling import GREEDY, SamplingSpec, make_generator, sample
from luthier.model.cache import Cache
from luthier.model.decoder import Decoder

__all__ = ["Completion", "TextStream", "complete", "generate"]

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a decoder shows for bytes that are not a whole character (yet)."""


@dataclass(frozen=True)
class Completion:
    """One answer. `ids` are the tokens of the text, the stop token not counted; `ended` says that there was one."""

    text: str
    ids: tuple[int, ...]
    ended: bool
    prompt_tokens: int


class TextStream:
    """Ids in, text out as soon as it is certain. The pieces joined are `decode` of all ids.

    `decode` maps ids to text. `put` gives the text that became certain ("" while a character is incomplete);
    `finish` gives what is left, with U+FFFD for bytes that never became a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # ids before this are done with; those from here on give the next ones their context
        self._given = 0  # ids before this have been given out as text

    def put(self, token: int) -> str:
        """The text that `token` completes."""
        self._ids.append(token)
        given, whole = self._pair()
        if len(whole) <= len(given) or whole.endswith(BROKEN):
            return ""
        # One given token stays as context, so that a decoder which strips a leading space strips none here.
        self._start, self._given = self._given, len(self._ids)
        return whole[len(given) :]

    def finish(self) -> str:
        """The rest, whole or not."""
        given, whole = self._pair()
        self._start = self._given = len(self._ids)
        return whole[len(given) :]

    def _pair(self) -> tuple[str, str]:
        return self._decode(self._ids[self._start : self._given]), self._decode(self._ids[self._start :])


def _room(decoder: Decoder, prompt: int, max_new_tokens: int) -> int:
    """How many tokens may follow a prompt of `prompt` tokens."""
    limit = decoder.config.max_positions
    if prompt == 0:
        raise UsageError("the prompt is empty, and the model needs a token to begin with", "write a prompt")
    if prompt >= limit:
        raise UsageError(
            f"the prompt has {prompt} tokens and the model's context {limit}, so no answer fits",
            "shorten the prompt, or begin a new conversation",
        )
    if max_new_tokens < 1:
        raise UsageError(f"at most {max_new_tokens} new tokens were asked for", "ask for 1 or more")
    return min(max_new_tokens, limit - prompt)


@torch.inference_mode()
def _next(decoder: Decoder, ids: Sequence[int], cache: Cache) -> torch.Tensor:
    """Logits [V] after `ids`, which continue what the cache holds."""
    ids_T = torch.tensor(ids, dtype=torch.long, device=decoder.device)
    h_TD = decoder.hidden(ids_T, cache=cache)
    return decoder.logits(h_TD[-1:])[0]


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
    room = _room(decoder, len(prompt_ids), max_new_tokens)
    stops = frozenset(stop_ids)
    history = list(prompt_ids)
    cache = Cache(decoder.config, len(history) + room, decoder.dtype, decoder.device)
    generator = make_generator(sampling, decoder.device)
    training = decoder.training
    decoder.eval()  # LoRA's dropout is for training
    try:
        fresh: Sequence[int] = history
        for _ in range(room):
            token = sample(_next(decoder, fresh, cache), history, sampling, generator)
            yield token
            if token in stops:
                return
            history.append(token)
            fresh = (token,)
    finally:
        decoder.train(training)


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
    """The whole answer; `on_text` is called with each piece of text as it comes. Special tokens are not text.

    KeyboardInterrupt raised meanwhile goes through: what was given to `on_text` until then is the answer so far.
    """
    stream = TextStream(lambda ids: tokenizer.decode(ids, skip_special=True))
    ids: list[int] = []
    pieces: list[str] = []
    ended = False

    def give(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    drawn = generate(decoder, prompt_ids, stop_ids=stop_ids, max_new_tokens=max_new_tokens, sampling=sampling)
    for token in drawn:
        if token in stop_ids:
            ended = True
            break
        ids.append(token)
        give(stream.put(token))
    give(stream.finish())
    return Completion("".join(pieces), tuple(ids), ended, len(prompt_ids))
