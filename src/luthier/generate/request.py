"""What is asked of the engine, and what it says: values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from luthier.errors import UsageError
from luthier.generate.sampling import GREEDY, SamplingSpec
from luthier.model.config import ModelConfig

__all__ = ["MOST_LOGPROBS", "Event", "Finish", "Request", "TokenLogprob", "room"]

MOST_LOGPROBS = 20
"""Alternatives to a token that may be asked for, as many as OpenAI's interface allows."""


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be answered. Raises UsageError for numbers that mean nothing.

    `stop_ids` are tokens that end the answer and `stops` texts that do, neither of which is shown. `logprobs`: how many
    likeliest alternatives are given with each token (0: its own logprob only; None: nothing).
    """

    prompt: tuple[int, ...]
    stop_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 256
    sampling: SamplingSpec = GREEDY
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"at most {self.max_new_tokens} new tokens were asked for", "ask for 1 or more")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UsageError(
                f"{self.logprobs} alternatives to each token were asked for", f"ask for 0 to {MOST_LOGPROBS}"
            )


@dataclass(frozen=True)
class TokenLogprob:
    """ln of the probability that the model gave the token, and of the likeliest ones: (id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Finish:
    """Why an answer ended: "stop" at a stop token, or at the text `stopped_by`; "length" where its room was used up."""

    reason: Literal["stop", "length"]
    stopped_by: str | None


@dataclass(frozen=True)
class Event:
    """One token of one request: the id that was drawn (a stop token too) and the text that became certain with it."""

    request: int
    token: int
    text: str
    logprob: TokenLogprob | None
    finish: Finish | None


def room(config: ModelConfig, request: Request) -> int:
    """How many tokens may follow the prompt. Raises UsageError where that is none, or the prompt no prompt."""
    limit, prompt = config.max_positions, request.prompt
    if not prompt:
        raise UsageError("the prompt is empty, and the model needs a token to begin with", "write a prompt")
    if len(prompt) >= limit:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens and the model's context {limit}, so no answer fits",
            "shorten the prompt, or begin a new conversation",
        )
    wrong = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise UsageError(
            f"the prompt holds the id {wrong}, the model's tokens are 0 to {config.vocab_size - 1}",
            "make the ids with the model's own tokenizer",
        )
    return min(request.max_new_tokens, limit - len(prompt))
