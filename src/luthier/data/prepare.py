"""A recipe's data, ready to train on: read, written by the template, tokenised into a store, split, cut to length.

    open_sources -> key -> the store of that key, built if it is not there (build.py) -> sides (split.py) -> Dataset

Nothing is dropped or cut in silence: what was rejected, excluded, truncated or moved is in the `DataReport` with its
reason. Only the store takes time: splits, limits and weights are settled anew at every start, from a few bytes a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from luthier.data.build import Progress, build_store
from luthier.data.cache import cache_folder, content_digest, mark_used, remove_unused
from luthier.data.dataset import Cuts, Dataset, Examples, Places, Reading
from luthier.data.duplicates import FORM
from luthier.data.formats import FORMATS
from luthier.data.length import limit_side
from luthier.data.problems import RowProblem
from luthier.data.render import Template, make_template
from luthier.data.report import SHOWN_EXCLUDED, DataReport, Duplicates, Excluded, SourceReport, SplitReport
from luthier.data.sources import SHOWN_PROBLEMS, OpenSource, open_sources
from luthier.data.split import SIDES, Placed, Split, split_rows
from luthier.data.store import Store, building, open_store
from luthier.data.text_template import parse_text_template
from luthier.data.tokenizer import ChatTokenizer
from luthier.errors import DataError
from luthier.recipe.schema import Recipe

__all__ = ["Dataset", "Kept", "Progress", "keep_rows", "limit_length", "prepare", "rejected_rows", "settle"]

STORE_VERSION = 1
"""Raised when the same sources, template and tokenizer would give other tokens, or the store another layout."""


@dataclass(frozen=True)
class Kept:
    """The rows of a recipe in their store, before anything is said of what they are for."""

    sources: tuple[OpenSource, ...]
    template: Template
    store: Store


def _nothing() -> None:
    """Nobody is to be told that another process builds the same store."""


def prepare(
    recipe: Recipe,
    tokenizer: ChatTokenizer,
    max_length: int | None = None,
    progress: Progress | None = None,
    waiting: Callable[[], None] = _nothing,
) -> Dataset:
    """Read and tokenise the recipe's data, or find it where it was tokenised before.

    Args:
        recipe: its `data` and all that says how rows are read, written, split and weighed.
        tokenizer: the model's.
        max_length: longest row in tokens; None for no limit. To learn the lengths before choosing, prepare without
            and call `limit_length`.
        progress: called while tokenising.
        waiting: called where another process is at work on the same data, and has to end first.

    Raises:
        DataError: files cannot be used; rows cannot, and `on_bad_row` is stop (all of them at once); or no row is left.
        RecipeError: the template is not one.
    """
    kept = keep_rows(recipe, tokenizer, progress, waiting)
    _refuse_bad_rows(recipe, kept)
    found = settle(recipe, kept)
    return found if max_length is None else limit_length(found, max_length)


def settle(recipe: Recipe, kept: Kept) -> Dataset:
    """The second half of `prepare`: what the rows are for, and the report.

    Raises:
        DataError: no row is left to train on.
    """
    sources, template, store = kept.sources, kept.template, kept.store
    sides, split_notes = _sides(recipe, sources, store)
    dataset = _dataset(recipe, sources, store, template, sides)
    notes: list[str] = []
    if template.name != recipe.template:
        notes.append("all rows are plain text: they are learned as they are, without a chat template")
    duplicates = Duplicates(store.counts.exact, store.counts.near, _leaked(store, sides))
    notes += _unused_answers(recipe, sources)
    notes += [*(note for source in sources for note in source.notes), *split_notes, *_notes(store, sides, duplicates)]
    report = DataReport(
        sources=tuple(_source_report(source, store, i) for i, source in enumerate(sources)),
        template=template.name,
        end_of_turn=template.stop_strings[0],
        stop_strings=template.stop_strings,
        max_length=None,
        splits={side: _split_report(examples) for side, examples in zip(SIDES, dataset, strict=True)},
        excluded_rows=0,
        excluded=(),
        duplicates=duplicates,
        parted=store.counts.parted,
        notes=tuple(notes),
    )
    train, held_out, test = dataset
    if not len(train):
        raise DataError("no row is left to train on", "give `split.train` more, or a file that is not held out")
    places = Places(store, [source.path for source in sources])
    return Dataset(train, held_out, test, report, template, places, sources, store, recipe)


def keep_rows(recipe: Recipe, tokenizer: ChatTokenizer, progress: Progress | None, waiting: Callable[[], None]) -> Kept:
    """The first half of `prepare`: the store of the recipe's rows, the rejected ones counted and kept aside.

    Raises:
        DataError: files cannot be used, or the template cannot.
        RecipeError: the template is not one.
    """
    sources = open_sources(recipe.data)
    plain = all(source.format == "text" for source in sources)
    name = "text" if plain and recipe.template == "model" else recipe.template
    template = make_template(name, tokenizer, recipe.train_on)
    return Kept(sources, template, _store(recipe, sources, template, progress, waiting))


def _store(
    recipe: Recipe,
    sources: Sequence[OpenSource],
    template: Template,
    progress: Progress | None,
    waiting: Callable[[], None],
) -> Store:
    key = _key(recipe, sources, template)
    folder = cache_folder("tokens") / key
    store = open_store(folder)

    def unchanged() -> None:
        if _key(recipe, sources, template) != key:
            raise DataError("a file of the data was changed while it was read", "run the same command again")

    if store is not None:
        mark_used(folder)
        return store
    remove_unused(folder.parent)
    with building(folder, waiting):
        store = open_store(folder)  # another process may have built it meanwhile
        if store is None:
            build_store(folder, sources, template, recipe.split_by, progress, unchanged)
            store = open_store(folder)
    if store is None:
        raise DataError(f"what was just written to {folder} is not there as it was written", "check the disk")
    return store


def _key(recipe: Recipe, sources: Sequence[OpenSource], template: Template) -> str:
    """What the tokens are made from, and nothing else: where a file lies does not change them."""
    made_from = [
        [STORE_VERSION, version("tokenizers"), version("rensa")],
        template.fingerprint,
        template.tokenizer.fingerprint,
        recipe.split_by,
        [
            [_digest(s), s.recognised, s.format, sorted(s.recipe.fields.items()), s.recipe.split == "train"]
            for s in sources
        ],
    ]
    return hashlib.sha256(orjson.dumps(made_from)).hexdigest()[:32]


def _digest(source: OpenSource) -> str:
    path = Path(source.path)
    return content_digest(path, source.digest) if path.is_file() else source.digest()


def rejected_rows(sources: Sequence[OpenSource], store: Store) -> Iterator[RowProblem]:
    """What is wrong with the rows that cannot be used, by their places in the files as they are named now."""
    for row in store.rejected():
        yield row.problem._replace(file=sources[row.source].path)


def _refuse_bad_rows(recipe: Recipe, kept: Kept) -> None:
    counts = kept.store.counts
    rejected, read = sum(counts.rejected), sum(counts.read)
    if rejected == 0 or (recipe.on_bad_row == "skip" and rejected < read):
        return
    first = list(islice(rejected_rows(kept.sources, kept.store), SHOWN_PROBLEMS))
    if rejected == read and read > 1 and len({problem.reason for problem in first}) == 1:
        message = f"none of the {read:,} rows can be used, the first of them because"
        raise DataError(f"{message}:\n  {first[0].as_problem()}", first[0].remedy)
    shown = f"; the first {SHOWN_PROBLEMS} are" if rejected > SHOWN_PROBLEMS else ""
    if rejected == read:
        message, remedy = f"none of the {read:,} rows can be used{shown}:", "correct the file, or say how to read it"
    else:
        message = f"{rejected:,} of {read:,} rows cannot be used{shown}:"
        remedy = "correct or remove these rows, or set `on_bad_row: skip` to train without them"
    raise DataError(message, remedy, [problem.as_problem() for problem in first])


def _sides(recipe: Recipe, sources: Sequence[OpenSource], store: Store) -> tuple[NDArray[np.int8], list[str]]:
    codes = [-1 if source.recipe.split == "all" else SIDES.index(source.recipe.split) for source in sources]
    given = np.array(codes, dtype=np.int8)[store.rows["source"]]
    if recipe.split_by is not None:
        key = store.rows["group_key"]
        _, group = np.unique(key, return_inverse=True)
        return split_rows(Placed(key, group.astype(np.int64), given), recipe.split)
    content = store.rows["content"]
    if recipe.split.near_duplicates == "together":
        return split_rows(Placed(content, store.group, given), recipe.split)
    _, group = np.unique(content, return_inverse=True)
    return split_rows(Placed(content, group.astype(np.int64), given), recipe.split)


def _dataset(
    recipe: Recipe, sources: Sequence[OpenSource], store: Store, template: Template, sides: NDArray[np.int8]
) -> tuple[Examples, Examples, Examples]:
    weight = np.array([source.recipe.weight for source in sources])[store.rows["source"]]
    bos = template.tokenizer.bos_id
    made: list[Examples] = []
    for number, side in enumerate(SIDES):
        row = np.flatnonzero(sides == number)
        stop = store.rows["length"][row].astype(np.int32)
        cuts = Cuts(row, np.zeros(len(row), dtype=np.int32), stop)
        train = side == "train"
        reading = Reading(recipe.prompt_loss_weight if train else 0.0, bos, fields=not train)
        made.append(Examples(store, cuts, weight[row] if train else np.ones(len(row)), reading))
    train_rows, held_out, test = made
    return train_rows, held_out, test


def _unused_answers(recipe: Recipe, sources: Sequence[OpenSource]) -> list[str]:
    """A text template that learns something else than what the rows' format calls the answer."""
    if "{" not in recipe.template:
        return []
    named = parse_text_template(recipe.template).fields
    found = {FORMATS[source.format].required[-1] for source in sources if len(FORMATS[source.format].required) == 2}
    return [
        f"the template does not use `{answer}`, which is the answer of these rows: what it teaches is {{{named[-1]}}}"
        for answer in sorted(found - set(named))
    ]


def _leaked(store: Store, sides: NDArray[np.int8]) -> int:
    """How many held-out rows say the same as a row that is trained on, or nearly."""
    trained = np.zeros(len(sides), dtype=np.bool_)
    trained[store.group[sides == 0]] = True  # a group is named by one of its rows
    return int(np.count_nonzero(trained[store.group[sides > 0]]))


def _notes(store: Store, sides: NDArray[np.int8], duplicates: Duplicates) -> list[str]:
    notes: list[str] = []
    counts = store.counts
    if rejected := sum(counts.rejected):
        rows_are = "1 row cannot be used and is" if rejected == 1 else f"{rejected:,} rows cannot be used and are"
        notes.append(f"{rows_are} skipped; each is in rejected.jsonl with its reason")
    if not (sides == SIDES.index("eval")).any():
        notes.append("no row is held out: the loss on unseen rows cannot be measured")
    if duplicates.leaked:
        notes.append(
            f"{duplicates.leaked:,} held-out rows say the same as a row that is trained on, or nearly: their loss "
            "looks better than it is"
        )
    if counts.forms:
        notes.append(
            f"{counts.forms:,} rows are one form with different words in it (near in wording to over {FORM} others): "
            "each is cut by its own content"
        )
    if counts.systems_lost:
        lost = f"{counts.systems_lost} rows have a system turn, which the template does not write"
        notes.append(f"{lost}: it names no {{system}}")
    if counts.parted:
        notes.append(
            f"in {counts.parted} rows a token would reach over the end of the prompt (a space before the answer, "
            "often); it is parted there, as it will be when the model is prompted"
        )
    return notes


def _source_report(opened: OpenSource, store: Store, number: int) -> SourceReport:
    return SourceReport(
        path=opened.path,
        rows=store.counts.read[number],
        rejected=store.counts.rejected[number],
        format=opened.format,
        recognised=opened.recognised,
        split=opened.recipe.split,
        weight=opened.recipe.weight,
    )


def _split_report(examples: Examples, truncated: int = 0, pieces: int = 0) -> SplitReport:
    lengths = examples.lengths if len(examples) else np.zeros(1, dtype=np.int32)
    ordered = np.sort(lengths)  # np.median would import numpy.ma, which takes longer than the rest of this
    return SplitReport(
        rows=len(examples),
        tokens=int(lengths.sum(dtype=np.int64)),
        labelled=int(examples.labelled.sum(dtype=np.int64)),
        shortest=int(ordered[0]),
        median=int(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2,
        longest=int(ordered[-1]),
        truncated=truncated,
        pieces=pieces,
    )


def limit_length(dataset: Dataset, max_length: int) -> Dataset:
    """The dataset with no row longer than `max_length` tokens, as its recipe's `long_rows` says; all is counted.

    Raises:
        DataError: `long_rows` is error and there are some; or no row to train on is left.
    """
    if dataset.report.max_length is not None:
        raise ValueError(f"the rows were already cut to {dataset.report.max_length} tokens")
    policy = dataset.recipe.long_rows
    limited = {side: limit_side(dataset.split(side), max_length, policy, side) for side in SIDES}
    refused = sorted(row for side in limited.values() for row in side.refused)
    if refused:
        raise _too_long(dataset, refused, max_length)
    if not len(limited["train"].examples):
        raise _nothing_left(dataset, max_length)
    left_out = sorted(row for side in limited.values() for row in side.left_out)
    notes = dataset.report.notes
    if len(dataset.eval) and not len(limited["eval"].examples):
        notes += (f"all held-out rows are longer than {max_length:,} tokens and left out: nothing can be measured",)
    report = replace(
        dataset.report,
        max_length=max_length,
        splits={side: _split_report(found.examples, found.truncated, found.pieces) for side, found in limited.items()},
        notes=notes,
        excluded_rows=len(left_out),
        excluded=tuple(Excluded(*dataset.places[row], why) for row, why in left_out[:SHOWN_EXCLUDED]),
    )
    sides: dict[Split, Examples] = {side: found.examples for side, found in limited.items()}
    return dataset.with_sides(sides, report)


def _too_long(dataset: Dataset, refused: Sequence[tuple[int, str]], max_length: int) -> DataError:
    problems = [RowProblem(*dataset.places[row], None, row, why, "").as_problem() for row, why in refused]
    rows = "row is" if len(refused) == 1 else "rows are"
    shown = f"; the first {SHOWN_PROBLEMS} are" if len(refused) > SHOWN_PROBLEMS else ""
    return DataError(
        f"{len(refused):,} {rows} longer than max_length {max_length:,}, and `long_rows` is error{shown}:",
        "raise train.max_length, or set long_rows: truncate, drop or split",
        problems[:SHOWN_PROBLEMS],
    )


def _nothing_left(dataset: Dataset, max_length: int) -> DataError:
    why = "all are longer" if dataset.recipe.long_rows == "drop" else "the prompts alone are longer"
    return DataError(
        f"no row is left to train on: {why} than max_length {max_length}",
        f"raise train.max_length; the longest row has {dataset.report.longest} tokens",
    )
