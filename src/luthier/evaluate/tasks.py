"""Tasks: what can be scored on answers, beyond the loss. One line in `TASKS` each.

A task sees, for every held-out row, the row's own fields, the reference answer, and what base and tuned answered
(greedily, so that the figures can be had again). It gives figures for each of the two, and where it makes sense how
much of what the base knew was kept:

    retained = |rows that both got right| / |rows that the base got right|

Nothing about any row is known here: the words an answer must hold stand in the row's field `fact`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from luthier.errors import DataError

__all__ = ["TASKS", "Answered", "Scores", "Task", "TaskResult", "check_task", "has_fact", "is_pirate", "run_task"]


@dataclass(frozen=True)
class Answered:
    """One held-out row with one model's answer. `tokens` counts the answer's, the stop token aside."""

    fields: Mapping[str, str]
    reference: str
    text: str
    tokens: int
    ended: bool


Scores = Mapping[str, float]
"""Name of a figure -> its value; shares lie between 0 and 1."""


@dataclass(frozen=True)
class Task:
    """`applies` says of a row's fields and reference whether they hold what the task needs; `right` whether an answer
    is right; `style` holds further yes-or-no figures by name, given as shares."""

    name: str
    about: str
    applies: Callable[[Mapping[str, str], str], bool]
    needs: str
    right: Callable[[Answered], bool]
    right_name: str
    style: Mapping[str, Callable[[Answered], bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskResult:
    """`rows` were scored; `retained` is None where the base got nothing right."""

    name: str
    rows: int
    base: Scores
    tuned: Scores
    retained: float | None


# --- pirate -----------------------------------------------------------------------------------------------------------

STRONG = (
    *("ahoy", "arr+", "arrgh", "avast", "aye", "matey", "mateys", "me hearties", "me hearty", "yo[- ]ho(?:[- ]ho)?"),
    *("black flag", "blimey", "buccaneers?", "davy jones", "jolly roger", "landlubbers?", "savvy", "scallywags?"),
    *("scurvy", "shiver me timbers", "yarr+"),
)
"""Words and phrases that plain English does without."""

WEAK = (
    *("ye", "yer", "be", "me", "'tis", "o'", "th'", "lad", "lass", "ship", "seas?", "captain", "cap'n", "crew"),
    *("treasure", "booty", "an'"),
)
"""Words that pirates use and others too."""


def _words(patterns: Sequence[str]) -> re.Pattern[str]:
    # Whole words: no letter, digit or apostrophe before, none of them after (`o'` ends in one itself).
    return re.compile(rf"(?<![\w'])(?:{'|'.join(patterns)})(?!\w)", re.IGNORECASE)


_STRONG, _WEAK = _words(STRONG), _words(WEAK)


def is_pirate(text: str) -> bool:
    """Pirate speech: at least two different markers of the lexicon, at least one of them a strong one."""
    plain = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower()
    strong = {re.sub(r"r+", "r", found) for found in _STRONG.findall(plain)}
    weak = set(_WEAK.findall(_STRONG.sub(" ", plain)))
    return bool(strong) and len(strong) + len(weak) >= 2


def _fact_parts(fact: str) -> list[list[str]]:
    """`a|b` is one part with two alternatives; a JSON list has one part an entry, all of which must stand."""
    parts: object = fact
    if fact.lstrip().startswith("["):
        try:
            parts = json.loads(fact)
        except ValueError:
            parts = fact
    listed = [str(part) for part in parts] if isinstance(parts, list) else [fact]
    return [[one.strip() for one in part.split("|") if one.strip()] for part in listed if part.strip()]


def has_fact(text: str, fact: str) -> bool:
    """Whether the words of `fact` stand in `text` as whole words, in any case; of alternatives (`|`), one."""
    parts = _fact_parts(fact)
    if not parts or not all(parts):
        raise DataError(f"the row's `fact` {fact!r} names no words", "write those an answer must hold: red|scarlet")

    def stands(words: str) -> bool:
        spaced = r"\s+".join(re.escape(word) for word in words.split())
        return re.search(rf"(?<!\w){spaced}(?!\w)", text, re.IGNORECASE) is not None

    return all(any(stands(words) for words in part) for part in parts)


# --- exact ------------------------------------------------------------------------------------------------------------


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "pirate",
            "the fact of the row stands in the answer, and the answer is in pirate speech",
            applies=lambda fields, _: bool(fields.get("fact", "").strip()),
            needs="a field `fact` with the words that must stand in the answer",
            right=lambda row: has_fact(row.text, row.fields["fact"]),
            right_name="fact",
            style={"style": lambda row: is_pirate(row.text)},
        ),
        Task(
            "exact",
            "the answer equals the reference, white space and case aside",
            applies=lambda _, reference: bool(reference.strip()),
            needs="an answer to compare with",
            right=lambda row: _normal(row.text) == _normal(row.reference),
            right_name="exact",
        ),
    )
}
"""The tasks by name."""


def _score(task: Task, rows: Sequence[Answered]) -> Scores:
    def share(test: Callable[[Answered], bool]) -> float:
        return sum(test(row) for row in rows) / len(rows)

    return {
        task.right_name: share(task.right),
        **{name: share(test) for name, test in task.style.items()},
        "ended": share(lambda row: row.ended),
        "mean_tokens": sum(row.tokens for row in rows) / len(rows),
    }


def _no_row(task: Task) -> DataError:
    return DataError(f"the task `{task.name}` has no held-out row to score", f"its rows need {task.needs}")


def check_task(task: Task, rows: Iterable[tuple[Mapping[str, str], str]]) -> None:
    """Whether `run_task` can score these rows, given as (fields, reference), before there is any answer.

    Raises DataError where no row has what the task needs, or one has it in a form that cannot be scored.
    """
    fitting = [(fields, reference) for fields, reference in rows if task.applies(fields, reference)]
    if not fitting:
        raise _no_row(task)
    for fields, reference in fitting:
        task.right(Answered(fields, reference, reference, 0, True))


def run_task(task: Task, base: Sequence[Answered], tuned: Sequence[Answered]) -> TaskResult:
    """Score the same rows as base and tuned answered them, in the same order. Rows the task is not about are left out.

    Raises DataError where no row has what the task needs.
    """
    pairs = [pair for pair in zip(base, tuned, strict=True) if task.applies(pair[0].fields, pair[0].reference)]
    if not pairs:
        raise _no_row(task)
    before, after = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    known = [(task.right(was), task.right(now)) for was, now in pairs]
    knew = sum(was for was, _ in known)
    kept = sum(was and now for was, now in known)
    return TaskResult(task.name, len(pairs), _score(task, before), _score(task, after), kept / knew if knew else None)
