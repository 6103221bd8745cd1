"""`luthier init` and `luthier presets`: recipes to start from.

The commented recipe is generated: keys, comments, bounds and defaults come from the schema, values from a preset if one
is named. It loads as it stands. Presets are YAML files in presets/; the comment at the top of each says what it is for.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from luthier.errors import UsageError
from luthier.recipe.document import read_document, write_document
from luthier.recipe.expects import described, is_section, section_of, unit
from luthier.recipe.schema import BUNDLED_MODEL, Recipe

__all__ = ["commented_recipe", "list_presets", "load_preset", "preset_file"]

PRESETS = Path(__file__).resolve().parent / "presets"
_WIDTH = 110
_HEAD = """\
# A Luthier recipe. `luthier plan` says what it will do and why, `luthier run` does it.
# `auto` means that the plan decides, from this machine, this model and these rows. Every line but `model` and `data`
# may be taken out: what is written here is the default, or comes from the preset.
"""


def list_presets() -> dict[str, str]:
    """Name -> what it is for, in a line, of every bundled preset."""
    found = {}
    for file in sorted(PRESETS.iterdir(), key=lambda one: one.name):
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = _about(file.read_text(encoding="utf-8"))
    return found


def preset_file(name: str) -> Path:
    """The file of a preset: a recipe like any other.

    Raises:
        UsageError: there is none of that name.
    """
    known = list_presets()
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise UsageError(f"there is no preset {name!r}", remedy)
    return PRESETS / f"{name}.yaml"


def load_preset(name: str) -> str:
    """The text of a preset. Raises what `preset_file` raises."""
    return preset_file(name).read_text(encoding="utf-8")


def commented_recipe(data: str | None, model: str | None, preset: str | None) -> str:
    """A recipe in YAML with every setting, its help, what it may be and its default.

    `data` and `model` are written in as they are; without them the preset's, else `rows.jsonl` and the bundled base.

    Raises:
        UsageError: there is no such preset.
    """
    values: dict[str, object] = {"model": BUNDLED_MODEL, "data": "rows.jsonl"}
    about: list[str] = []
    if preset is not None:
        text = load_preset(preset)
        about = ["\n", _commented(f"Preset {preset}: {_about(text)}", 0)]
        held = read_document(text, preset).value
        values |= held if isinstance(held, dict) else {}
    if data is not None:
        values["data"] = data
    if model is not None:
        values["model"] = model
    return "".join([_HEAD, *about, *_section(Recipe, values, 0)])


def _about(text: str) -> str:
    """The comment at the top of a preset."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or line == "#":
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _section(model: type[BaseModel], values: Mapping[str, object], depth: int) -> list[str]:
    written = []
    for name, field in model.model_fields.items():
        value = values[name] if name in values else field.get_default(call_default_factory=True)
        if depth == 0:
            written.append("\n")
        written.append(_comment(field, depth))
        inner = section_of((name,)) if depth == 0 and is_section((name,)) else None
        if inner is not None:
            written.append(f"{name}:\n")
            written.extend(_section(inner, value if isinstance(value, dict) else {}, depth + 1))
        else:
            text = write_document({name: list(value) if isinstance(value, tuple) else value})
            written.append(textwrap.indent(_inline(name, value, text), "  " * depth))
    return written


def _inline(name: str, value: object, text: str) -> str:
    """Lists of words on one line: `export: [hf, gguf]`."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        words = [write_document({"x": item}).removeprefix("x: ").strip() for item in value]
        if not any(set(word) & set("[]{},\n") for word in words):
            return f"{name}: [{', '.join(words)}]\n"
    return text


def _comment(field: FieldInfo, depth: int) -> str:
    """The help of a setting, then what it may be and what it is if left out."""
    words = field.description or ""
    bounds = described(field) + (f"; {unit(field)}" if unit(field) else "")
    if bounds not in ("a mapping", "a text"):
        words += f" [{bounds}]"
    return _commented(words, depth)


def _commented(words: str, depth: int) -> str:
    margin = "  " * depth + "# "
    return "\n".join(textwrap.wrap(words, _WIDTH, initial_indent=margin, subsequent_indent=margin)) + "\n"
