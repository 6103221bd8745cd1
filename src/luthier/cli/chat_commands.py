"""What a line that begins with a slash does in `luthier chat`: one function each, in one table."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from rich.markup import escape

from luthier.cli import console
from luthier.cli.conversation import History
from luthier.errors import UsageError
from luthier.guard.files import read_bounded
from luthier.guard.secrets import visible
from luthier.runs import write_text

__all__ = ["COMMANDS", "Chatting", "run"]

MOST_BYTES = 2**28
"""Of a file that a row is put behind: it is written anew, so that it is whole at every moment."""


class Chatting(Protocol):
    """What a command may change."""

    @property
    def history(self) -> History: ...

    def set_system(self, text: str | None) -> None: ...

    def ask(self, question: str, tries: int) -> None: ...


class _Command(NamedTuple):
    takes: str
    """What follows it, as the help shows it; empty: nothing may."""
    about: str
    do: Callable[[Chatting, str], None]


def run(chat: Chatting, said: str) -> bool:
    """Do what `said` asks for; whether the chat goes on. Raises LuthierError where that cannot be done."""
    name, _, rest = said.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, [*COMMANDS, "/quit"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        _say(f"there is no {name}{hint}")
        _say("/help lists the commands; // begins a message with a slash")
    elif rest.strip() and not command.takes:
        _say(f"{name} takes nothing behind it")
    else:
        command.do(chat, rest.strip())
    return True


def _say(text: str) -> None:
    console.say(f"[dim]{escape(visible(text))}[/]")


def _help(_chat: Chatting, _rest: str) -> None:
    usages = {f"{name} {command.takes}".strip(): command.about for name, command in COMMANDS.items()}
    usages |= {"/quit": "end; so does Ctrl-D", "//TEXT": "a message that begins with a slash"}
    width = max(map(len, usages))
    for usage, about in usages.items():
        _say(f"{usage:<{width}}  {about}")


def _system(chat: Chatting, rest: str) -> None:
    if rest:
        chat.set_system(None if rest == "-" else rest)
    system = chat.history.system
    _say("no system message" if system is None else f"system: {system}")


def _reset(chat: Chatting, _rest: str) -> None:
    chat.history.exchanges.clear()
    _say("forgotten" if chat.history.system is None else "forgotten, but for the system message")


def _undo(chat: Chatting, _rest: str) -> None:
    if not chat.history.exchanges:
        raise UsageError("there is nothing to take back", "ask something first")
    taken = chat.history.exchanges.pop()
    _say(f"taken back: {taken.question}")


def _retry(chat: Chatting, _rest: str) -> None:
    if not chat.history.exchanges:
        raise UsageError("there is nothing to ask again", "ask something first")
    last = chat.history.exchanges.pop()
    before = len(chat.history.exchanges)
    try:
        chat.ask(last.question, last.tries + 1)
    finally:
        if len(chat.history.exchanges) == before:  # stopped, or impossible: the answer of before stands
            chat.history.exchanges.append(last)


def _save(chat: Chatting, rest: str) -> None:
    how: Literal["", "--append", "--overwrite"] = ""
    for word in ("--append", "--overwrite"):
        if rest == word or rest.startswith(f"{word} "):
            how, rest = word, rest.removeprefix(word).strip()
    if not rest:
        raise UsageError("/save needs a file", "/save FILE.jsonl")
    path = Path(rest).expanduser()
    if path.suffix != ".jsonl":
        raise UsageError(f"{path}: a conversation is saved as a row of a .jsonl file", f"/save {path.stem}.jsonl")
    row = chat.history.row(path).decode()
    there = path.is_symlink() or path.exists()
    if there and not how:
        raise UsageError(
            f"{path} is there already", f"/save --append {path} adds a row, /save --overwrite {path} replaces all of it"
        )
    try:
        write_text(path, (_rows(path) if there and how == "--append" else "") + row)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "choose another place") from error
    count = len(chat.history.exchanges)
    cut = sum(not exchange.answers[-1].ended for exchange in chat.history.exchanges)
    less = f", {cut} cut short and not trained" if cut else ""
    _say(f"saved as a row of {path}: {count} answer{'s' * (count > 1)}{less}; `data: {path}` trains on it")


def _rows(path: Path) -> str:
    """What stands in the file, its last line ended."""
    try:
        text = read_bounded(path, MOST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text, so no row is added to it", "save to another file") from error
    return text if not text or text.endswith("\n") else text + "\n"


COMMANDS: dict[str, _Command] = {
    "/system": _Command("[TEXT]", "set the system message, from the next answer on; alone: show it; -: none", _system),
    "/reset": _Command("", "forget the conversation, not the system message", _reset),
    "/undo": _Command("", "take back the last question and its answer", _undo),
    "/retry": _Command("", "ask the last question again, with another seed", _retry),
    "/save": _Command(
        "FILE.jsonl",
        "keep the conversation as a row to train on; --append or --overwrite before a file there is",
        _save,
    ),
    "/help": _Command("", "list the commands", _help),
}
