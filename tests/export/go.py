"""Go's text/template, as much of it as our Modelfiles use, written from its documentation, to read what we write.

Actions: `range .Messages`, `if`/`else if`/`else`, `define`, `template NAME ARG`, `$x := `, `$x = `, `end`, and values:
literals, `.`, `.Role`, `.Content`, variables, and the functions eq, ge, lt, not, len, slice, printf "%.1s". Texts are
bytes, as in Go. Anything else is an error. `real_go.py` has the real one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from luthier.data.conversation import Turn

ACTION = re.compile(r'\{\{ ((?:[^"}]|"(?:[^"\\]|\\.)*"|\}(?!\}))*?) \}\}')
WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[()]|[^\s()]+)')

Value = bytes | int | bool | Turn


@dataclass
class Block:
    """What an action begins: its words, its branches as (condition, body), and where a definition goes."""

    kind: str
    words: list[str]
    branches: list[tuple[list[str], list[object]]] = field(default_factory=list)


def parse(source: str) -> tuple[list[object], Mapping[str, list[object]]]:
    """(the body, the definitions): a body is literal bytes, lists of words, and blocks."""
    root: list[object] = []
    definitions: dict[str, list[object]] = {}
    bodies, blocks, at = [root], list[Block](), 0
    for match in [*ACTION.finditer(source), None]:
        text = source[at : match.start() if match else len(source)]
        assert "{{" not in text
        assert "}}" not in text
        if text:
            bodies[-1].append(text.encode())
        if match is None:
            break
        at = match.end()
        words = WORD.findall(match[1])
        if words[0] in ("range", "if", "define"):
            blocks.append(Block(words[0], words[1:], [(words[1:], [])]))
            bodies.append(blocks[-1].branches[0][1])
        elif words[0] == "else":
            assert blocks[-1].kind == "if"
            blocks[-1].branches.append((words[2:], []))
            bodies[-1] = blocks[-1].branches[-1][1]
        elif words[0] == "end":
            block = blocks.pop()
            bodies.pop()
            if block.kind == "define":
                definitions[json.loads(block.words[0])] = block.branches[0][1]
            else:
                bodies[-1].append(block)
        else:
            bodies[-1].append(words)
    assert not blocks
    return root, definitions


class Machine:
    def __init__(self, source: str, turns: Sequence[Turn]) -> None:
        self.body, self.definitions = parse(source)
        self.turns = turns
        self.out = bytearray()

    def run(self) -> str:
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)
        try:
            self.write(self.body, None, {})
        finally:
            sys.setrecursionlimit(before)
        return self.out.decode()

    def write(self, body: list[object], dot: Value | None, known: dict[str, Value]) -> None:
        """`known` is shared with blocks inside: no name of ours is declared twice."""
        for one in body:
            if isinstance(one, bytes):
                self.out += one
            elif isinstance(one, Block):
                self.block(one, dot, known)
            else:
                assert isinstance(one, list)
                self.action(one, dot, known)

    def block(self, block: Block, dot: Value | None, known: dict[str, Value]) -> None:
        if block.kind == "range":
            assert block.words == [".Messages"]
            for turn in self.turns:
                self.write(block.branches[0][1], turn, known)
            return
        for condition, body in block.branches:
            if not condition or self.value(condition, dot, known):
                self.write(body, dot, known)
                return

    def action(self, words: list[str], dot: Value | None, known: dict[str, Value]) -> None:
        if words[0] == "template":
            self.write(self.definitions[json.loads(words[1])], self.value(words[2:], dot, known), {})
        elif len(words) > 2 and words[1] in (":=", "="):
            assert words[1] == ":=" or words[0] in known
            known[words[0]] = self.value(words[2:], dot, known)
        else:
            written = self.value(words, dot, known)
            assert isinstance(written, bytes)
            self.out += written

    def value(self, words: list[str], dot: Value | None, known: dict[str, Value]) -> Value:
        """A value, or a call of a function with arguments, some of them in parentheses."""
        found: list[Value | str] = []
        rest = iter(words)
        for word in rest:
            if word != "(":
                found.append(self.operand(word, dot, known))
                continue
            inner, depth = list[str](), 1
            for word in rest:
                depth += {"(": 1, ")": -1}.get(word, 0)
                if depth == 0:
                    break
                inner.append(word)
            found.append(self.value(inner, dot, known))
        if isinstance(found[0], str):
            return call(found[0], found[1:])
        assert len(found) == 1, words
        return found[0]

    def operand(self, word: str, dot: Value | None, known: dict[str, Value]) -> Value | str:
        if word.startswith('"'):
            return str(json.loads(word)).encode()
        if word.startswith("$"):
            return known[word]
        if word.isdigit():
            return int(word)
        if word in ("true", "false"):
            return word == "true"
        if word in ("eq", "ge", "lt", "not", "len", "slice", "printf"):
            return word
        assert dot is not None, word
        if word == ".":
            return dot
        assert isinstance(dot, Turn), word
        return {".Role": dot.role, ".Content": dot.content}[word].encode()


def call(name: str, given: Sequence[Value | str]) -> Value:
    if name == "eq":
        return given[0] in given[1:]
    if name == "not":
        return not given[0]
    first, *others = given
    if name == "len":
        assert isinstance(first, bytes)
        return len(first)
    if name == "slice":
        assert isinstance(first, bytes)
        start, stop = (*others, len(first))[:2]
        assert isinstance(start, int)
        assert isinstance(stop, int)
        assert 0 <= start <= stop <= len(first), "Go stops here with an error"
        return first[start:stop]
    if name == "printf":
        assert first == b"%.1s"
        assert isinstance(others[0], bytes)
        return others[0].decode()[:1].encode()
    assert isinstance(first, int)
    assert isinstance(others[0], int)
    return first >= others[0] if name == "ge" else first < others[0]


def render(source: str, turns: Sequence[Turn]) -> str:
    """What Ollama writes for `turns`."""
    return Machine(source, turns).run()
