"""`luthier generate` and `luthier chat`: answers printed as they come."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass

from rich.markup import escape

from luthier.cli import console
from luthier.cli.loading import Voice, open_target
from luthier.data.conversation import Turn
from luthier.errors import UsageError
from luthier.generate.generate import Completion, complete
from luthier.generate.sampling import SamplingSpec
from luthier.guard.secrets import visible

__all__ = ["Limits", "answer_once", "converse", "open_target", "read_prompt"]


@dataclass(frozen=True)
class Limits:
    """How answers are drawn, and their greatest length in tokens."""

    sampling: SamplingSpec
    max_tokens: int


def read_prompt(prompt: str) -> str:
    """`prompt`, or what stands on standard input where it is `-`. Asked for before a model is loaded."""
    try:
        given = sys.stdin.read().strip() if prompt == "-" else prompt
        given.encode()  # what the shell could not decode stands in it as lone surrogates
    except UnicodeError as error:
        raise UsageError("the prompt is not UTF-8 text", "write or save it as UTF-8") from error
    if not given:
        where = "standard input is empty" if prompt == "-" else "the prompt is empty"
        raise UsageError(where, "write what you want to ask after --prompt, or pipe it in with --prompt -")
    return given


def answer_once(voice: Voice, prompt: str, system: str | None, limits: Limits, as_json: bool) -> None:
    """Answer `prompt` and end."""
    turns = [*_system(system), Turn("user", prompt)]
    began = time.perf_counter()
    answer = _answer(voice, turns, limits, quiet=as_json)
    seconds = time.perf_counter() - began
    if as_json:
        document = {**asdict(answer), "seconds": seconds, "tokens_per_second": len(answer.ids) / seconds}
        console.print_json({"prompt": prompt, **document})
    elif not answer.ended:
        console.say(f"[dim](cut after {len(answer.ids)} tokens: --max-tokens raises the limit)[/]")


def converse(voice: Voice, system: str | None, limits: Limits) -> None:
    """Talk until the user has had enough. Each answer sees the whole conversation before it."""
    console.say(f"[bold]{escape(voice.name)}[/]  /reset forgets, /quit ends, Ctrl-C stops an answer")
    turns = list(_system(system))
    leaving = False
    while True:
        try:
            said = input("\n> ").strip()
        except EOFError:
            console.say("")
            return
        except KeyboardInterrupt:
            if leaving:
                return
            leaving = True
            console.say("\n[dim](Ctrl-C again or /quit to leave)[/]")
            continue
        leaving = False
        if said in ("/quit", "/exit"):
            return
        if said == "/reset":
            turns = list(_system(system))
            console.say("[dim]forgotten[/]")
            continue
        if said.startswith("/"):
            unknown = "" if said == "/help" else f"; there is no {escape(said)}"
            console.say(f"[dim]/reset forgets, /quit ends{unknown}[/]")
            continue
        if not said:
            continue
        before = len(turns)
        turns.append(Turn("user", said))
        try:
            answer = _answer(voice, turns, limits, quiet=False)
        except UsageError as error:  # the conversation has outgrown the model's context: it goes on without this turn
            console.print_error(error)
            del turns[before:]
            continue
        except KeyboardInterrupt:
            console.say("[dim](stopped; this question is forgotten)[/]")
            del turns[before:]
            continue
        turns.append(Turn("assistant", answer.text))


def _system(text: str | None) -> tuple[Turn, ...]:
    return () if text is None else (Turn("system", text),)


def _answer(voice: Voice, turns: list[Turn], limits: Limits, *, quiet: bool) -> Completion:
    def show(piece: str) -> None:
        # A model may have learned escape sequences; into a file goes what it said, to the last character.
        sys.stdout.write(visible(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()

    answer = complete(
        voice.decoder,
        voice.template.tokenizer,
        voice.template.prompt_ids(turns),
        stop_ids=voice.template.stop_ids,
        max_new_tokens=limits.max_tokens,
        sampling=limits.sampling,
        on_text=None if quiet else show,
    )
    if not quiet:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return answer
