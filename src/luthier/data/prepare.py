"""A recipe's data, ready to train on: read, split, written by the template, tokenised with labels, cut to length.

Nothing is dropped or cut in silence: what was excluded, truncated or moved is in the `DataReport` with its reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from luthier.data.conversation import Conversation, Example, Source
from luthier.data.labels import Encoded
from luthier.data.render import Template, make_template
from luthier.data.report import DataReport, Excluded, SourceReport, SplitReport
from luthier.data.sources import SourceRows, read_sources
from luthier.data.split import Split, split_rows
from luthier.data.tokenizer import ChatTokenizer
from luthier.errors import DataError
from luthier.recipe.schema import Recipe

__all__ = ["Dataset", "Progress", "limit_length", "prepare"]

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all, now and then."""

_CHUNK = 512
"""Rows that are tokenised together: enough to keep the tokenizer's threads busy, few enough to show progress."""

_SPLITS: tuple[Split, ...] = ("train", "eval", "test")
_NO_LABEL = "its prompt alone fills max_length, so nothing of the answer is left"


@dataclass(frozen=True)
class Dataset:
    """Tokenised rows by side, what was done to get them, and the template they were written with.

    `places[row]` is where the example with that `row` stands in the user's files.
    """

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    test: tuple[Example, ...]
    report: DataReport
    template: Template
    places: tuple[Source, ...]

    def split(self, name: Split) -> tuple[Example, ...]:
        """The examples of one side."""
        return {"train": self.train, "eval": self.eval, "test": self.test}[name]


def prepare(
    recipe: Recipe, tokenizer: ChatTokenizer, max_length: int | None = None, progress: Progress | None = None
) -> Dataset:
    """Read and tokenise the recipe's data.

    Args:
        recipe: `data`, `template` and `split` are read.
        tokenizer: the model's.
        max_length: longest row in tokens, what is longer is cut at its end; None for no limit. To learn the lengths
            before choosing, prepare without and call `limit_length`.
        progress: called while tokenising.

    Raises:
        DataError: files or rows cannot be used (all of them at once), or no row is left to train on.
        RecipeError: the template is not one.
    """
    sources = read_sources(recipe.data)
    conversations = [conversation for rows in sources for conversation in rows.conversations]
    sides, notes = split_rows(sources, recipe.split)
    name = recipe.template
    if name == "model" and all(conversation.plain for conversation in conversations):
        name = "text"
        notes.append("all rows are plain text: they are learned as they are, without a chat template")
    if "eval" not in sides:
        notes.append("no row is held out: the loss on unseen rows cannot be measured")
    template = make_template(name, tokenizer)
    examples: dict[Split, list[Example]] = {side: [] for side in _SPLITS}
    parted = 0
    for start in range(0, len(conversations), _CHUNK):
        chunk = conversations[start : start + _CHUNK]
        for row, (conversation, found) in enumerate(zip(chunk, template.encode_many(chunk), strict=True), start):
            examples[sides[row]].append(_example(conversation, found, row, sides[row]))
            parted += found.parted
        if progress is not None:
            progress(min(start + _CHUNK, len(conversations)), len(conversations))
    unwritten = sum(_loses_system_turn(conversation, template) for conversation in conversations)
    if unwritten:
        notes.append(f"{unwritten} rows have a system turn, which the template does not write: it names no {{system}}")
    if parted:
        notes.append(
            f"in {parted} rows a token would reach over the end of the prompt (a space before the answer, often); "
            "it is parted there, as it will be when the model is prompted"
        )
    report = DataReport(
        sources=tuple(_source_report(rows) for rows in sources),
        template=name,
        end_of_turn=template.stop_strings[0],
        stop_strings=template.stop_strings,
        max_length=None,
        splits={side: _split_report(examples[side], 0) for side in _SPLITS},
        excluded=(),
        parted=parted,
        notes=tuple(notes),
    )
    places = tuple(conversation.source for conversation in conversations)
    train, held_out, test = (tuple(examples[side]) for side in _SPLITS)
    dataset = Dataset(train, held_out, test, report, template, places)
    if not train:
        raise DataError("no row is left to train on", "give `split.train` more, or a file that is not held out")
    return dataset if max_length is None else limit_length(dataset, max_length)


def limit_length(dataset: Dataset, max_length: int) -> Dataset:
    """The dataset with every row at most `max_length` tokens long: longer ones are cut at their end and counted.

    A row of whose answers nothing is left is excluded, with its reason in the report.

    Raises:
        DataError: no row to train on is left.
    """
    if dataset.report.max_length is not None:
        raise ValueError(f"the rows were already cut to {dataset.report.max_length} tokens")
    kept: dict[Split, list[Example]] = {}
    reports: dict[str, SplitReport] = {}
    excluded: list[Excluded] = list(dataset.report.excluded)
    for side in _SPLITS:
        cut = [_cut(example, max_length) for example in dataset.split(side)]
        kept[side] = [example for example in cut if example.labelled]
        places = [dataset.places[example.row] for example in cut if not example.labelled]
        excluded += [Excluded(place.file, place.line, _NO_LABEL) for place in places]
        used = {example.row for example in kept[side]}
        over = [example.row for example in dataset.split(side) if len(example) > max_length and example.row in used]
        reports[side] = _split_report(kept[side], len(over))
    if not kept["train"]:
        raise DataError(
            f"no row is left to train on: the prompts alone are longer than max_length {max_length}",
            f"raise train.max_length; the longest row has {dataset.report.longest} tokens",
        )
    train, held_out, test = (tuple(kept[side]) for side in _SPLITS)
    report = replace(dataset.report, max_length=max_length, splits=reports, excluded=tuple(excluded))
    return replace(dataset, train=train, eval=held_out, test=test, report=report)


def _loses_system_turn(conversation: Conversation, template: Template) -> bool:
    if conversation.turns[0].role != "system" or template.turns(conversation)[0].role == "system":
        return False
    return "{system}" not in template.name


def _example(conversation: Conversation, found: Encoded, row: int, side: Split) -> Example:
    fields: Mapping[str, str] = {} if side == "train" else conversation.fields
    return Example(found.ids, found.labels, row, fields)


def _cut(example: Example, max_length: int) -> Example:
    if len(example) <= max_length:
        return example
    # Copies, so that the long arrays can be freed.
    return replace(example, ids=example.ids[:max_length].copy(), labels=example.labels[:max_length].copy())


def _source_report(rows: SourceRows) -> SourceReport:
    source = rows.source
    return SourceReport(source.path, len(rows.conversations), rows.format, rows.recognised, source.split)


def _split_report(examples: Sequence[Example], truncated: int) -> SplitReport:
    lengths = [len(example) for example in examples] or [0]
    return SplitReport(
        rows=len(examples),
        tokens=sum(lengths),
        labelled=sum(example.labelled for example in examples),
        shortest=min(lengths),
        median=int(statistics.median(lengths)),
        longest=max(lengths),
        truncated=truncated,
    )
