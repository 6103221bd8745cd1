"""What must hold between settings of a recipe: one small function per rule, all in `RULES`.

Each takes a recipe whose settings are right one by one, and yields what is wrong with them together. To add a rule:
write its function, add it to `RULES` and a test.
"""

from __future__ import annotations

import difflib
import math
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from luthier.guard.secrets import holds_secret
from luthier.recipe.places import reads_as_hub_set
from luthier.recipe.schema import BUNDLED_DATA, KNOWN_TASKS, NAMED_TEMPLATES, Recipe
from luthier.recipe.times import seconds_of

__all__ = ["RULES", "Breach", "breaches"]

Path = tuple[str | int, ...]
_MOST_ROWS = 2**16
"""Where a micro-batch that divides the batch is looked for; no machine holds more rows at once."""
_EXAMPLE = '"Q: {question}\\nA: {answer}"'


@dataclass(frozen=True)
class Breach:
    """One broken rule. `paths` are the settings it is about; the problem is shown at the first of them."""

    paths: tuple[Path, ...]
    reason: str
    remedy: str


def _epochs_or_steps(recipe: Recipe) -> Iterator[Breach]:
    train = recipe.train
    if train.steps is not None and train.epochs != "auto":
        yield Breach(
            (("train", "steps"), ("train", "epochs")),
            f"`train.steps` is {train.steps} and `train.epochs` is {train.epochs:g}: only one can say when to end",
            "leave one of them out",
        )


def _warmup_ends(recipe: Recipe) -> Iterator[Breach]:
    train = recipe.train
    if train.steps is not None and train.warmup_steps != "auto" and train.warmup_steps >= train.steps:
        yield Breach(
            (("train", "warmup_steps"), ("train", "steps")),
            f"`train.warmup_steps` is {train.warmup_steps}, but the run has only {train.steps} steps",
            f"at most {train.steps - 1}, or auto",
        )


def _micro_batch_divides(recipe: Recipe) -> Iterator[Breach]:
    batch, micro = recipe.train.batch_size, recipe.train.micro_batch
    if batch == "auto" or micro == "auto" or batch % micro == 0:
        return
    most = min(batch, micro, _MOST_ROWS)
    nearest = next(rows for rows in range(most, 0, -1) if batch % rows == 0)
    yield Breach(
        (("train", "micro_batch"), ("train", "batch_size")),
        f"`train.micro_batch` {micro} does not divide `train.batch_size` {batch}",
        f"the nearest {f'up to {most:,} ' if most == _MOST_ROWS else ''}that does is {nearest}",
    )


def _time_is_some(recipe: Recipe) -> Iterator[Breach]:
    time = recipe.train.max_time
    if time is not None and seconds_of(time) <= 0:
        reason = f"`train.max_time` is {time}, which leaves no time at all"
        yield Breach((("train", "max_time"),), reason, "such as 2h30m; left out: no limit")


def _no_secrets(recipe: Recipe) -> Iterator[Breach]:
    """A recipe is copied into its run and into the report: what is in it is published with them."""
    for path, text in _texts(recipe.model_dump(), ()):
        if holds_secret(text):
            name = ".".join(map(str, path))
            reason = f"`{name}` holds what looks like a token or a password, and a recipe is copied into its run"
            yield Breach((path,), reason, "take it out; set HF_TOKEN, or log in with `hf auth login`")


def _texts(value: object, path: Path) -> Iterator[tuple[Path, str]]:
    """Every text in it, with its place."""
    if isinstance(value, str):
        yield path, value
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, inner in items:
        yield from _texts(inner, (*path, key if isinstance(key, int) else str(key)))


def _split_sums_to_one(recipe: Recipe) -> Iterator[Breach]:
    split = recipe.split
    total = split.train + split.eval + split.test
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        yield Breach(
            (("split",),),
            f"the fractions under `split` sum to {total:g}, not to 1 "
            f"(train {split.train:g}, eval {split.eval:g}, test {split.test:g})",
            "what is left out has its default: train 0.9, eval 0.1, test 0",
        )


def _something_to_train_on(recipe: Recipe) -> Iterator[Breach]:
    if all(source.split in ("eval", "test") for source in recipe.data):
        remedy = "give one `split: train`, or `all`"
        yield Breach((("data",),), "every file under `data` is held out, none is trained on", remedy)


def _no_twice(recipe: Recipe) -> Iterator[Breach]:
    lists: tuple[tuple[Path, tuple[str, ...]], ...] = (
        (("export",), recipe.export),
        (("evaluate", "tasks"), recipe.evaluate.tasks),
        (("adapter", "targets"), () if isinstance(recipe.adapter.targets, str) else recipe.adapter.targets),
    )
    for path, names in lists:
        again: dict[str, int] = {}
        seen: set[str] = set()
        for place, name in enumerate(names):
            if name in seen:
                again.setdefault(name, place)
            seen.add(name)
        for name, place in again.items():
            where = ".".join(map(str, path))
            yield Breach(((*path, place),), f"`{name}` stands twice in `{where}`", "take one out")


def _known_tasks(recipe: Recipe) -> Iterator[Breach]:
    for place, name in enumerate(recipe.evaluate.tasks):
        if name not in KNOWN_TASKS:
            near = difflib.get_close_matches(name, KNOWN_TASKS, n=1)
            guess = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(KNOWN_TASKS)}"
            yield Breach((("evaluate", "tasks", place),), f"there is no task `{name}`", guess)


def _prompt_weight_has_prompts(recipe: Recipe) -> Iterator[Breach]:
    if recipe.train_on == "all" and recipe.prompt_loss_weight > 0:
        yield Breach(
            (("prompt_loss_weight",), ("train_on",)),
            "with `train_on: all` every token counts in full, so `prompt_loss_weight` says nothing",
            "leave one of them out",
        )


def _hub_settings_of_a_hub_set(recipe: Recipe) -> Iterator[Breach]:
    for place, source in enumerate(recipe.data):
        hub = reads_as_hub_set(source.path) and source.path not in BUNDLED_DATA
        if not hub and (source.subset is not None or source.stream or source.hub_split != "train"):
            yield Breach(
                (("data", place),),
                f"`{source.path}` is no data set on the hub: subset, hub_split and stream are for those alone",
                "leave them out",
            )


def _template_reads(recipe: Recipe) -> Iterator[Breach]:
    """A text template: braces that pair, plain names in them, the answer's field at the end."""
    text, path = recipe.template, (("template",),)
    if text in NAMED_TEMPLATES:
        return
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        yield Breach(path, f"`template`: {error}", "a brace that is meant as text is written twice: {{ or }}")
        return
    named = [piece for piece in pieces if piece[1] is not None]
    names = [name or "" for _, name, _, _ in named]
    if not names:
        near = difflib.get_close_matches(text, NAMED_TEMPLATES, n=1)
        guess = f"did you mean `{near[0]}`?" if near else f"{', '.join(NAMED_TEMPLATES)}, or a text such as {_EXAMPLE}"
        yield Breach(path, f"`template` is {text!r}, which names no key of the rows in braces", guess)
    for name in dict.fromkeys(name for _, name, form, conversion in named if not name or form or conversion):
        reason = f"`template`: braces must hold a key's name and nothing else, not {name!r} with a format"
        yield Breach(path, reason, f"such as {_EXAMPLE}; braces that are meant as text are written twice")
    for name in (name for name, times in Counter(names).items() if times > 1):
        yield Breach(path, f"`template` names {{{name}}} more than once", "name each key once")
    after = "" if pieces and pieces[-1][1] is not None else pieces[-1][0].strip() if names else ""
    if after:
        yield Breach(path, f"`template` goes on after its last key: {after!r}", "end it with the answer's key")


RULES: tuple[Callable[[Recipe], Iterator[Breach]], ...] = (
    _epochs_or_steps,
    _warmup_ends,
    _micro_batch_divides,
    _time_is_some,
    _no_secrets,
    _split_sums_to_one,
    _something_to_train_on,
    _no_twice,
    _known_tasks,
    _prompt_weight_has_prompts,
    _hub_settings_of_a_hub_set,
    _template_reads,
)


def breaches(recipe: Recipe) -> tuple[Breach, ...]:
    """Every rule that `recipe` breaks, in the order of `RULES`."""
    return tuple(breach for rule in RULES for breach in rule(recipe))
