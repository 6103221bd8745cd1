"""What chat templates do with contents, in Go's template language and in Python.

Go's language has no functions for it, but templates that call themselves, slices of texts (in bytes) and `printf`,
whose precision counts characters. So

    ltrim     where the first character is white space: itself with the rest, else writes what is left
    rtrim     the same from the end, where a character is one, two or three bytes: UTF-8 tells them apart
    trim      both
    answer    writes what comes after the last `</think>` and the newlines after it: goes back byte by byte until there,
              and writes the bytes on its way back

A template calls itself at most 100,000 times in Go, so `answer` and an opening by a marker take contents of up to that
many bytes; a longer one is an error in Ollama, never another prompt. White space is Python's: what `strip` takes off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

__all__ = ["FORMS", "Form", "definitions", "literal", "opening_by_marker"]

THINK = "</think>"
MOST_NEWLINES = 8
"""After `</think>`, for `answer` to leave them all out; models write two."""


def literal(text: str) -> str:
    """A text in Go. JSON's escapes are Go's too."""
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class Form:
    """What becomes of a content: in Python, in Go (the body of a template whose dot is the text), and contents that
    tell it from the others."""

    apply: Callable[[str], str]
    go: str
    probes: tuple[str, ...]


_WHITE = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]


def _any_of(value: str, width: int | None) -> str:
    """A condition: `value` is white space, of so many bytes in UTF-8 if said."""
    signs = (json.dumps(sign) for sign in _WHITE if width is None or len(sign.encode()) == width)
    return f"eq {value} {' '.join(signs)}"


def _front(name: str, otherwise: str) -> str:
    first = '{{ $first := printf "%.1s" . }}'
    again = f'{{{{ template "{name}" (slice . (len $first)) }}}}'
    return f"{first}{{{{ if {_any_of('$first', None)} }}}}{again}{{{{ else }}}}{otherwise}{{{{ end }}}}"


def _back(name: str) -> str:
    written = "{{ . }}"
    for width in (3, 2, 1):
        rest = f"{{{{ $rest := slice . 0 (len (slice . {width})) }}}}"
        test = _any_of("(slice . (len $rest))", width)
        again = f'{{{{ template "{name}" $rest }}}}'
        inner = f"{rest}{{{{ if {test} }}}}{again}{{{{ else }}}}{written}{{{{ end }}}}"
        written = f"{{{{ if ge (len .) {width} }}}}{inner}{{{{ else }}}}{{{{ . }}}}{{{{ end }}}}"
    return written


def _answer(text: str) -> str:
    after = text.rsplit(THINK, 1)[-1]
    return after.lstrip("\n") if THINK in text else text


def _after_thinking() -> str:
    """Ends with the marker: nothing more to the left is written. Else what comes before, then the last byte."""
    tests = ""
    for newlines in range(MOST_NEWLINES, -1, -1):
        mark = THINK + "\n" * newlines
        size = len(mark)
        tests += (
            f"{{{{ if ge (len .) {size} }}}}{{{{ if eq (slice . (len (slice . {size}))) {literal(mark)} }}}}"
            "{{ $found = true }}{{ end }}{{ end }}"
        )
    rest = '{{ $rest := slice . 0 (len (slice . 1)) }}{{ template "answer" $rest }}{{ slice . (len $rest) }}'
    return f"{{{{ if . }}}}{{{{ $found := false }}}}{tests}{{{{ if not $found }}}}{rest}{{{{ end }}}}{{{{ end }}}}"


_PADDED = (" \t\n padded  text\r\n\n", "\u2003\u00a0wide\u3000\u1680\u2029", "   ", "\n")
FORMS: Mapping[str, Form] = {
    "": Form(lambda text: text, "", ("",)),
    "trim": Form(str.strip, _front("trim", _back("trim")), _PADDED),
    "ltrim": Form(str.lstrip, _front("ltrim", "{{ . }}"), ()),
    "rtrim": Form(str.rstrip, _back("rtrim"), ()),
    "answer": Form(
        _answer,
        _after_thinking(),
        ("<think>\nHm: a < b.\n</think>\n\nYes, naïve.", "<think>\n\n</think>\n\nNo.", "a</think>b</think>\n c \n"),
    ),
}
"""The name in Go -> what it does; "": nothing."""


def definitions(names: Iterable[str]) -> str:
    """The templates of these forms, each once."""
    return "".join(f'{{{{ define "{name}" }}}}{FORMS[name].go}{{{{ end }}}}' for name in dict.fromkeys(names) if name)


def opening_by_marker(name: str, marker: str, with_it: str, without: str) -> str:
    """A template that writes one text where its dot has `marker` in it, and another where it has not."""
    size = len(marker.encode())
    again = f'{{{{ template "{name}" (slice . 1) }}}}'
    found = f"{{{{ else if eq (slice . 0 {size}) {literal(marker)} }}}}{{{{ {literal(with_it)} }}}}"
    first = f"{{{{ if lt (len .) {size} }}}}{{{{ {literal(without)} }}}}"
    return f'{{{{ define "{name}" }}}}{first}{found}{{{{ else }}}}{again}{{{{ end }}}}{{{{ end }}}}'
