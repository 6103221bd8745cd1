"""The audit as a whole: what is planted is found, all of it, at its place, and nothing else is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.audit import Audit, as_document, audit
from luthier.data.audit.findings import KEPT_PLACES, SEVERITIES
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import DataError
from luthier.model.locate import locate_model
from luthier.recipe.load import recipe_from_mapping

WORDS = [
    first + last for first in ("ba", "ko", "mi", "tu", "re", "sal", "dor") for last in ("lan", "mer", "pin", "tos")
]


@cache
def sprig() -> ChatTokenizer:
    return load_tokenizer(locate_model("sprig"))


def sentence(seed: str) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=14)) + "."


def row(number: int, question: str | None = None, answer: str | None = None) -> str:
    """A row that no check finds anything in, unlike any other; a part of it may be given."""
    sound = {"question": f"{sentence(f'q{number}')}?", "answer": f"{sentence(f'a{number}')} {number}"}
    given_parts = {"question": question, "answer": answer}
    return json.dumps(sound | {key: text for key, text in given_parts.items() if text is not None})


def check(folder: Path, lines: list[str], **settings: object) -> Audit:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return check_files({"data": str(path), **settings})


def check_files(values: dict[str, object]) -> Audit:
    return audit(recipe_from_mapping({"model": "sprig", **values}), sprig())


def said(made: Audit) -> set[str]:
    return {finding.check for finding in made.findings}


BAD: list[Callable[[int], str]] = [
    lambda _: '{"question": "half a line',
    lambda _: '{"question": "no brace", "answer": "at the end"',
    lambda _: "[1, 2]",
    lambda _: "not JSON",
    lambda n: json.dumps({"question": sentence(f"q{n}")}),
    lambda n: json.dumps({"question": sentence(f"q{n}"), "answer": None}),
    lambda n: json.dumps({"question": sentence(f"q{n}"), "answer": 7}),
    lambda n: row(n, answer="  "),
]
ODD: dict[str, Callable[[int], str]] = {
    "secrets": lambda n: row(n, answer=f"{sentence(f'a{n}')} AKIAABCDEFGHIJKLMNOP"),
    "mojibake": lambda n: row(n, question=f"{sentence(f'q{n}')} donâ€™t"),
    "replacement-characters": lambda n: row(n, answer=f"{sentence(f'a{n}')} \ufffd"),
    "control-characters": lambda n: row(n, answer=f"\x00{sentence(f'a{n}')}"),
    "template-tokens": lambda n: row(n, question=f"{sentence(f'q{n}')} <|eot_id|>"),
    "hollow-answers": lambda n: row(n, answer="N/A"),
    "echoes": lambda n: row(n, question=sentence(f"q{n}"), answer=sentence(f"q{n}")),
    "boilerplate": lambda n: row(n, answer=f"As an AI language model, {sentence(f'a{n}')}"),
    "invisible-characters": lambda n: row(n, answer=f"{sentence(f'a{n}')}\u200b"),
    "markup": lambda n: row(n, answer=f"{sentence(f'a{n}')}<br/>"),
}
PLANTED = st.lists(
    st.one_of(
        st.just("sound"),
        st.sampled_from([f"bad {i}" for i in range(len(BAD))]),
        st.sampled_from(sorted(ODD)),
        st.sampled_from(["copy", "other answer", "blank"]),
    ),
    max_size=25,
)


class Plan:
    """A file with faults at known lines."""

    def __init__(self, kinds: list[str]) -> None:
        self.lines = [row(0)]
        self.bad: list[int] = []
        self.odd: dict[str, list[int]] = {}
        self.copies: list[int] = []
        self.other_answers: list[int] = []
        for kind in kinds:
            number = len(self.lines)
            place = number + 1
            if kind == "blank":
                self.lines.append("  ")
            elif kind.startswith("bad "):
                self.lines.append(BAD[int(kind[4:])](number))
                self.bad.append(place)
            elif kind in ODD:
                self.lines.append(ODD[kind](number))
                self.odd.setdefault(kind, []).append(place)
            elif kind == "copy":
                self.lines.append(self.lines[0])
                self.copies.append(place)
            elif kind == "other answer":
                self.lines.append(row(number, question=json.loads(self.lines[0])["question"]))
                self.other_answers.append(place)
            else:
                self.lines.append(row(number))

    @property
    def rows(self) -> int:
        return sum(bool(line.strip()) for line in self.lines)


TIERS = pytest.mark.parametrize("cases", [60, pytest.param(1000, marks=pytest.mark.slow)])


@TIERS
def test_finds_what_is_planted_and_nothing_else(tmp_path: Path, cases: int) -> None:
    @settings(max_examples=cases, deadline=None)
    @given(PLANTED)
    def finds(kinds: list[str]) -> None:
        plan = Plan(kinds)
        made = check(tmp_path, plan.lines)
        path = str(tmp_path / "rows.jsonl")
        assert (made.rows, made.rejected) == (plan.rows, len(plan.bad))
        assert made.failed == bool(plan.bad)
        bad = [problem for problem in made.problems if problem.severity == "error"]
        assert [(problem.file, problem.line) for problem in bad] == [(path, line) for line in plan.bad]
        assert all(problem.reason and problem.remedy for problem in made.problems)
        for name in ODD:
            found = [one for finding in made.findings if finding.check == name for one in finding.evidence]
            assert [tuple(one.source) for one in found] == [(path, line) for line in plan.odd.get(name, [])], name
            ordinals = [sum(bool(line.strip()) for line in plan.lines[: one.source.line - 1]) for one in found]
            assert [one.row for one in found] == ordinals
        odd = [problem.line for problem in made.problems if problem.severity != "error"]
        assert sorted(odd) == sorted(line for lines in plan.odd.values() for line in lines)
        assert made.figures is not None
        assert made.dataset is not None
        places = [place.line for place in made.dataset.places]
        repeats = made.figures.repeats
        assert [places[one] for one, _ in repeats.exact.first] == plan.copies
        assert [places[one] for one, _ in repeats.prompts.first] == plan.other_answers
        assert all(places[other] == 1 for _, other in (*repeats.exact.first, *repeats.prompts.first))
        known = {*ODD, "bad-rows", "exact-duplicates", "same-prompt"}
        quiet = {"preparation", "near-duplicates", "leaked-prompts", "one-answer", "short-answers"}
        assert said(made) <= known | quiet

    finds()


def test_sound_rows_have_nothing_against_them(tmp_path: Path) -> None:
    made = check(tmp_path, [row(i) for i in range(200)])
    assert made.findings == ()
    assert made.problems == ()
    assert not made.failed


def test_worst_first(tmp_path: Path) -> None:
    made = check(tmp_path, [row(0), row(1, answer="a<br/>b"), row(2, answer="caf\ufffd"), "nonsense"])
    ranks = [SEVERITIES.index(finding.severity) for finding in made.findings]
    assert ranks == sorted(ranks)
    assert made.findings[0].check == "bad-rows"


def test_rows_that_are_skipped_are_warnings(tmp_path: Path) -> None:
    lines = [*[row(i) for i in range(5)], "nonsense"]
    made = check(tmp_path, lines, on_bad_row="skip")
    assert not made.failed
    assert [(one.line, one.severity) for one in made.problems] == [(6, "warning")]


def test_without_any_usable_row_every_row_is_named(tmp_path: Path) -> None:
    made = check(tmp_path, ['{"question": "q", "answer": 1}', "", "nonsense"], on_bad_row="skip")
    assert made.failed
    assert (made.rows, made.rejected) == (2, 2)
    assert [problem.line for problem in made.problems] == [1, 3]
    assert made.figures is None
    json.dumps(as_document(made))


def test_rows_that_the_template_refuses_are_bad_rows(tmp_path: Path) -> None:
    lines = [json.dumps(json.loads(row(i)) | {"ask": sentence(f"ask {i}")}) for i in range(5)]
    made = check(tmp_path, [*lines, row(6), row(7)], template="Q: {ask}\nA: {answer}")
    assert [(problem.line, "ask" in problem.reason) for problem in made.problems] == [(6, True), (7, True)]
    refused = check(tmp_path, [row(1), row(2)], template="Q: {ask}\nA: {answer}")
    assert [problem.line for problem in refused.problems] == [1, 2]


def test_where_the_data_cannot_be_prepared_the_bad_rows_are_named_all_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row(0), "nonsense", row(1)])
    without = ChatTokenizer(sprig().backend, sprig().folder, sprig().special, sprig().eos_ids, None)
    made = audit(recipe_from_mapping({"model": "sprig", "data": path}), without)
    assert made.failed
    assert [finding.check for finding in made.findings] == ["preparation", "bad-rows"]
    assert "no chat template" in made.findings[0].reason
    assert (made.rows, made.rejected, [problem.line for problem in made.problems]) == (3, 1, [2])
    json.dumps(as_document(made))


def test_a_missing_file_is_an_error_as_everywhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothere\.jsonl"):
        check_files({"data": str(tmp_path / "nothere.jsonl")})


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_held_out_rows_that_are_trained_on(tmp_path: Path) -> None:
    trained = [row(i) for i in range(30)]
    question, answer = json.loads(trained[7])["question"], json.loads(trained[7])["answer"]
    nearly = json.dumps({"question": question, "answer": answer.replace(".", "!")})
    held = [row(100), trained[3], nearly, row(101, question=json.loads(trained[9])["question"])]
    sources = [
        {"path": write(tmp_path / "train.jsonl", trained), "split": "train"},
        {"path": write(tmp_path / "eval.jsonl", held), "split": "eval"},
    ]
    made = check_files({"data": sources})
    assert made.figures is not None
    assert made.dataset is not None
    repeats, places = made.figures.repeats, made.dataset.places
    leaks = (repeats.leaked_exact, repeats.leaked_near, repeats.leaked_prompts)
    lines = [[(places[one].line, places[other].line) for one, other in same.first] for same in leaks]
    assert lines == [[(2, 4)], [(3, 8)], [(4, 10)]]
    assert repeats.leaked == made.dataset.report.duplicates.leaked
    assert {"leaks", "leaked-prompts"} <= said(made)
    finding = next(one for one in made.findings if one.check == "leaks")
    assert finding.severity == "warning"
    assert [Path(one.source.file).name for one in finding.evidence] == ["eval.jsonl"] * 2
    assert [one.other and Path(one.other.file).name for one in finding.evidence] == ["train.jsonl"] * 2


def test_each_thing_is_said_once(tmp_path: Path) -> None:
    """What prepare notes about skipped rows and leaks is told by findings, and not again as a note."""
    trained = [row(i) for i in range(30)]
    sources = [
        {"path": write(tmp_path / "train.jsonl", [*trained, "nonsense"]), "split": "train"},
        {"path": write(tmp_path / "eval.jsonl", trained[:2]), "split": "eval"},
    ]
    made = check_files({"data": sources, "on_bad_row": "skip"})
    assert [finding.check for finding in made.findings] == ["bad-rows", "leaks", "exact-duplicates"]


@pytest.mark.parametrize(
    ("policy", "severity"), [("error", "error"), ("truncate", "warning"), ("drop", "warning"), ("split", "note")]
)
def test_rows_longer_than_the_recipe_allows(tmp_path: Path, policy: str, severity: str) -> None:
    lines = [*[row(i) for i in range(20)], row(20, answer=" ".join(sentence(str(i)) for i in range(20)))]
    made = check(tmp_path, lines, train={"max_length": 150}, long_rows=policy)
    found = next(one for one in made.findings if one.check == "long-rows")
    assert (found.severity, found.rows, [one.source.line for one in found.evidence]) == (severity, 1, [21])
    assert made.failed == (policy == "error")
    assert "long-rows" not in said(check(tmp_path, lines, train={"max_length": 1000}, long_rows=policy))


def test_answers_far_from_the_others_in_length(tmp_path: Path) -> None:
    lines = [row(i, answer=" ".join(sentence(f"{i} {j}") for j in range(3))) for i in range(30)]
    lines += [row(40, answer="No"), row(41, answer=" ".join(sentence(f"x{j}") for j in range(90)))]
    made = check(tmp_path, lines)
    lines_of = {finding.check: [one.source.line for one in finding.evidence] for finding in made.findings}
    assert (lines_of["short-answers"], lines_of["long-answers"]) == ([31], [32])


def test_what_most_answers_have_in_common(tmp_path: Path) -> None:
    labels = check(tmp_path, [row(i, answer=("yes", "no")[i % 2]) for i in range(60)])
    assert "one-answer" in said(labels)
    assert "one-opening" not in said(labels)
    sure = check(tmp_path, [row(i, answer=f"Sure, here is {sentence(str(i))}") for i in range(60)])
    assert "one-opening" in said(sure)
    assert "one-answer" not in said(sure)


def test_few_tokens_trained(tmp_path: Path) -> None:
    long = " ".join(sentence(f"l{j}") for j in range(12))
    made = check(tmp_path, [row(i, question=f"{sentence(str(i))} {long}", answer=WORDS[i]) for i in range(20)])
    assert "little-trained" in said(made)
    assert made.figures is not None
    assert made.figures.lengths.labelled_share < 0.05


def test_a_system_turn_in_some_rows(tmp_path: Path) -> None:
    def chat(number: int, system: bool) -> str:
        turns = [{"role": "user", "content": sentence(f"q{number}")}]
        turns.append({"role": "assistant", "content": sentence(f"a{number}")})
        first = [{"role": "system", "content": "Be brief."}] if system else []
        return json.dumps({"messages": [*first, *turns]})

    assert "some-systems" in said(check(tmp_path, [chat(i, i % 3 == 0) for i in range(30)]))
    assert "some-systems" not in said(check(tmp_path, [chat(i, True) for i in range(30)]))


def test_memory_does_not_grow_with_the_faults(tmp_path: Path) -> None:
    rows = KEPT_PLACES + 50
    made = check(tmp_path, [row(i, answer=f"{sentence(str(i))}<br/>") for i in range(rows)])
    finding = next(one for one in made.findings if one.check == "markup")
    assert (finding.rows, len(finding.evidence)) == (rows, KEPT_PLACES)


def test_progress_is_told_for_both_passes(tmp_path: Path) -> None:
    from luthier.data.audit import Told

    path = write(tmp_path / "rows.jsonl", [row(i) for i in range(40)])
    first: list[tuple[int, int]] = []
    second: list[tuple[int, int]] = []
    told = Told(lambda *now: first.append(now), lambda *now: second.append(now))
    audit(recipe_from_mapping({"model": "sprig", "data": path}), sprig(), told)
    assert first[-1] == second[-1] == (40, 40)


def test_the_document_names_what_scripts_rely_on(tmp_path: Path) -> None:
    made = check(tmp_path, [*[row(i) for i in range(20)], row(3), "nonsense", row(21, answer="a<br/>b")])
    document = json.loads(json.dumps(as_document(made)))
    assert (document["schema"], document["rows"], document["rejected"], document["passed"]) == (1, 23, 1, False)
    assert [set(problem) for problem in document["problems"]] == [
        {"file", "line", "column", "row", "reason", "remedy", "severity"}
    ] * 2
    assert [problem["line"] for problem in document["problems"]] == [22, 23]
    assert document["duplicates"]["exact"]["rows"] == 1
    assert document["duplicates"]["exact"]["first"][0]["line"] == 21
    assert document["duplicates"]["exact"]["first"][0]["same_as"]["line"] == 4
    assert sum(bar["rows"] for bar in document["lengths"]["histogram"]) == 22
    assert 0 < document["labelled_share"] < 1
    assert sum(side["rows"] for side in document["splits"].values()) == 22
    for name in ("overlap", "truncation", "openings", "answers", "speakers", "languages", "findings", "notes"):
        assert name in document


def test_real_rows_have_little_against_them(shared: Path) -> None:
    """GSM8K: one row with a zero-width space; the tales: nothing but how they begin."""
    sums = check_files({"data": str(shared / "data" / "gsm8k_train.jsonl")})
    assert [(one.check, one.rows) for one in sums.findings] == [("invisible-characters", 1)]
    assert sums.problems[0].line == 7389
    tales = check_files({"data": str(shared / "data" / "grimm_stories.jsonl")})
    assert [one.check for one in tales.findings] == ["one-opening"]
    for made in (sums, tales):
        assert made.figures is not None
        assert next(iter(made.figures.languages)) == "en"
