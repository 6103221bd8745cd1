"""Jinja's sandbox with a limit on size: no value that a template makes is larger than `LIMIT`.

Jinja's own sandbox keeps a template from attributes and from changing what it is given. It does not keep it from
`'a' * 10**10`, from doubling a text forty times, or from lists of lists that are small in memory and endless as text.
Such steps are single calls into C, which no watchdog can interrupt, so they are looked at before they are made:

    * ** %                      jinja's own interception of operators
    + with two unknown sides    a function instead (with a literal on one side a text grows by that literal only)
    ~  {{ value }}  macros      the functions that jinja's generated code calls for them
    [a, b]  (a, b)  {a: b}      weighed when made, with all that is in them
    f(a, b)  x | filter(a)      arguments weighed; where they multiply (replace, join, center, …), their product

A template whose values stay within the limit renders here what it renders in jinja's sandbox, at nearly its speed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from types import BuiltinMethodType
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from markupsafe import escape

__all__ = ["LIMIT", "LimitedEnvironment", "TooLargeError"]

LIMIT = 2**24
"""Characters of text, the most that a template may make at once."""

_ITEM = 16
"""What an item of a list counts, in characters."""
_AT_ONCE = 32
"""Parts of a text that are taken in before its length is looked at; nearly every template writes fewer."""
_LONGEST_NUMBER = 4096
_LARGEST_ARGUMENT = 2**20
_GROWING_FILTERS = ("batch", "center", "format", "indent", "join", "replace", "round", "slice", "tojson", "wordwrap")
_OTHER_FILTERS = ("list", "pprint", "string", "sum", "urlize", "xmlattr")
_GROWING_METHODS = ("expandtabs", "format", "format_map", "join", "replace", "translate")
_WIDE = re.compile(r"\d{6,}|[:*][^}]*\{|%[^a-zA-Z%]*\*")
"""In a format: a width of six digits, or one that is itself an argument."""


class TooLargeError(Exception):
    """A template makes something larger than `LIMIT`; `what` says it in other words."""

    def __init__(self, what: str = f"a text or a list of more than {LIMIT:,} characters") -> None:
        super().__init__(f"it makes {what}")


def _weight(*values: object) -> int:
    """How much the values hold, what is in two places counted twice.

    Raises:
        TooLargeError: more than `LIMIT`.
    """
    total = 0
    todo = list(values)
    while todo:
        value = todo.pop()
        if isinstance(value, (str, bytes)):
            total += len(value)
        elif isinstance(value, int):
            total += value.bit_length() // 3
        else:
            inside = _inside(value)
            total += _ITEM * (1 + len(inside))
            if total <= LIMIT:
                todo += inside
        if total > LIMIT:
            raise TooLargeError
    return total


def _inside(value: object) -> list[object]:
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, Namespace):
        value = getattr(value, "_Namespace__attrs", None)
    if isinstance(value, dict):
        return [*value, *value.values()]
    return []


def _held(value: object) -> object:
    """The value, weighed."""
    if type(value) is str and len(value) <= LIMIT:  # the usual one, fast
        return value
    _weight(value)
    return value


def _check_product(value: object, others: Iterable[object], times: int = 1) -> None:
    """Refuse a call whose result may be as large as its value times its arguments."""
    growth = times
    for other in others:
        growth += abs(other) if isinstance(other, int) else _weight(other)
    if (1 + _weight(value)) * growth > 4 * LIMIT:  # a bound far above what most calls make
        raise TooLargeError


def _text(value: object) -> str:
    """`str`, for what a template writes."""
    if type(value) is str:
        return value
    _weight(value)
    made = str(value)
    _weight(made)
    return made


def _escaped(value: object) -> str:
    _weight(value)
    return escape(value)


def _plus(left: object, right: object) -> object:
    return _held(left + right)  # type: ignore[operator]  # what can be added is the template's affair


def _concat(parts: Iterable[str]) -> str:
    """`"".join`, for the texts of a template or a macro."""
    made: list[str] = []
    total = 0
    rest = iter(parts)
    while some := list(islice(rest, _AT_ONCE)):
        total += sum(map(len, some))
        if total > LIMIT or len(made) > LIMIT // _ITEM:
            raise TooLargeError
        made += some
    return "".join(made)


class _Buffer(list[str]):
    """What a macro has written so far."""

    def __init__(self) -> None:
        super().__init__()
        self._total = 0

    def append(self, part: str) -> None:
        self._total += _ITEM + len(part)
        if self._total > 2 * LIMIT:
            raise TooLargeError
        super().append(part)

    def extend(self, parts: Iterable[str]) -> None:
        for part in parts:
            self.append(part)


def _settled(value: object) -> object:
    """An iterator as a list, weighed while it is made."""
    if not isinstance(value, Iterator):
        return value
    made, total = [], 0
    for item in value:
        total += _ITEM + _weight(item)
        if total > LIMIT:
            raise TooLargeError
        made.append(item)
    return made


def _limited_filter(name: str, function: Callable[..., object]) -> Callable[..., object]:
    """A filter whose value and arguments are looked at before, and whose result after. jinja's call passes through."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja hands some filters its context first

    @functools.wraps(function)
    def limited(*given: object, **named: object) -> object:
        value, *others = map(_settled, given[first:])
        if name in _GROWING_FILTERS:
            if name == "format" and _WIDE.search(str(value)):
                raise TooLargeError
            _check_product(value, chain(others, named.values()))
        elif name == "sum" and (others or named):  # of lists: each step copies the sum so far
            _check_product(value, others, times=len(_inside(value)))
        return _held(function(*given[:first], value, *others, **named))

    return limited


class _Generator(CodeGenerator):
    """Jinja's compiler, with functions of ours where values are put together."""

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:  # noqa: N802  jinja's name
        if isinstance(node.left, nodes.Const) or isinstance(node.right, nodes.Const):
            super().visit_Add(node, frame)
            return
        self.write("_plus(")
        self.visit(node.left, frame)
        self.write(", ")
        self.visit(node.right, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self.write("_held(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("_held(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx != "load":  # the names on the left of an assignment
            super().visit_Tuple(node, frame)
            return
        self.write("_held(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def buffer(self, frame: Frame) -> None:
        frame.buffer = self.temporary_identifier()
        self.writeline(f"{frame.buffer} = _Buffer()")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with the limit; make templates with `template`."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "%"})
    concat = staticmethod(_concat)

    def limit(self) -> None:
        """Put the limit on the filters; call it once all are there."""
        for name in (*_GROWING_FILTERS, *_OTHER_FILTERS):
            self.filters[name] = _limited_filter(name, self.filters[name])

    def template(self, source: str) -> jinja2.Template:
        """Compile a template."""
        made = self.from_string(source)
        # The module that jinja compiled it to, which calls these by name.
        made.root_render_func.__globals__.update(
            str=_text,
            escape=_escaped,
            str_join=lambda parts: _held(str_join(parts)),
            markup_join=lambda parts: _held(markup_join(parts)),
            _plus=_plus,
            _held=_held,
            _Buffer=_Buffer,
        )
        return made

    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        """Refuse at once: jinja's own gives a value that is an error only where it is used, and empty text before."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe.")

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """`*`, `**` and `%`, refused where the result would be too large."""
        if isinstance(left, (str, bytes)) and operator == "%":
            if _WIDE.search(str(left)):
                raise TooLargeError
            _check_product(left, (right,))
        elif isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
            if bits.get(operator, 0) > _LONGEST_NUMBER:
                raise TooLargeError
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and _weight(value) * max(times, 0) > LIMIT:
                    raise TooLargeError
        return _held(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: object, *given: object, **named: object) -> object:  # noqa: N805
        """A call, of whatever a template can call; the names are jinja's, so that none of the template's is taken."""
        if given or named:
            given = tuple(map(_settled, given))
            _weight(*given, *named.values())
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        if isinstance(method, BuiltinMethodType) and not isinstance(method.__self__, type(re)):
            _check_method(method, [*given, *named.values()])
            return _held(super().call(__context, __obj, *given, **named))
        return super().call(__context, __obj, *given, **named)


def _check_method(method: BuiltinMethodType, arguments: list[object]) -> None:
    """Refuse a method of a text or a number that would make something too large."""
    if method.__name__ in ("format", "format_map"):
        if _WIDE.search(str(method.__self__)):
            raise TooLargeError
    elif any(isinstance(number, int) and abs(number) > _LARGEST_ARGUMENT for number in arguments):
        raise TooLargeError
    if method.__name__ in _GROWING_METHODS:
        texts = [argument for argument in arguments if not isinstance(argument, int)]
        _check_product(method.__self__, texts)
