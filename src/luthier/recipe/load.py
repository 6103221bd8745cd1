"""A recipe file and `--set` overrides -> Recipe, or a RecipeError with every problem at once, each with its line.

Paths are the recipe's: a relative path under `data`, and a `model` that is a folder, are taken from the folder that the
recipe lies in, also when they come from `--set`; the loaded Recipe holds them absolute. `pirate`, `tales` and `sprig`
are the bundled ones; files of these names are written `./pirate`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from luthier.errors import Problem, RecipeError
from luthier.recipe.document import DEEPEST, Key, Keys, read_document, write_document
from luthier.recipe.expects import dotted, expected, found, is_section, nearest, settings_under
from luthier.recipe.places import DATA_ENDINGS, ending_of, reads_as_hub_set
from luthier.recipe.rules import breaches
from luthier.recipe.schema import BUNDLED_DATA, BUNDLED_MODEL, Recipe, as_sources

__all__ = ["dump_recipe", "load_recipe", "recipe_from_mapping"]

_PLACEHOLDERS: Mapping[str, object] = {"model": BUNDLED_MODEL, "data": [{"path": BUNDLED_DATA[0]}]}
"""What stands in for a missing or wrong required setting while the rules are checked on the rest."""
_MOST_PROBLEMS = 200
"""That are shown."""


@dataclass
class _Origin:
    """Where each setting was written: the file's lines, and the overrides, which win."""

    where: str
    lines: Mapping[Keys, int] = field(default_factory=dict)
    overrides: dict[Keys, str] = field(default_factory=dict)

    def problem(self, keys: Keys, reason: str, remedy: str | None) -> Problem:
        """The problem at the override that set `keys` (or something in or above it), else at the nearest line known."""
        for path, text in reversed(self.overrides.items()):
            if keys[: len(path)] == path or path[: len(keys)] == keys != ():
                return Problem(f"--set {text}", None, reason, remedy)
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.lines:
                return Problem(self.where, self.lines[keys[:length]], reason, remedy)
        return Problem(self.where, None, reason, remedy)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file `path`, changed by `overrides` such as `train.steps=60` (values are YAML; later ones win).

    Raises:
        RecipeError: with all problems of file and overrides.
    """
    where = str(path)
    if ending_of(where) in DATA_ENDINGS:
        remedy = f"luthier init --data {path} --out recipe.yaml writes a recipe for it"
        raise RecipeError([Problem(where, None, "this is data, not a recipe", remedy)])
    document = read_document(_read(path), where)
    if document.problems:
        raise RecipeError(_shown([*document.problems, *_check_overrides_alone(overrides)], where))
    if document.value is None:
        remedy = "`luthier init` writes one with every setting explained"
        raise RecipeError([Problem(where, None, "the recipe is empty", remedy)])
    if not isinstance(document.value, dict):
        reason = f"a recipe is a mapping of settings (`model: …`), this is {found(document.value)}"
        raise RecipeError([Problem(where, 1, reason, "`luthier init` writes one to start from")])
    return _build(document.value, _Origin(where, document.lines), overrides, path.parent)


def recipe_from_mapping(
    values: Mapping[str, object], *, folder: Path | None = None, overrides: Sequence[str] = (), where: str = "recipe"
) -> Recipe:
    """A recipe from plain values, checked like a file. Relative paths are taken from `folder` (None: current)."""
    return _build(values, _Origin(where), overrides, folder or Path())


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every setting; loading it gives an equal recipe (of absolute paths: from anywhere)."""
    return write_document(recipe.model_dump(mode="json"))


def _read(path: Path) -> str:
    where = str(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        beside = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        remedy = f"did you mean {near[0]}?" if near else "`luthier init` writes one"
        raise RecipeError([Problem(where, None, "there is no such recipe file", remedy)]) from None
    except IsADirectoryError:
        problem = Problem(where, None, "this is a folder, not a recipe file", "give the .yaml file in it")
        raise RecipeError([problem]) from None
    except UnicodeDecodeError as error:
        reason = f"not a text in UTF-8 (byte {error.start})"
        raise RecipeError([Problem(where, None, reason, "save it as UTF-8; a recipe is a YAML file")]) from None
    except OSError as error:
        problem = Problem(where, None, f"cannot be read: {error.strerror}", "check its permissions")
        raise RecipeError([problem]) from None


def _build(values: Mapping[str, object], origin: _Origin, overrides: Sequence[str], folder: Path) -> Recipe:
    value = _normal(values)
    problems = [problem for text in overrides for problem in _override(value, text, origin)]
    value = _normal(value)
    recipe, more, wrong = _validated(value, origin)
    problems += more
    above = {bad[:length] for bad in wrong for length in range(len(bad))}
    for breach in breaches(recipe):
        if not any(path in above or _or_above(path, wrong) for path in breach.paths):
            at = next((path for path in breach.paths if _set_here(path, origin)), breach.paths[0])
            problems.append(origin.problem(at, breach.reason, breach.remedy))
    if problems:
        raise RecipeError(_shown(problems, origin.where))
    return _resolved(recipe, folder)


def _or_above(path: Keys, places: AbstractSet[Keys]) -> bool:
    """Whether the setting, or one that holds it, is among the places."""
    return any(path[:length] in places for length in range(len(path) + 1))


def _shown(problems: Sequence[Problem], where: str) -> list[Problem]:
    """By line, those without one last; of very many the first."""
    ordered = sorted(problems, key=lambda one: (one.line is None, one.line or 0))
    left = len(ordered) - _MOST_PROBLEMS
    return ordered if left <= 0 else [*ordered[:-left], Problem(where, None, f"and {left:,} problems more")]


def _set_here(path: Keys, origin: _Origin) -> bool:
    return path in origin.overrides or path in origin.lines


def _normal(values: Mapping[str, object]) -> dict[str, object]:
    """A deep copy in which `data` is a list of mappings, and a section without anything in it is an empty one."""
    made = {name: _copied(value) for name, value in values.items()}
    if "data" in made:
        made["data"] = as_sources(made["data"])
    return {name: {} if value is None and is_section((name,)) else value for name, value in made.items()}


def _copied(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    return value


def _parsed(text: str) -> tuple[Keys, object, list[Problem]]:
    name, equals, written = text.partition("=")
    where = f"--set {text}"
    if not equals or "" in name.strip().split(".") or name.count(".") > DEEPEST:
        return (), None, [Problem(where, None, "this is not KEY=VALUE", "such as --set train.steps=60")]
    document = read_document(written, where)
    problems = [Problem(where, None, problem.reason, problem.remedy) for problem in document.problems]
    keys = tuple(int(part) if part.isascii() and part.isdecimal() else part for part in name.strip().split("."))
    return keys, document.value, problems


def _check_overrides_alone(overrides: Sequence[str]) -> list[Problem]:
    """What is wrong with overrides by themselves, for a file that cannot be read."""
    return [problem for text in overrides for problem in _parsed(text)[2]]


def _override(value: dict[str, object], text: str, origin: _Origin) -> list[Problem]:
    """Write one `key.path=value` into `value`; missing sections on the way are made."""
    keys, new, problems = _parsed(text)
    if problems:
        return problems
    place: object = value
    for depth, key in enumerate(keys[:-1]):
        if isinstance(place, dict):
            place = place.setdefault(str(key), {})
        elif isinstance(place, list) and isinstance(key, int) and key < len(place):
            place = place[key]
        else:
            return [_no_place(place, keys[: depth + 1], text)]
    last = keys[-1]
    if isinstance(place, dict):
        place[str(last)] = new
    elif isinstance(place, list) and isinstance(last, int) and last < len(place):
        place[last] = new
    else:
        return [_no_place(place, keys, text)]
    origin.overrides.pop(keys, None)
    origin.overrides[keys] = text
    return []


def _no_place(place: object, keys: Keys, text: str) -> Problem:
    holder = dotted(keys[:-1])
    if isinstance(place, list):
        reason = f"`{holder}` is a list of {len(place)}, so `{keys[-1]}` is not in it"
        remedy = f"from {holder}.0 to {holder}.{len(place) - 1}" if place else None
        return Problem(f"--set {text}", None, reason, remedy)
    return Problem(f"--set {text}", None, f"`{holder}` is {found(place)}, it has nothing in it", None)


def _validated(value: dict[str, object], origin: _Origin) -> tuple[Recipe, list[Problem], set[Keys]]:
    """A recipe from what is right in `value`, the problems with the rest, and which settings those are."""
    problems: list[Problem] = []
    wrong: set[Keys] = set()
    while True:
        try:
            return Recipe.model_validate(value), problems, wrong
        except ValidationError as error:
            fresh = _places(error, value)
            new = [keys for keys in fresh if keys not in wrong]
            for keys in sorted(new, key=lambda keys: origin.lines.get(keys, 0)):
                if len(problems) < _MOST_PROBLEMS:
                    problems.append(_explained(keys, fresh[keys], value, origin))
                else:  # is counted and not shown: guessing what was meant takes a while
                    problems.append(origin.problem(keys, f"`{dotted(keys)}` is wrong", None))
            if not new:
                raise AssertionError(f"the schema refuses its own defaults: {error}") from error
            wrong |= set(fresh)
            for keys in sorted(fresh, key=len, reverse=True):
                _prune(value, keys)


def _places(error: ValidationError, value: object) -> dict[Keys, str]:
    """Place -> kind of each error; of the branches of a union, the one that came furthest."""
    kinds: dict[Keys, str] = {}
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        kinds.setdefault(_real_keys(one["loc"], value, one["type"]), one["type"])
    above = {keys[:length] for keys in kinds for length in range(len(keys))}
    return {keys: kind for keys, kind in kinds.items() if keys not in above}


def _real_keys(loc: Sequence[Key], value: object, kind: str) -> Keys:
    """pydantic's place without the names of union branches: the part of it that is in the data."""
    keys: list[Key] = []
    for key in loc:
        absent = kind == "missing" and key == loc[-1]
        if (isinstance(value, dict) and (key in value or absent)) or isinstance(key, int):
            value = _item(value, key)
            keys.append(key)
    return tuple(keys)


def _explained(keys: Keys, kind: str, value: object, origin: _Origin) -> Problem:
    name = dotted(keys)
    if kind == "missing":
        return origin.problem(keys, f"`{name}` is missing", f"add `{keys[-1]}: …`, {expected(keys)}")
    if kind in ("extra_forbidden", "invalid_key"):
        near = nearest(keys)
        known = f"known here: {', '.join(settings_under(keys[:-1]))}"
        return origin.problem(keys, f"unknown setting `{name}`", f"did you mean `{near}`?" if near else known)
    held = value
    for key in keys:
        held = _item(held, key)
    return origin.problem(keys, f"`{name}` must be {expected(keys)}; it is {found(held)}", _close_choice(keys, held))


def _item(holder: object, key: Key) -> object:
    if isinstance(holder, dict):
        return holder.get(key)
    return holder[key] if isinstance(holder, list) and isinstance(key, int) and key < len(holder) else None


def _close_choice(keys: Keys, held: object) -> str | None:
    """For a word that is nearly one of those allowed."""
    words = [word.strip(" ,") for word in expected(keys).replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(held, words, n=1) if isinstance(held, str) else []
    return f"did you mean `{near[0]}`?" if near else None


def _prune(value: dict[str, object], keys: Keys) -> None:
    """Take a wrong setting out, so that the rest can be checked; what is required gets a placeholder."""
    place: object = value
    trail: list[tuple[dict[str, object], str]] = []
    for key in keys[:-1]:
        if isinstance(place, dict):
            trail.append((place, str(key)))
            place = place.get(str(key))
        elif isinstance(place, list):
            break  # an entry of a list: the whole list goes
    if keys[0] in _PLACEHOLDERS:
        value[str(keys[0])] = _PLACEHOLDERS[str(keys[0])]
    elif isinstance(place, dict):
        place.pop(str(keys[-1]), None)
    elif trail:
        trail[-1][0].pop(trail[-1][1], None)


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    base = Path(os.path.abspath(folder))

    def place(text: str) -> str:
        return os.path.normpath(base / os.path.expanduser(text))

    def here(path: str) -> bool:
        hub = reads_as_hub_set(path) and not os.path.exists(place(path))
        return path not in BUNDLED_DATA and not hub

    sources = tuple(
        source.model_copy(update={"path": place(source.path)}) if here(source.path) else source
        for source in recipe.data
    )
    model = recipe.model
    as_path = model.startswith((".", "~")) or Path(model).is_absolute()
    if model != BUNDLED_MODEL and (as_path or os.path.isdir(base / model)):
        model = place(model)
    return recipe.model_copy(update={"data": sources, "model": model})
