"""From what a client asks to requests of the engine: one for each answer, in the order of their index.

Everything that can be wrong with a request is found here, before it takes a place in the queue. Tokenising a long text
takes a while: this belongs in a thread of its own.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from luthier.data.conversation import Role, Turn
from luthier.errors import LuthierError
from luthier.generate.request import Request, room
from luthier.generate.sampling import SamplingSpec
from luthier.generate.stopping import StopStrings
from luthier.serve.limits import Limits
from luthier.serve.models import Served
from luthier.serve.refusals import Refusal, of_error
from luthier.serve.schema import MOST_CHOICES, NEUTRAL, Asked, ChatAsked, TextAsked

__all__ = ["Wanted", "chat", "completion"]

_TEXT_TOKENS = 16
"""The longest answer of /v1/completions where none is said, as OpenAI's."""


@dataclass(frozen=True)
class Wanted:
    """What the engine is asked, and the tokens of the prompts, each counted once however many answers it gets."""

    requests: tuple[Request, ...]
    prompt_tokens: int


def chat(asked: ChatAsked, model: Served, limits: Limits) -> Wanted:
    """A conversation as the model's template writes it. Raises Refusal (400)."""
    _refuse_unbuilt(asked)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refusal(400, "'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
        raise Refusal(400, "'max_tokens' and 'max_completion_tokens' differ: send one of them.", param="max_tokens")
    named = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    longest = _longest(asked.max_completion_tokens or asked.max_tokens, named, limits.max_tokens, limits)
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    try:
        ids = model.template.prompt_ids([Turn(_role(turn.role), turn.text) for turn in asked.messages])
    except LuthierError as error:
        raise of_error(error, "messages") from error
    return _wanted(asked, model, [ids], _settings(asked, model, longest, logprobs), "messages")


def completion(asked: TextAsked, model: Served, limits: Limits) -> Wanted:
    """Prompts that are continued as they are; BOS before text where the tokenizer puts it. Raises Refusal (400)."""
    _refuse_unbuilt(asked)
    longest = _longest(asked.max_tokens, "max_tokens", min(_TEXT_TOKENS, limits.max_tokens), limits)
    try:
        prompts = [_ids(prompt, model) for prompt in _prompts(asked)]
    except LuthierError as error:
        raise of_error(error, "prompt") from error
    return _wanted(asked, model, prompts, _settings(asked, model, longest, asked.logprobs), "prompt")


def _role(said: str) -> Role:
    """`developer` is OpenAI's newer word for `system`."""
    match said:
        case "user" | "assistant" | "tool":
            return said
    return "system"


def _refuse_unbuilt(asked: Asked) -> None:
    for name, neutral in NEUTRAL.items():
        if name == "best_of" or not hasattr(asked, name):
            continue
        if getattr(asked, name) not in neutral:
            raise Refusal(
                400,
                f"'{name}' is not supported by this server. Leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    best = asked.best_of if isinstance(asked, TextAsked) else None
    if best not in (None, asked.n or 1):
        raise Refusal(
            400, "'best_of' is not supported unless it equals 'n'.", param="best_of", code="unsupported_parameter"
        )
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "'stream_options' needs 'stream' to be true.", param="stream_options")


def _longest(asked: int | None, param: str, otherwise: int, limits: Limits) -> int:
    if asked is not None and asked > limits.max_tokens:
        raise Refusal(
            400, f"'{param}' is {asked}, this server writes {limits.max_tokens} at most (--max-tokens).", param=param
        )
    return otherwise if asked is None else asked


def _prompts(asked: TextAsked) -> list[str | list[int]]:
    """One or more: a list of numbers is one prompt."""
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise Refusal(400, "'prompt' is empty.", param="prompt")
    texts = [one for one in prompt if not isinstance(one, int)]
    numbers = [one for one in prompt if isinstance(one, int)]
    return [numbers] if numbers else [*texts]


def _ids(prompt: str | list[int], model: Served) -> list[int]:
    """Control tokens in a text are taken for what they are: whoever writes a raw prompt writes those too."""
    if isinstance(prompt, list):
        return prompt
    tokenizer = model.template.tokenizer
    ids = tokenizer.encode(prompt, special=True)
    begins = tokenizer.bos_id if tokenizer.adds_bos else None
    return ids if begins is None or ids[:1] == [begins] else [begins, *ids]


def _settings(asked: Asked, model: Served, longest: int, logprobs: int | None) -> Request:
    """The request without its prompt. What is left out is as OpenAI has it: temperature and top_p 1, any seed."""
    try:
        spec = SamplingSpec(
            1.0 if asked.temperature is None else asked.temperature,
            1.0 if asked.top_p is None else asked.top_p,
            asked.top_k or 0,
            1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            secrets.randbits(62) if asked.seed is None else asked.seed,
            asked.min_p or 0.0,
        )
        StopStrings(asked.stops)
        return Request((), frozenset(model.template.stop_ids), asked.stops, longest, spec, logprobs)
    except LuthierError as error:  # the schema has the same bounds; this is for the day when it has not
        raise of_error(error) from error


def _wanted(asked: Asked, model: Served, prompts: list[list[int]], settings: Request, param: str) -> Wanted:
    count = asked.n or 1
    if len(prompts) * count > MOST_CHOICES:
        raise Refusal(
            400, f"{len(prompts)} prompts with n = {count} are more than {MOST_CHOICES} answers.", param=param
        )
    requests: list[Request] = []
    for prompt in prompts:
        request = replace(settings, prompt=tuple(prompt))
        try:
            room(model.decoder.config, request)
        except LuthierError as error:
            long = len(prompt) >= model.decoder.config.max_positions
            raise of_error(error, param, "context_length_exceeded" if long else None) from error
        requests += [replace(request, sampling=_seeded(settings.sampling, choice)) for choice in range(count)]
    return Wanted(tuple(requests), sum(map(len, prompts)))


def _seeded(spec: SamplingSpec, choice: int) -> SamplingSpec:
    """The same settings with a seed of the choice's own; choice 0 has the seed that was asked for."""
    return replace(spec, seed=(spec.seed + choice) % 2**64) if choice else spec
