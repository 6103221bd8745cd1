"""`luthier data check`: what a person reads, what a script reads, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.data.test_audit import row, write


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns; rich has asked for the width already, so its console is told."""
    from luthier.cli import console

    monkeypatch.setattr(console.output, "_width", 80)


def test_sound_data_is_said_to_be_sound(luthier: Command) -> None:
    write(Path("rows.jsonl"), [row(i) for i in range(60)])
    ended = luthier("data", "check", "rows.jsonl")
    assert ended.code == 0
    assert "Nothing is wrong with this data." in ended.out
    assert "luthier data show rows.jsonl" in ended.out
    assert "luthier init --data rows.jsonl" in ended.out
    assert "sprig's tokenizer" in ended.err


def test_every_bad_row_with_its_place_and_exit_code_3(luthier: Command) -> None:
    lines = [*[row(i) for i in range(30)], "nonsense", row(31), '{"question": "only"}']
    write(Path("rows.jsonl"), lines)
    ended = luthier("data", "check", "rows.jsonl")
    assert ended.code == 3
    assert "2 of 33 rows cannot be used" in ended.out
    assert "rows.jsonl:31" in ended.out
    assert "rows.jsonl:33" in ended.out
    assert "on_bad_row: skip" in ended.out
    assert "Training would stop at this data" in ended.out
    assert "lengths" in ended.out  # the rest is told all the same


def test_skipped_rows_are_no_error(luthier: Command) -> None:
    write(Path("rows.jsonl"), [*[row(i) for i in range(30)], "nonsense"])
    ended = luthier("data", "check", "rows.jsonl", "--set", "on_bad_row=skip")
    assert ended.code == 0
    assert "1 of 31 rows cannot be used" in ended.out


def test_of_many_bad_rows_twenty_are_shown_and_all_are_counted(luthier: Command) -> None:
    write(Path("rows.jsonl"), [row(0), *["nonsense"] * 50, *['{"question": "only"}'] * 30])
    ended = luthier("data", "check", "rows.jsonl")
    shown = [line for line in ended.out.splitlines() if line.strip().startswith("rows.jsonl:")]
    assert len(shown) == 20
    assert any("'answer'" in line for line in shown)  # the later kind is among them
    assert "… and 60 more" in ended.out
    assert "50 × " in ended.out
    assert "30 × " in ended.out


def test_json_is_one_document_and_nothing_else(luthier: Command) -> None:
    write(Path("rows.jsonl"), [*[row(i) for i in range(30)], "nonsense"])
    ended = luthier("data", "check", "rows.jsonl", "--json")
    assert ended.code == 3
    document = json.loads(ended.out)
    assert document["rows"] == 31
    assert [problem["line"] for problem in document["problems"]] == [31]


def test_a_recipe_says_how_its_data_is_read(luthier: Command) -> None:
    write(Path("rows.jsonl"), [json.dumps({"ask": f"{i} is?", "say": row(i)}) for i in range(30)])
    recipe = "model: sprig\ndata: [{path: rows.jsonl, fields: {question: ask, answer: say}}]\ntrain: {max_length: 64}\n"
    Path("mine.yaml").write_text(recipe, encoding="utf-8")
    ended = luthier("data", "check", "mine.yaml")
    assert ended.code == 0
    assert "(the recipe's)" in ended.out
    assert "luthier plan mine.yaml" in ended.out
    assert "sprig's tokenizer" not in ended.err
    assert "no max_length" not in luthier("data", "check", "mine.yaml", "--set", "train.max_length=auto").out


def test_bundled_rows(luthier: Command) -> None:
    ended = luthier("data", "check", "pirate")
    assert ended.code == 0
    assert "Nothing is wrong with this data." in ended.out


def test_a_missing_file_and_a_wrong_setting(luthier: Command) -> None:
    missing = luthier("data", "check", "nothere.jsonl")
    assert missing.code == 3
    assert "nothere.jsonl" in missing.message
    write(Path("rows.jsonl"), [row(0)])
    wrong = luthier("data", "check", "rows.jsonl", "--set", "on_bad_row=perhaps")
    assert wrong.code == 2
    assert "on_bad_row" in wrong.message


@pytest.mark.usefixtures("narrow")
def test_no_line_is_wider_than_the_terminal_but_commands_stay_whole(luthier: Command) -> None:
    deep = Path("a-folder-with-a-long-name-such-as-people-have/and-another-one-in-it")
    deep.mkdir(parents=True)
    lines = [*[row(i) for i in range(60)], row(3), row(70, answer="[x](y) <br/> [bold]not markup[/]"), "nonsense"]
    path = write(deep / "rows-of-the-second-export-final.jsonl", lines)
    ended = luthier("data", "check", path)
    whole = [line for line in ended.out.splitlines() if "luthier " in line]
    assert len(whole) == 2
    assert all(path in line for line in whole)
    assert max(len(line) for line in ended.out.splitlines() if line not in whole) <= 80
    assert "[bold]not markup[/]" in " ".join(ended.out.split())
