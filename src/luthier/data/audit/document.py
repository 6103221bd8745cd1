"""The audit as the JSON document of `luthier data check --json`. Names may be added, never changed."""

from __future__ import annotations

from luthier.data.audit.auditing import Audit
from luthier.data.audit.checks import Figures
from luthier.data.audit.findings import Finding, Sighting
from luthier.data.audit.lengths import Lengths
from luthier.data.audit.repeats import Same
from luthier.data.conversation import Source
from luthier.data.dataset import Dataset
from luthier.data.split import SIDES
from luthier.runs import SCHEMA_VERSION

__all__ = ["as_document"]

_EVIDENCE = 20
"""How many places a finding names; `problems` and `duplicates` name more."""


def as_document(made: Audit) -> dict[str, object]:
    """Everything the audit found, in plain values.

    `rows` counts all rows, `problems` names rows by place (worst first, each kind bounded), `findings` sums them up.
    Where no row can be used there are no figures, and only these and `sources` are in it.
    """
    counted: dict[str, object] = {
        "schema": SCHEMA_VERSION,
        "rows": made.rows,
        "rejected": made.rejected,
        "passed": not made.failed,
        "sources": [
            {"path": source.path, "format": source.format, "recognised": source.recognised} for source in made.sources
        ],
        "problems": [problem._asdict() for problem in made.problems],
        "findings": [_finding(finding) for finding in made.findings],
    }
    if made.dataset is not None and made.figures is not None:
        counted |= _prepared(made.dataset) | _figures(made.dataset, made.figures)
    return counted


def _place(source: Source) -> dict[str, object]:
    return {"file": source.file, "line": source.line}


def _sighting(one: Sighting) -> dict[str, object]:
    found = {**_place(one.source), "row": one.row, "text": one.text}
    return found if one.other is None else found | {"same_as": _place(one.other)}


def _finding(finding: Finding) -> dict[str, object]:
    return {
        "check": finding.check,
        "severity": finding.severity,
        "reason": finding.reason,
        "remedy": finding.remedy,
        "rows": finding.rows,
        "evidence": [_sighting(one) for one in finding.evidence[:_EVIDENCE]],
    }


def _prepared(dataset: Dataset) -> dict[str, object]:
    report = dataset.report.as_document()
    return {name: report[name] for name in ("sources", "template", "end_of_turn", "stop_strings", "splits", "notes")}


def _figures(dataset: Dataset, figures: Figures) -> dict[str, object]:
    repeats, speakers, openings = figures.repeats, figures.speakers, figures.openings

    def same(found: Same) -> dict[str, object]:
        pairs = [(dataset.places[row], dataset.places[other]) for row, other in found.first]
        return {"rows": found.rows, "first": [_place(one) | {"same_as": _place(other)} for one, other in pairs]}

    return {
        "duplicates": {
            "exact": same(repeats.exact),
            "near": same(repeats.near),
            "same_prompt": same(repeats.prompts),
        },
        "overlap": {
            "held_out": sum(len(dataset.split(side)) for side in SIDES[1:]),
            "exact": same(repeats.leaked_exact),
            "near": same(repeats.leaked_near),
            "same_prompt": same(repeats.leaked_prompts),
        },
        "lengths": _lengths(figures.lengths),
        "labelled_share": round(figures.lengths.labelled_share, 4),
        "truncation": [
            {
                "max_length": cut.max_length,
                "rows": cut.rows,
                "rows_without_answer": cut.emptied,
                "labelled_tokens_lost": cut.labelled_lost,
            }
            for cut in figures.lengths.cuts
        ],
        "openings": [{"opening": opening, "answers": count} for opening, count in openings.most_common()],
        "answers": {
            "all": openings.answers,
            "different": figures.different_answers,
            "most_frequent": [{**_place(dataset.places[one.row]), "rows": one.rows} for one in figures.repeated],
        },
        "speakers": {
            "turns": speakers.turns,
            "most_turns": speakers.longest,
            "rows_with_system": speakers.with_system,
            "rows_with_tool": speakers.with_tool,
            "rows_with_several_answers": speakers.several_answers,
            "rows_of_plain_text": speakers.plain,
            "answers_not_trained": speakers.untrained_answers,
        },
        "languages": {"sampled": sum(figures.languages.values()), "rows": figures.languages},
    }


def _lengths(lengths: Lengths) -> dict[str, object]:
    return {
        "tokens": lengths.tokens,
        "labelled_tokens": lengths.labelled,
        "shortest": lengths.quantiles[0],
        "median": lengths.quantiles[50],
        "longest": lengths.longest,
        "percentiles": {str(percent): value for percent, value in lengths.quantiles.items()},
        "histogram": [{"from": bar.start, "below": bar.stop, "rows": bar.rows} for bar in lengths.bars],
    }
