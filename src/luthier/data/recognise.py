"""Which format a file's rows have, from their keys; and what to say where they fit none."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from luthier.data.formats import FORMATS, Fields
from luthier.errors import DataError
from luthier.recipe.schema import DataSource

__all__ = ["format_of", "nearest_format", "recognise", "renamed"]


def recognise(keys: Collection[str]) -> tuple[str, ...]:
    """The formats whose required keys are all in `keys`, best first; empty when none fits."""
    return tuple(name for name, form in FORMATS.items() if set(form.required) <= set(keys))


def nearest_format(keys: Collection[str]) -> tuple[str, dict[str, str]] | None:
    """The format that these keys come nearest to, and which key is probably meant by which: `{required: found}`.

    None when nothing is near. Used only in error messages.
    """
    best: tuple[float, str, dict[str, str]] | None = None
    lowered = {key.lower(): key for key in keys}
    for name, form in FORMATS.items():
        guessed: dict[str, str] = {}
        score = 0.0
        for key in form.required:
            close = difflib.get_close_matches(key, list(lowered), n=1, cutoff=0.6)
            if close:
                score += difflib.SequenceMatcher(None, key, close[0]).ratio() / len(form.required)
                if lowered[close[0]] != key:
                    guessed[key] = lowered[close[0]]
        if score > 0 and (best is None or score > best[0]):
            best = (score, name, guessed)
    return None if best is None else (best[1], best[2])


def renamed(fields: Fields, mapping: Mapping[str, str]) -> Fields:
    """The row with its columns under the format's names: `mapping` is {the format's name: the file's}."""
    if not mapping:
        return fields
    found = {key: value for key, value in fields.items() if key not in mapping.values()}
    for ours, theirs in mapping.items():  # a mapped column wins over one that happens to have the name already
        if theirs in fields:
            found[ours] = fields[theirs]
    return found


def format_of(source: DataSource, where: str, rows: Sequence[Fields]) -> tuple[str, str]:
    """The format's name, and in words how it was known, from some rows as they stand in the file.

    Args:
        source: what the recipe says of the file.
        where: the place of the first of the rows, for messages.
        rows: at least one.

    Raises:
        DataError: they are of no known format, or `fields` names a key that none of them has.
    """
    for ours, theirs in source.fields.items():
        needed = source.format == "auto" or ours in FORMATS[source.format].required
        if (
            needed
            and not any(theirs in row for row in rows)
            and any(ours in form.required for form in FORMATS.values())
        ):
            raise _no_such_key(source, ours, theirs, rows[0])
    if source.format != "auto":
        return source.format, "as the recipe says"
    keys = [list(renamed(row, source.fields)) for row in rows]
    fitting = Counter(name for one in keys for name in recognise(one)[:1])
    if not fitting:
        raise DataError(*_unrecognised(where, keys[0], rows[0]))
    name = fitting.most_common(1)[0][0]
    others = next(found for found in map(recognise, keys) if found[:1] == (name,))[1:]
    also = f"; {' and '.join(others)} would fit too" if others else ""
    return name, f"recognised by {' and '.join(FORMATS[name].required)}{also}"


def _no_such_key(source: DataSource, ours: str, theirs: str, row: Fields) -> DataError:
    near = difflib.get_close_matches(theirs, list(row), n=1)
    hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(sorted(row))}"
    return DataError(f"{source.path}: `fields` takes {ours} from {theirs!r}, a key that no row has", hint)


def _unrecognised(where: str, keys: Sequence[str], row: Fields) -> tuple[str, str]:
    formats = "\n".join(f"    {name + ':':<19}{form.keys}   ({form.about})" for name, form in FORMATS.items())
    message = f"{where}: {_fact(keys)}\n  the formats are\n{formats}"
    nested = next((key for key, value in row.items() if isinstance(value, list) and _are_objects(value)), None)
    if nested is not None:
        return message, f"if the rows are the list under {nested!r}, take it out: jq -c '.{nested}[]' FILE > rows.jsonl"
    return message, _mapping_hint(keys)


def _are_objects(values: Sequence[object]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _fact(keys: Sequence[str]) -> str:
    """What is missing for the format that lacks least; else all the keys."""
    has = {name: [key for key in form.required if key in keys] for name, form in FORMATS.items()}
    name = max(has, key=lambda name: len(has[name]))
    if has[name]:
        missing = [key for key in FORMATS[name].required if key not in keys]
        return f"the rows have {_ticked(has[name])} but no {_ticked(missing)} (format {name})"
    if not keys:
        return "the rows have no keys"
    return f"no format has these keys: {', '.join(sorted(keys))}"


def _ticked(keys: Sequence[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _mapping_hint(keys: Sequence[str]) -> str:
    near = nearest_format(keys)
    if near is None:
        return "say which of your keys is which: data: [{path: …, fields: {question: your-key, answer: another}}]"
    name, guessed = near
    form = FORMATS[name]
    unknown = {key: "your-key" for key in form.required if key not in keys}
    spare = [key for key in keys if key not in (*form.required, *form.optional, *guessed.values())]
    if len(unknown.keys() - guessed.keys()) == len(spare) == 1:  # Dolly's: instruction, context, response
        unknown = dict.fromkeys(unknown, spare[0])
    mapping = ", ".join(f"{ours}: {theirs}" for ours, theirs in (unknown | guessed).items())
    return f"nearest is {name}: say which of your keys is which, data: [{{path: …, fields: {{{mapping}}}}}]"
