"""Go's text/template, as much of it as our Modelfiles use, written from its documentation, to read what we write.

Actions: a string literal, `.Content`, `range .Messages`, `if`/`else if`/`else` over `eq`, `$last := ""`,
`$last = .Role`, `end`. Anything else is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from luthier.data.conversation import Turn

ACTION = re.compile(r'\{\{ ((?:[^"}]|"(?:[^"\\]|\\.)*"|\}(?!\}))*?) \}\}')


def tokens_of(source: str) -> list[tuple[str, str]]:
    """(kind, text) of literal text and actions, in order."""
    found: list[tuple[str, str]] = []
    at = 0
    for match in ACTION.finditer(source):
        if match.start() > at:
            found.append(("text", source[at : match.start()]))
        found.append(("action", match[1]))
        at = match.end()
    rest = source[at:]
    assert "{{" not in rest
    assert "}}" not in rest
    return [*found, ("text", rest)] if rest else found


class Machine:
    def __init__(self, source: str, turns: Sequence[Turn]) -> None:
        self.tokens = tokens_of(source)
        self.turns = turns
        self.last = ""
        self.out = ""

    def run(self) -> str:
        assert self.block(0, True, None) == len(self.tokens)
        return self.out

    def value(self, word: str, turn: Turn | None) -> str:
        if word.startswith('"'):
            return str(json.loads(word))
        if word == "$last":
            return self.last
        assert turn is not None, word
        return {".Role": turn.role, ".Content": turn.content}[word]

    def test(self, condition: str, turn: Turn | None) -> bool:
        match = re.fullmatch(r'eq (\S+) ("[^"]*")', condition)
        assert match, condition
        return self.value(match[1], turn) == self.value(match[2], turn)

    def block(self, at: int, live: bool, turn: Turn | None) -> int:
        """Run from `at` to the `else` or `end` that closes the block; the index of that."""
        while at < len(self.tokens):
            kind, text = self.tokens[at]
            if kind == "text":
                self.out += text if live else ""
            elif text == "end" or text.startswith("else"):
                return at
            elif text == "range .Messages":
                start = at + 1
                for each in self.turns if live else ():
                    self.block(start, True, each)
                at = self.block(start, False, None)
            elif text.startswith("if "):
                at = self.branches(at, live, turn)
            elif text.startswith(("$last := ", "$last = ")):
                self.last = self.value(text.split("= ", 1)[1], turn) if live else self.last
            else:
                self.out += self.value(text, turn) if live else ""
            at += 1
        return at

    def branches(self, at: int, live: bool, turn: Turn | None) -> int:
        taken = False
        while True:
            condition = self.tokens[at][1].removeprefix("else").strip().removeprefix("if ")
            chosen = live and not taken and (not condition or self.test(condition, turn))
            taken = taken or chosen
            at = self.block(at + 1, chosen, turn)
            if self.tokens[at][1] == "end":
                return at


def render(source: str, turns: Sequence[Turn]) -> str:
    """What Ollama writes for `turns`."""
    return Machine(source, turns).run()
