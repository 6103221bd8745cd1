"""`luthier chat`: a conversation with the tuned model, or with it and its base side by side (`--compare`).

    line -> command (chat_commands.py), or a question -> the prompt of every side -> answers (generate/sides.py) -> view

Answers go to standard output and all else to standard error. At a terminal lines are edited and remembered by readline,
where Python has it, and what cannot be done is said; in a pipe it ends the chat with its exit code, for the lines that
follow were written for an answer that never came.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType

from rich.markup import escape

from luthier.cli import chat_commands, console
from luthier.cli.chat_view import view_of
from luthier.cli.conversation import Exchange, History
from luthier.cli.loading import Voice
from luthier.cli.talk import Limits, request_of
from luthier.data.conversation import Turn
from luthier.errors import LuthierError, UsageError
from luthier.generate.generate import Completion
from luthier.generate.sides import Side, answer_sides
from luthier.train.signals import handling

__all__ = ["converse"]

SIDES = ("base", "tuned")
"""Of `--compare`. The tuned model's comes last: it is the one that is saved."""


def converse(voice: Voice, system: str | None, limits: Limits, *, compare: bool = False) -> None:
    """Talk until the user has had enough. Each answer sees the whole conversation before it, its own side's.

    Raises LuthierError where the template takes no system message, and, without a terminal, for a question that cannot
    be answered.
    """
    chat = _Chat(voice, limits, SIDES if compare else (voice.name,))
    if system is not None:
        chat.set_system(system)
    if sys.stdin.isatty():
        who = f"{voice.name}, base and tuned" if compare else voice.name
        console.say(f"[bold]{escape(who)}[/]  [dim]/help lists the commands, Ctrl-C stops an answer[/]")
        _edit_lines()
        _talk(chat)
    else:
        for line in _piped_lines():
            if not chat.take(line):
                return


def _talk(chat: _Chat) -> None:
    """The lines of a terminal."""
    leaving = False
    while True:
        console.say("")
        try:
            said = _prompted()
        except EOFError:
            console.say("")
            return
        except UnicodeDecodeError:
            console.say("[dim]that line is not UTF-8 text[/]")
            continue
        except KeyboardInterrupt:
            if leaving:
                return
            leaving = True
            console.say("\n[dim](Ctrl-C again or /quit to leave)[/]")
            continue
        leaving = False
        try:
            if not chat.take(said):
                return
        except LuthierError as error:  # the conversation goes on as it was before this line
            console.print_error(error)


def _edit_lines() -> None:
    """Arrow keys and what was said before, for `input`; importing it is all. Kept for this chat, not on the disk."""
    with suppress(ImportError):
        import readline  # noqa: F401


def _prompted() -> str:
    if sys.stdout.isatty():
        return input("> ")
    console.messages.print("> ", end="")  # answers go into a file: nothing else may
    return input()


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"line {number} of standard input is not UTF-8 text", "write or save it as UTF-8"
            ) from error


class _Chat:
    """The conversation, and what a line does to it. `take` says whether it goes on."""

    def __init__(self, voice: Voice, limits: Limits, names: tuple[str, ...]) -> None:
        self.voice, self.limits, self.names = voice, limits, names
        self.history = History()

    def take(self, line: str) -> bool:
        """Do what a line asks for. Raises LuthierError where that cannot be done; nothing has changed then."""
        said = line.strip()
        try:
            said.encode()  # where the locale is not UTF-8, other bytes come as lone surrogates
        except UnicodeEncodeError as error:
            raise UsageError("that line is not UTF-8 text", "type it again, or set the terminal to UTF-8") from error
        if said.startswith("//"):
            said = said[1:]
        elif said.startswith("/"):
            return chat_commands.run(self, said)
        if said:
            self.ask(said, tries=0)
        return True

    def set_system(self, text: str | None) -> None:
        """Put `text` before the conversation from the next answer on; None: nothing."""
        if text is not None:
            self.voice.template.prompt_ids([Turn("system", text), Turn("user", "?")])  # some templates refuse it
        self.history.system = text

    def ask(self, question: str, tries: int) -> None:
        """Answer `question` by every side; what was asked and answered is the history's last exchange then.

        `tries` counts the answers before this one to the same question: each is drawn by a seed of its own.
        """
        sampling = self.limits.sampling
        if tries:
            sampling = replace(sampling, seed=(sampling.seed + tries) % 2**63)
        limits = replace(self.limits, sampling=sampling)
        sides = [self._side(place, question, limits) for place in range(len(self.names))]
        view = view_of(self.names)
        began = time.perf_counter()
        ctrl_c, tokenizer = _CtrlC(), self.voice.template.tokenizer
        answers: list[Completion] = []
        try:
            with ctrl_c.taken():
                answers = answer_sides(self.voice.decoder, tokenizer, sides, show=view.put, stopped=ctrl_c.noted)
        except (KeyboardInterrupt, Exception):
            if ctrl_c.times < 2:  # else it is what the second made, whatever a library's C code turned it into
                raise
        view.close()
        seconds = time.perf_counter() - began
        if ctrl_c.noted() and not (answers and all(answer.ids for answer in answers)):
            console.say("[dim](stopped; this question is forgotten)[/]")
            return
        self.history.exchanges.append(Exchange(question, tuple(answers), tries))
        self._tell(answers, ctrl_c.noted(), seconds)

    def _side(self, place: int, question: str, limits: Limits) -> Side:
        turns = [*self.history.turns(place), Turn("user", question)]
        request = request_of(self.voice, turns, limits)
        context = self.voice.decoder.config.max_positions
        if len(request.prompt) >= context:
            far = bool(self.history.exchanges)
            raise UsageError(
                f"the conversation has {len(request.prompt):,} tokens with this question, and the model's context is "
                f"{context:,}: no answer fits",
                "/save FILE keeps it, /reset begins a new one, /undo takes back the last answer"
                if far
                else "ask something shorter",
            )
        return Side(request, adapted=len(self.names) == 1 or place > 0)

    def _tell(self, answers: list[Completion], left: bool, seconds: float) -> None:
        context = self.voice.decoder.config.max_positions
        used = [answer.prompt_tokens + len(answer.ids) for answer in answers]
        for name, answer, tokens in zip(self.names, answers, used, strict=True):
            whose = f"{name}: " if len(self.names) > 1 else ""
            if answer.ended:
                continue
            if left:
                why = "stopped; the next answer sees what there is, /undo takes it back"
            elif tokens >= context:
                why = f"cut: the model's context of {context:,} tokens is full; /reset begins a new conversation"
            else:
                why = f"cut after {len(answer.ids):,} tokens: --max-tokens raises the limit"
            console.say(f"[dim]({whose}{why})[/]")
        if console.messages.is_terminal:
            count = " + ".join(f"{len(answer.ids):,}" for answer in answers)
            speed = sum(len(answer.ids) for answer in answers) / seconds
            console.say(f"[dim]{count} tokens, {speed:,.0f} tokens/s, {max(used):,} of {context:,} in the context[/]")


class _CtrlC:
    """Within `taken`, at a terminal, Ctrl-C is noted instead of raised: the answer ends after the token that is being
    written. Insisting raises KeyboardInterrupt, for one step of a large model takes its time. In a pipe Ctrl-C ends the
    command, as ever."""

    def __init__(self) -> None:
        self.times = 0

    def noted(self) -> bool:
        """Whether it came."""
        return self.times > 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Look out for it in the block."""
        with handling(self._note, (signal.SIGINT,) if sys.stdin.isatty() else ()):
            yield

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.times += 1
        if self.times > 1:
            raise KeyboardInterrupt
