"""Chat templates: jinja source and turns in, text out, in jinja's sandbox.

A chat template comes with a model, so it is somebody else's program. It runs in jinja's sandbox, limited in time
(jinja_watch.py) and in what it makes (jinja_limits.py), with the settings and the few helpers that transformers gives
it (trim_blocks, lstrip_blocks, loop controls, `tojson`, `raise_exception`, `strftime_now`, the `generation` tag), so
that it renders here what it renders there; only the date is fixed, see `TEMPLATE_DATE`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import NoReturn, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context

from luthier.data.conversation import Turn
from luthier.data.jinja_limits import LimitedEnvironment, TooLargeError
from luthier.data.jinja_watch import CPU_SECONDS, RunawayError, within_limit
from luthier.errors import DataError

__all__ = ["TEMPLATE_DATE", "ChatTemplate", "Message", "dated", "render_chat"]

Message: TypeAlias = dict[str, str]
"""What templates see of a turn: its role and its content."""

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The day that templates are told it is, for those that write the date into the system turn.

Fixed, so that the same rows are the same tokens on any day: a run can be resumed tomorrow, and what is prompted after
training is what was trained. It is the day that Llama 3.2's own template falls back to.
"""


_DAY: ContextVar[datetime] = ContextVar("_DAY", default=TEMPLATE_DATE)


@contextmanager
def dated(day: datetime) -> Iterator[None]:
    """Within the block templates are told that it is `day`: as other programs do, to be compared with them."""
    token = _DAY.set(day)
    try:
        yield
    finally:
        _DAY.reset(token)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for transformers' masks; as text it is its body.

    Our masks come from prefix rendering (render.py), which needs no such marks.
    """

    tags = {"generation"}  # noqa: RUF012  jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


LONGEST_DATE_FORMAT = 256
"""Characters. What a format makes is one step in C, to which neither limit reaches: `%999999999d` asks for a billion
zeros, and gets memory for 256 characters to each of the format's own before Python gives up."""


def _strftime(form: str) -> str:
    if len(form) > LONGEST_DATE_FORMAT:
        raise TooLargeError(f"a date by a format of more than {LONGEST_DATE_FORMAT} characters")
    return _DAY.get().strftime(form)


LONGEST_TEMPLATE = 2**18
"""Characters; the longest templates of published models have a tenth of it."""
_LONGEST_SAID = 500
"""Characters: what a template says (`raise_exception`) is told of every row that it refuses."""
_REMEDY = "use another `template`, such as alpaca"
_FAILURES = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, NameError, RuntimeError),
    MemoryError,
)
"""What a template's own mistakes (a filter given the wrong type, a macro without end) surface as."""


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > LONGEST_TEMPLATE:
        message = f"the chat template has {len(source):,} characters; at most {LONGEST_TEMPLATE:,} are compiled"
        raise DataError(message, _REMEDY)
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime
    environment.limit()
    try:
        return within_limit(environment.template, source)
    except jinja2.TemplateSyntaxError as error:
        message = f"the chat template is not valid jinja: {_said(error)} (line {error.lineno})"
        raise DataError(message, _REMEDY) from error
    except RunawayError as error:
        raise DataError("the chat template takes too long to compile", _REMEDY) from error
    except (SyntaxError, *_FAILURES) as error:  # nested too deeply for Python
        raise DataError(f"the chat template cannot be compiled: {_said(error)}", _REMEDY) from error


def _said(error: BaseException) -> str:
    said = error.message if isinstance(error, jinja2.TemplateSyntaxError) else str(error)  # str: its source line too
    said = said or type(error).__name__
    return said if len(said) <= _LONGEST_SAID else said[:_LONGEST_SAID] + "…"


class ChatTemplate:
    """A chat template, ready to write messages; in any thread."""

    def __init__(self, source: str, special: Mapping[str, str | list[str]]) -> None:
        """`special`: `bos_token`, `eos_token` and the like, as the template may name them.

        Raises:
            DataError: the source is not valid jinja.
        """
        self._template = _compiled(source)
        self._always = {**self._template.globals, "tools": None, "documents": None, **special}

    def _write(self, values: dict[str, object]) -> str:
        template = self._template
        context = Context(template.environment, values, template.name, template.blocks)
        return LimitedEnvironment.concat(template.root_render_func(context))

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """The text that the template makes of `messages`; with `generation_prompt`, up to where an answer begins.

        Raises:
            DataError: the template refuses the messages, fails, or would not come to an end.
        """
        values = {**self._always, "messages": messages, "add_generation_prompt": generation_prompt}
        try:
            return within_limit(self._write, values)
        except SecurityError as error:
            message = f"the chat template reaches for what no template may: {_said(error)}"
            raise DataError(message, "do not use a template that tries this; " + _REMEDY) from error
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {_said(error)}") from error
        except RunawayError as error:
            message = f"the chat template does not come to an end within {CPU_SECONDS:g} seconds"
            raise DataError(message, _REMEDY) from error
        except TooLargeError as error:
            raise DataError(f"the chat template grows without bound: {error}", _REMEDY) from error
        except _FAILURES as error:
            raise DataError(f"the chat template fails on the conversation: {_said(error)}", _REMEDY) from error


def render_chat(
    source: str, turns: Sequence[Turn], *, generation_prompt: bool, special: Mapping[str, str | list[str]]
) -> str:
    """The text that the template `source` makes of `turns`; see `ChatTemplate`."""
    messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in turns]
    return ChatTemplate(source, special).render(messages, generation_prompt)
