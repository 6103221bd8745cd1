"""What can be wrong with the data as a whole: a table of checks, each a small function of the figures.

To add one: write a function that yields findings, add it to `DATA_CHECKS` and a test in which it finds something and
one in which it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from luthier.data.audit.answers import Openings, Repeated, Speakers
from luthier.data.audit.findings import KEPT_PLACES, Finding, Sighting, rows_in_words, rows_that, share_in_words
from luthier.data.audit.lengths import Lengths
from luthier.data.audit.repeats import Repeats, Same
from luthier.data.dataset import Dataset
from luthier.data.problems import Severity

__all__ = ["DATA_CHECKS", "Figures"]


@dataclass(frozen=True)
class Figures:
    """All that was measured. `different_answers` counts the different last answers, `repeated` the most frequent."""

    repeats: Repeats
    lengths: Lengths
    openings: Openings
    speakers: Speakers
    different_answers: int
    repeated: tuple[Repeated, ...]
    languages: dict[str, int]


_MANY = 0.01
"""From this share of the rows on, a repetition is a warning."""
_FAR = 20
"""A row with so many times more, or fewer, trained tokens than the median is far from the others."""


def _grade(rows: int, whole: int) -> Severity:
    return "warning" if rows >= _MANY * whole else "note"


def _share(rows: int, whole: int, what: str) -> str:
    return rows_that(rows, what, f" ({share_in_words(rows, whole)})")


def _pairs(dataset: Dataset, same: Same) -> tuple[Sighting, ...]:
    return tuple(Sighting(dataset.places[row], None, "", dataset.places[other]) for row, other in same.first)


def _leaks(dataset: Dataset, figures: Figures) -> Iterator[Finding]:
    repeats = figures.repeats
    if repeats.leaked:
        held = len(dataset.eval) + len(dataset.test)
        exact, near = repeats.leaked_exact, repeats.leaked_near
        yield Finding(
            "leaks",
            "warning",
            f"{repeats.leaked:,} of {rows_in_words(held)} held out say the same as a row that is trained on "
            f"({exact.rows:,} word for word, {near.rows:,} nearly): the model will look better than it is",
            "remove them from one of the sides, or let Luthier cut the split: it keeps such rows together",
            repeats.leaked,
            (*_pairs(dataset, exact), *_pairs(dataset, near))[:KEPT_PLACES],
        )
    same = repeats.leaked_prompts
    if same.rows:
        yield Finding(
            "leaked-prompts",
            "note",
            rows_that(same.rows, "ask what a row that is trained on asks, with another answer", " held out"),
            "fine if every question has several answers; else keep them on one side (`split_by`)",
            same.rows,
            _pairs(dataset, same),
        )


def _duplicates(dataset: Dataset, figures: Figures) -> Iterator[Finding]:
    whole, exact, near = figures.lengths.rows, figures.repeats.exact, figures.repeats.near
    if exact.rows:
        yield Finding(
            "exact-duplicates",
            _grade(exact.rows, whole),
            _share(
                exact.rows, whole, "repeat an earlier one word for word: a copy that is trained on counts once more"
            ),
            "remove them, unless they shall count more",
            exact.rows,
            _pairs(dataset, exact),
        )
    if near.rows:
        yield Finding(
            "near-duplicates",
            "note",
            _share(near.rows, whole, "say nearly the same as an earlier one"),
            "look at some: thin them out if the data shall be varied; they stay on one side of the split",
            near.rows,
            _pairs(dataset, near),
        )


def _contradictions(dataset: Dataset, figures: Figures) -> Iterator[Finding]:
    same, whole = figures.repeats.prompts, figures.lengths.rows
    if same.rows:
        yield Finding(
            "same-prompt",
            _grade(same.rows, whole),
            _share(same.rows, whole, "ask what an earlier one asks, with another answer"),
            "keep the better answer, unless several are meant",
            same.rows,
            _pairs(dataset, same),
        )


def _too_long(dataset: Dataset, figures: Figures) -> Iterator[Finding]:
    recipe = dataset.recipe
    cut = next((cut for cut in figures.lengths.cuts if cut.max_length == figures.lengths.limit), None)
    if cut is None or not cut.rows:
        return
    asked = recipe.train.max_length != "auto"
    limit = f"train.max_length {cut.max_length:,}" if asked else f"the {cut.max_length:,} tokens that the model holds"
    long = f"{rows_in_words(cut.rows)} {'is' if cut.rows == 1 else 'are'} longer than {limit}"
    lost = share_in_words(cut.labelled_lost, figures.lengths.labelled)
    told: dict[str, tuple[Severity, str]] = {
        "error": ("error", "and `long_rows` is error"),
        "drop": ("warning", "and will be left out"),
        "split": ("note", "and will be cut into several"),
        "truncate": ("warning", f"and will be cut at the end: {lost} of all trained tokens are lost, and their ends"),
    }
    severity, what = told[recipe.long_rows]
    raised = f"raise train.max_length (the longest row has {figures.lengths.longest:,} tokens), or " if asked else ""
    remedy = f"{raised}set `long_rows: split` to learn all of them in parts"
    length = dataset.store.rows["length"]
    rows = np.flatnonzero(length > cut.max_length)[:KEPT_PLACES]
    evidence = tuple(Sighting(dataset.places[row], None, f"{length[row]:,} tokens") for row in rows.tolist())
    yield Finding("long-rows", severity, f"{long} {what}", remedy, cut.rows, evidence)


def _far_from_median(dataset: Dataset, figures: Figures) -> Iterator[Finding]:
    labelled, median = dataset.store.rows["labelled"], figures.lengths.labelled_median
    kinds = (
        ("long-answers", "more", labelled > _FAR * median, "see whether they are one answer, or several run together"),
        ("short-answers", "fewer", labelled * _FAR < median, "see whether they are whole"),
    )
    for name, word, far, remedy in kinds:
        rows = np.flatnonzero(far)
        if len(rows):
            shown = rows[:KEPT_PLACES].tolist()
            yield Finding(
                name,
                "note",
                rows_that(
                    len(rows), f"have over {_FAR} times {word} trained tokens than the median, which is {median:,}"
                ),
                remedy,
                len(rows),
                tuple(Sighting(dataset.places[row], None, f"{labelled[row]:,} trained tokens") for row in shown),
            )


_LITTLE = 0.05
_ALWAYS = 0.25
_ENOUGH = 50


def _little_trained(_: Dataset, figures: Figures) -> Iterator[Finding]:
    share = figures.lengths.labelled_share
    if share < _LITTLE:
        yield Finding(
            "little-trained",
            "note",
            f"only {share:.1%} of all tokens are trained: nearly all of the computing goes into reading prompts",
            "fine if prompts must be long; shorter ones, or `prompt_loss_weight: 0.1`, make more of each step",
        )


def _one_answer(dataset: Dataset, figures: Figures) -> Iterator[Finding]:
    rows = figures.lengths.rows
    if rows < _ENOUGH or not figures.repeated or figures.repeated[0].rows < _ALWAYS * rows:
        return
    top = figures.repeated[0]
    yield Finding(
        "one-answer",
        "note",
        f"{rows_in_words(top.rows)} ({share_in_words(top.rows, rows)}) have one and the same answer; there are "
        f"{figures.different_answers:,} different ones",
        "fine for labels of a few kinds; check that each kind has rows enough",
        top.rows,
        (Sighting(dataset.places[top.row], None, "the first of them"),),
    )


def _one_opening(_: Dataset, figures: Figures) -> Iterator[Finding]:
    common = figures.openings.most_common()
    whole = figures.openings.answers
    if whole >= _ENOUGH and common and common[0][1] >= _ALWAYS * whole and figures.different_answers > whole // 2:
        opening, count = common[0]
        yield Finding(
            "one-opening",
            "note",
            f"{share_in_words(count, whole)} of the answers begin with “{opening}”: the model will begin so too",
            "fine if that is the style to be learned",
        )


def _some_systems(_: Dataset, figures: Figures) -> Iterator[Finding]:
    speakers = figures.speakers
    if 0.02 * speakers.rows < speakers.with_system < 0.98 * speakers.rows:
        yield Finding(
            "some-systems",
            "note",
            f"{share_in_words(speakers.with_system, speakers.rows)} of the rows have a system turn, the others none",
            "fine if the model shall work with and without; later, prompt it as it was trained",
        )


_TOLD = ("rejected.jsonl", "held-out rows say the same")
"""What stands in those of the report's notes that the audit tells with more words."""


def _notes(dataset: Dataset, _: Figures) -> Iterator[Finding]:
    for note in dataset.report.notes:
        if not any(words in note for words in _TOLD):
            yield Finding("preparation", "note", note, "")


DATA_CHECKS: tuple[Callable[[Dataset, Figures], Iterator[Finding]], ...] = (
    _leaks,
    _duplicates,
    _contradictions,
    _too_long,
    _far_from_median,
    _little_trained,
    _one_answer,
    _one_opening,
    _some_systems,
    _notes,
)
"""Every check of the data as a whole."""
