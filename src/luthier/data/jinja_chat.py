"""Chat templates: jinja source and turns in, text out, in jinja's sandbox.

A chat template comes with a model, so it is somebody else's program. It runs in `ImmutableSandboxedEnvironment` with
the settings and the few helpers that transformers gives it (trim_blocks, lstrip_blocks, loop controls, `tojson`,
`raise_exception`, `strftime_now`, the `generation` tag), so that it renders here what it renders there; only the date
is fixed, see `TEMPLATE_DATE`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.data.conversation import Turn
from luthier.errors import DataError

__all__ = ["TEMPLATE_DATE", "render_chat"]

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The day that templates are told it is, for those that write the date into the system turn.

Fixed, so that the same rows are the same tokens on any day: a run can be resumed tomorrow, and what is prompted after
training is what was trained. It is the day that Llama 3.2's own template falls back to.
"""


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


def _strftime(form: str) -> str:
    return TEMPLATE_DATE.strftime(form)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        message = f"the chat template is not valid jinja: {error.message} (line {error.lineno})"
        raise DataError(message, "use another `template`, such as alpaca") from error


def render_chat(
    source: str, turns: Sequence[Turn], *, generation_prompt: bool, special: Mapping[str, str | list[str]]
) -> str:
    """The text that the template makes of `turns`.

    Args:
        source: the template, in jinja.
        turns: the conversation so far.
        generation_prompt: end with the text that opens an assistant's turn.
        special: `bos_token`, `eos_token` and the like, as the template may name them.

    Raises:
        DataError: the template is not valid, refuses the conversation, or fails.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    compiled = _compiled(source)
    try:
        return compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=generation_prompt, **special
        )
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses the conversation: {error.message or error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, IndexError, OverflowError) as error:
        # The template's own mistakes (a filter given the wrong type) surface as plain Python errors.
        raise DataError(f"the chat template fails on the conversation: {error}") from error
