"""YAML text -> plain values and the line of each, or every problem in it.

The reading is YAML 1.2's core schema, which is what people expect of a settings file: `1e-4` is a number, `no` and `on`
are texts, `010` is ten. Refused, each with its line: duplicate keys, anchors and aliases (a few lines of them expand
to gigabytes), tags (they name types to construct), several documents, and what is too long, too much or too deep to be
a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from luthier.errors import Problem

__all__ = ["Document", "Key", "Keys", "read_document", "write_document"]

Key: TypeAlias = str | int
Keys: TypeAlias = tuple[Key, ...]

MOST_CHARACTERS = 200_000
MOST_VALUES = 5_000
"""Names of settings counted too; a thousand data files with a weight each have as many. More take seconds to read."""
DEEPEST = 12

_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
_CORE: tuple[tuple[str, str, str], ...] = (
    (_NULL, r"~|null|Null|NULL|", "~nN"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+", "-+0123456789"),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    (_FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


class _Loader(yaml.SafeLoader):
    """Composes nodes with the core schema's plain scalars; nothing is ever constructed by it."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (the base class declares it so)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either schema would take for something else, so that other tools read it as we do."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012
        first: list(found) for first, found in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        for _start in [*_first, *([""] if _tag == _NULL else [])]:
            _class.yaml_implicit_resolvers.setdefault(_start, []).append((_tag, re.compile(f"^(?:{_pattern})$")))


@dataclass
class Document:
    """What a text holds: its value, the line of every key path (counted from 1), and what is wrong with it."""

    value: object = None
    lines: dict[Keys, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_document(text: str, where: str) -> Document:
    """Read `text`; `where` names it in the problems. With problems, `value` holds what could be read."""
    document = Document()
    if len(text) > MOST_CHARACTERS:
        reason = f"{len(text):,} characters is too much for a recipe"
        document.problems.append(Problem(where, None, reason, "is it the data? Name that under `data` of a recipe"))
        return document
    try:
        document.problems.extend(_refused_events(text, where))
        if document.problems:
            return document
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error, text, where))
        return document
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.problems.append(Problem(where, line, f"the character {error.character!r} is not allowed in YAML"))
        return document
    if node is not None:
        document.value = _value(node, (), document, where)
    return document


def _refused_events(text: str, where: str) -> Iterator[Problem]:
    depth = documents = values = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else None
        if isinstance(event, yaml.AliasEvent):
            yield Problem(where, line, f"the alias `*{event.anchor}` is not allowed in a recipe", "write the value out")
        elif isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            yield Problem(where, line, f"the anchor `&{event.anchor}` is not allowed in a recipe", "take it out")
        tag = getattr(event, "tag", None)
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and tag is not None:
            yield Problem(where, line, f"the tag `{tag}` is not allowed in a recipe", "take it out")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents == 2:
                yield Problem(where, line, "a second document begins here (`---`)", "a recipe is one document")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.NodeEvent)
        if depth > DEEPEST:
            yield Problem(where, line, f"nested deeper than {DEEPEST} levels", "no setting is as deep")
            return
        if values > MOST_VALUES:
            remedy = "name a folder under `data` instead of its files"
            yield Problem(where, line, f"more than {MOST_VALUES:,} values and names", remedy)
            return


def _syntax_problem(error: yaml.MarkedYAMLError, text: str, where: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    line = None if mark is None else mark.line + 1
    lines = text.splitlines()
    shown = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    if "\t" in shown[: len(shown) - len(shown.lstrip())] or "'\\t'" in (error.problem or ""):
        return Problem(where, line, "a tab in the indentation, which YAML does not allow", "use spaces")
    reason = f"not valid YAML: {error.problem or error.context}"
    if error.context and error.problem:
        reason += f", {error.context}"
    remedy = None
    if shown.strip():
        remedy = f"in `{shown.strip()[:60]}`; a text with `: `, `#`, braces or quotes in it stands in double quotes"
    return Problem(where, line, reason, remedy)


def _value(node: yaml.Node, keys: Keys, document: Document, where: str) -> object:
    document.lines.setdefault(keys, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, keys, document, where)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*keys, place), document, where) for place, item in enumerate(node.value)]
    return _scalar(node.tag, str(node.value))


def _mapping(node: yaml.MappingNode, keys: Keys, document: Document, where: str) -> dict[str, object]:
    made: dict[str, object] = {}
    for name_node, item in node.value:
        line = name_node.start_mark.line + 1
        if not isinstance(name_node, yaml.ScalarNode):
            document.problems.append(Problem(where, line, "a key must be a plain name, not a list or mapping"))
            continue
        name = str(name_node.value)
        path = (*keys, name)
        if name in made:
            first = document.lines[path]
            reason = f"`{'.'.join(map(str, path))}` is given twice, first in line {first}"
            document.problems.append(Problem(where, line, reason, "take one out"))
            continue
        document.lines[path] = line
        made[name] = _value(item, path, document, where)
    return made


def _scalar(tag: str, text: str) -> object:
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text.lower() == "true"
    if tag == _INT:
        return int(text) if len(text) < 400 else float(text)
    if tag == _FLOAT:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def write_document(value: Mapping[str, object]) -> str:
    """YAML that `read_document` reads back as `value`: keys in their order, short lists on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
