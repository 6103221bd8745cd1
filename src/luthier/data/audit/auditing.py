"""The audit: everything that is wrong with a recipe's data, or odd about it, in one go.

    prepare        -> the store: which rows cannot be used and why, lengths, hashes of what is said
    survey         -> one pass over the texts of the rows
    DATA_CHECKS    -> findings about the data as a whole

Nothing here stops at the first fault: the whole picture is the point. Only what cannot be looked at at all, such as a
missing file, is raised as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from luthier.data.audit.answers import repeated_answers
from luthier.data.audit.checks import DATA_CHECKS, Figures
from luthier.data.audit.findings import SEVERITIES, Finding, Sighting, rows_in_words, rows_that
from luthier.data.audit.languages import languages
from luthier.data.audit.lengths import measure_lengths
from luthier.data.audit.repeats import Keys, find_repeats
from luthier.data.audit.survey import Survey, survey
from luthier.data.audit.texts import TEXT_CHECKS
from luthier.data.conversation import Source
from luthier.data.dataset import Dataset
from luthier.data.prepare import Progress, keep_rows, rejected_rows, settle
from luthier.data.problems import BadRow, RowProblem
from luthier.data.sources import OpenSource, open_sources
from luthier.data.split import SIDES
from luthier.data.tokenizer import ChatTokenizer
from luthier.errors import DataError
from luthier.recipe.schema import Recipe

__all__ = ["KEPT_PROBLEMS", "Audit", "Told", "audit"]

KEPT_PROBLEMS = 10_000
"""How many rows that cannot be used are named; their count is always whole."""


def _silent(_done: int, _total: int) -> None:
    """Nobody watches."""


def _nothing() -> None:
    """Nobody is to be told that another process prepares the same data."""


@dataclass(frozen=True, slots=True)
class Told:
    """Who is told how far it is: while rows are tokenised, while their texts are read, while another is waited for."""

    preparing: Progress = _silent
    reading: Progress = _silent
    waiting: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        rows: all rows of all files.
        rejected: how many of them cannot be used.
        problems: rows with something wrong, each with its place: those that cannot be used, then odd texts; of each
            kind the first.
        findings: worst first.
        sources: the files.
        dataset, figures: None where the data could not be prepared; a finding says why.
    """

    rows: int
    rejected: int
    problems: tuple[RowProblem, ...]
    findings: tuple[Finding, ...]
    sources: tuple[OpenSource, ...]
    dataset: Dataset | None
    figures: Figures | None

    @property
    def failed(self) -> bool:
        """Whether training would stop at this data."""
        return any(finding.severity == "error" for finding in self.findings)


def audit(recipe: Recipe, tokenizer: ChatTokenizer, told: Told | None = None, positions: int | None = None) -> Audit:
    """Look at all of a recipe's data. `positions`: how many tokens the model can hold, None where that is not known.

    Raises:
        DataError: files are missing, empty or of no known format.
        RecipeError: the template is not one.
    """
    told = told or Told()
    skipping = recipe.model_copy(update={"on_bad_row": "skip"})
    try:
        kept = keep_rows(skipping, tokenizer, told.preparing, told.waiting)
        rows, count = sum(kept.store.counts.read), sum(kept.store.counts.rejected)
        bad = list(islice(rejected_rows(kept.sources, kept.store), KEPT_PROBLEMS))
        if count == rows:
            return _unusable_all(recipe, bad, kept.sources, rows)
        dataset = settle(skipping, kept)
    except DataError as error:
        return _unprepared(recipe, open_sources(recipe.data), error)  # which raises what no file can be read for
    seen = survey(dataset, told.reading)
    asked = recipe.train.max_length
    figures = _figures(dataset, seen, positions if asked == "auto" else asked)
    findings = [
        *_unusable(recipe, bad, count, rows),
        *_odd_texts(seen),
        *(finding for check in DATA_CHECKS for finding in check(dataset, figures)),
    ]
    problems = (*_as_severe(recipe, bad), *_odd_rows(seen))
    return Audit(rows, count, problems, _sorted(findings), dataset.sources, dataset, figures)


def _figures(dataset: Dataset, seen: Survey, limit: int | None) -> Figures:
    store = dataset.store
    side = np.full(len(store.rows), -1, dtype=np.int8)
    for number, name in enumerate(SIDES):
        side[dataset.split(name).rows] = number
    different, repeated = repeated_answers(seen.answer_hashes)
    return Figures(
        repeats=find_repeats(Keys(store.rows["content"], np.asarray(store.group), seen.prompt_hashes, side)),
        lengths=measure_lengths(store, limit),
        openings=seen.openings,
        speakers=seen.speakers,
        different_answers=different,
        repeated=repeated,
        languages=languages(seen.sample),
    )


def _unusable_all(recipe: Recipe, bad: Sequence[RowProblem], sources: Sequence[OpenSource], rows: int) -> Audit:
    """What can be said where no row can be used: to skip every one is to stop."""
    stopping = recipe.model_copy(update={"on_bad_row": "stop"})
    return Audit(rows, rows, tuple(bad), tuple(_unusable(stopping, bad, rows, rows)), tuple(sources), None, None)


def _unprepared(recipe: Recipe, sources: Sequence[OpenSource], error: DataError) -> Audit:
    """What can be said where the data cannot be prepared: why, and which rows no reader can read."""
    rows, count, bad = 0, 0, list[RowProblem]()
    for source in sources:
        for found in source.rows():
            rows += 1
            if isinstance(found, BadRow):
                count += 1
                bad += [found.problem] if count <= KEPT_PROBLEMS else []
    findings = [Finding("preparation", "error", error.message, error.remedy or "")]
    findings += _unusable(recipe, bad, count, rows)
    return Audit(rows, count, _as_severe(recipe, bad), _sorted(findings), tuple(sources), None, None)


def _as_severe(recipe: Recipe, bad: Sequence[RowProblem]) -> tuple[RowProblem, ...]:
    return tuple(bad) if recipe.on_bad_row == "stop" else tuple(one._replace(severity="warning") for one in bad)


def _unusable(recipe: Recipe, bad: Sequence[RowProblem], count: int, rows: int) -> list[Finding]:
    if not count:
        return []
    evidence = tuple(Sighting(Source(one.file, one.line), one.row, one.reason) for one in bad)
    reason = f"{count:,} of {rows_in_words(rows)} cannot be used"
    if recipe.on_bad_row == "skip":
        remedy = "they are left out, as `on_bad_row: skip` says; rejected.jsonl in the run's data folder names each"
        return [Finding("bad-rows", "warning", reason, remedy, count, evidence)]
    if count == rows:
        remedy = "correct the file, or say how to read it (`format`, `fields`, `template`)"
    else:
        remedy = "correct or remove these rows, or set `on_bad_row: skip` to train without them"
    return [Finding("bad-rows", "error", reason, remedy, count, evidence)]


def _odd_texts(seen: Survey) -> list[Finding]:
    return [
        Finding(
            check.name,
            check.severity,
            rows_that(tally.rows, check.reason),
            check.remedy,
            tally.rows,
            tuple(tally.first),
        )
        for check in TEXT_CHECKS
        if (tally := seen.tallies[check.name]).rows
    ]


def _odd_rows(seen: Survey) -> list[RowProblem]:
    return [
        RowProblem(
            *one.source, None, one.row, f"{rows_that(1, check.reason)}: {one.text}", check.remedy, check.severity
        )
        for check in TEXT_CHECKS
        for one in seen.tallies[check.name].first
    ]


def _sorted(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))
