"""`luthier generate`: answers printed as they come. What `luthier chat` has of it too: limits, requests, writing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.markup import escape

from luthier.cli import console
from luthier.cli.loading import Voice, open_target
from luthier.data.conversation import Turn
from luthier.errors import UsageError
from luthier.generate.generate import Completion, Request, answer_all
from luthier.generate.sampling import SamplingSpec
from luthier.generate.stopping import StopStrings
from luthier.guard.secrets import visible

__all__ = ["Limits", "answer_once", "open_target", "read_prompts", "request_of", "write"]


@dataclass(frozen=True)
class Limits:
    """How answers are drawn, their greatest length in tokens, what ends them, alternatives given with each token."""

    sampling: SamplingSpec
    max_tokens: int
    stops: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        StopStrings(self.stops)  # refuses what cannot be, before a model is loaded


def read_prompts(prompts: Sequence[str]) -> list[str]:
    """`prompts`, `-` for what stands on standard input. Asked for before a model is loaded."""
    if sum(prompt == "-" for prompt in prompts) > 1:
        raise UsageError("standard input is asked for twice", "give --prompt - once")
    return [_read_prompt(prompt) for prompt in prompts]


def _read_prompt(prompt: str) -> str:
    try:
        given = sys.stdin.read().strip() if prompt == "-" else prompt
        given.encode()  # what the shell could not decode stands in it as lone surrogates
    except UnicodeError as error:
        raise UsageError("the prompt is not UTF-8 text", "write or save it as UTF-8") from error
    if not given:
        where = "standard input is empty" if prompt == "-" else "the prompt is empty"
        raise UsageError(where, "write what you want to ask after --prompt, or pipe it in with --prompt -")
    return given


def answer_once(voice: Voice, prompts: Sequence[str], system: str | None, limits: Limits, as_json: bool) -> None:
    """Answer `prompts`, several at once, and end. One answer is shown as it comes, several one after another."""
    alone = len(prompts) == 1
    began = time.perf_counter()
    conversations = [[*_system(system), Turn("user", prompt)] for prompt in prompts]
    answers = _answers(voice, conversations, limits, show=alone and not as_json)
    seconds = time.perf_counter() - began
    if as_json:
        documents = [_document(voice, *pair) for pair in zip(prompts, answers, strict=True)]
        tokens = sum(len(answer.ids) for answer in answers)
        took = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        console.print_json({**documents[0], **took} if alone else {"answers": documents, **took})
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        if not alone:
            console.say(f"\n[bold]{escape(visible(prompt))}[/]")
            write(answer.text + "\n")
        if not answer.ended:
            console.say(f"[dim](cut after {len(answer.ids)} tokens: --max-tokens raises the limit)[/]")


def _document(voice: Voice, prompt: str, answer: Completion) -> dict[str, object]:
    tokenizer = voice.template.tokenizer

    def told(token: int, logprob: float) -> dict[str, object]:
        return {"id": token, "token": tokenizer.decode([token]), "logprob": logprob}

    document: dict[str, object] = {
        "prompt": prompt,
        "text": answer.text,
        "ids": list(answer.ids),
        "ended": answer.ended,
        "prompt_tokens": answer.prompt_tokens,
        "stopped_by": answer.stopped_by,
    }
    if answer.logprobs:
        document["logprobs"] = [
            {**told(token, of.logprob), "top": [told(*other) for other in of.top]}
            for token, of in zip(answer.ids, answer.logprobs, strict=True)
        ]
    return document


def _system(text: str | None) -> tuple[Turn, ...]:
    return () if text is None else (Turn("system", text),)


def write(text: str) -> None:
    """Part of an answer, to standard output."""
    # A model may have learned escape sequences; into a file goes what it said, to the last character.
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def request_of(voice: Voice, turns: Sequence[Turn], limits: Limits) -> Request:
    """What the engine is asked for the answer to `turns`. Raises DataError where the template refuses them."""
    return Request(
        tuple(voice.template.prompt_ids(turns)),
        frozenset(voice.template.stop_ids),
        limits.stops,
        limits.max_tokens,
        limits.sampling,
        limits.logprobs,
    )


def _answers(voice: Voice, conversations: Sequence[list[Turn]], limits: Limits, *, show: bool) -> list[Completion]:
    """The answers; `show` writes their text as it comes."""
    requests = [request_of(voice, turns, limits) for turns in conversations]
    on_text: Callable[[int, str], None] | None = (lambda _, piece: write(piece)) if show else None
    answers = answer_all(voice.decoder, voice.template.tokenizer, requests, on_text=on_text)
    if show:
        write("\n")
    return answers
