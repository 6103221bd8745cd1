"""Reading files: what is accepted, and the one message that each kind of bad input gets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from luthier.data.sources import SHOWN_PROBLEMS, expand_bundled, open_sources, read_sources
from luthier.errors import DataError
from luthier.recipe.schema import DataSource

GOOD = {"question": "2 + 2?", "answer": "4"}


def source(path: Path, content: bytes | str | list[object], **settings: object) -> DataSource:
    """A source whose file holds `content`: bytes, text, or rows."""
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataSource(path=str(path), **settings)


def refused(*sources: DataSource) -> DataError:
    with pytest.raises(DataError) as caught:
        read_sources(sources)
    assert caught.value.exit_code == 3
    return caught.value


def test_bom_crlf_and_blank_lines_are_read(tmp_path):
    line = json.dumps(GOOD).encode()
    rows = source(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line + b"\r\n" + line)
    (found,) = read_sources([rows])
    assert [conversation.source.line for conversation in found.conversations] == [1, 4, 5]
    assert [turn.content for turn in found.conversations[0].turns] == ["2 + 2?", "4"]


def test_rows_are_read_again_and_from_any_of_them(tmp_path):
    rows = source(tmp_path / "rows.jsonl", "".join(json.dumps(GOOD) + "\n\n[]\n" for _ in range(4)))
    (opened,) = open_sources([rows])
    whole = list(opened.rows())
    assert len(whole) == 8
    for start in range(10):
        assert list(opened.rows(start)) == whole[start:]


def test_rows_are_not_read_before_they_are_asked_for(tmp_path):
    (opened,) = open_sources([source(tmp_path / "rows.jsonl", [GOOD] * 30 + ["not an object"])])
    stream = opened.rows()
    assert next(stream).fields == GOOD
    with open(opened.path, "ab") as file:
        file.write(b"\n".join([json.dumps(GOOD).encode()] * 30_000))  # far beyond any buffer
    assert sum(1 for _ in stream) == 30_030


def test_the_digest_is_the_contents(tmp_path):
    first = source(tmp_path / "a.jsonl", [GOOD])
    second = source(tmp_path / "b.jsonl", [GOOD], weight=2.0)
    third = source(tmp_path / "c.jsonl", [GOOD, GOOD])
    digests = [opened.digest() for opened in open_sources([first, second, third])]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0] == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()


def test_all_bad_rows_of_all_files_come_at_once(tmp_path):
    first = source(tmp_path / "a.jsonl", '{"question": "q", "answer": "a"}\n{"question": "q", "ans\n[1, 2]\n')
    second = source(
        tmp_path / "b.jsonl",
        [GOOD, {"question": "q"}, {"question": "q", "answer": " \n"}, {"question": 3, "answer": "a"}, {"text": "t"}],
    )
    error = refused(first, second)
    assert [(Path(p.where).name, p.line) for p in error.problems] == [
        ("a.jsonl", 2), ("a.jsonl", 3), ("b.jsonl", 2), ("b.jsonl", 3), ("b.jsonl", 4), ("b.jsonl", 5)
    ]  # fmt: skip
    for part in (
        "6 of 8 rows cannot be used",
        "a.jsonl:2: column 23: not JSON",
        "a.jsonl:3: column 1: a row must be a JSON object, not a list",
        "b.jsonl:2: column 1: the key 'answer' is missing",
        "b.jsonl:3: column 19: 'answer' is only spaces",
        "b.jsonl:4: column 2: 'question' must be text, not a number",
        "b.jsonl:5: column 1: the key 'question' is missing (the row looks like text, this file is read as",
    ):
        assert part in error.message


def test_many_bad_rows_are_counted_and_the_first_shown(tmp_path):
    error = refused(source(tmp_path / "rows.jsonl", [GOOD] + [{"question": "q", "answer": ""}] * 800))
    assert len(error.problems) == SHOWN_PROBLEMS
    assert f"800 of 801 rows cannot be used; the first {SHOWN_PROBLEMS} are" in error.message


def test_a_missing_file_names_the_nearest(tmp_path):
    source(tmp_path / "stories.jsonl", [GOOD])
    error = refused(DataSource(path=str(tmp_path / "storys.jsonl")))
    assert "there is no file" in error.message
    assert error.remedy == "did you mean stories.jsonl?"
    error = refused(DataSource(path=str(tmp_path / "no" / "rows.jsonl")))
    assert "does not exist either" in error.message
    assert "pirate" in str(error.remedy)


def test_unknown_keys_name_the_nearest_and_list_the_formats(tmp_path):
    error = refused(source(tmp_path / "rows.jsonl", [{"Question": "q", "response": "a"}]))
    assert "rows.jsonl:1: no format has these keys: Question, response" in error.message
    for name in ("messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "title-content", "text"):
        assert f"    {name}:" in error.message
    assert "nearest is question-answer" in str(error.remedy)
    assert "{question: Question, answer: response}" in str(error.remedy)


def test_keys_of_half_a_format_say_what_is_missing_first(tmp_path):
    error = refused(source(tmp_path / "rows.jsonl", [{"question": "q", "reply": "a"}]))
    fact = "rows.jsonl:1: the rows have `question` but no `answer` (format question-answer)\n  the formats are"
    assert fact in error.message
    assert "{answer: reply}" in str(error.remedy)
    error = refused(source(tmp_path / "rows.jsonl", [{"data": [{"question": "q", "answer": "a"}]}]))
    assert "jq -c '.data[]'" in str(error.remedy)


def test_the_format_is_that_of_most_of_the_first_rows(tmp_path):
    (opened,) = open_sources([source(tmp_path / "rows.jsonl", [3, {"text": "t"}, GOOD, {"id": 1}, GOOD])])
    assert opened.format == "question-answer"


def test_fields_map_the_columns(tmp_path):
    rows = [{"ask": "2 + 2?", "reply": "4", "answer": "a column of that name that is not meant"}]
    (found,) = read_sources([source(tmp_path / "a.jsonl", rows, fields={"question": "ask", "answer": "reply"})])
    assert found.format == "question-answer"
    assert [turn.content for turn in found.conversations[0].turns] == ["2 + 2?", "4"]
    error = refused(source(tmp_path / "b.jsonl", rows, fields={"question": "asks", "answer": "reply"}))
    assert "takes question from 'asks', a key that no row has" in error.message
    assert error.remedy == "did you mean ask?"


def test_format_is_recognised_and_can_be_overridden(tmp_path):
    rows = [{"question": "q", "answer": "a", "text": "q a"}]
    (found,) = read_sources([source(tmp_path / "rows.jsonl", rows)])
    assert (found.format, found.recognised) == (
        "question-answer",
        "JSONL, recognised by question and answer; text would fit too",
    )
    (found,) = read_sources([source(tmp_path / "rows.jsonl", rows, format="text")])
    assert (found.format, found.recognised) == ("text", "JSONL, as the recipe says")
    assert found.conversations[0].plain


def test_bundled_names_stand_for_their_files():
    found = expand_bundled([DataSource(path="pirate"), DataSource(path="tales", split="eval")])
    assert [(Path(s.path).parts[-2:], s.split) for s in found] == [
        (("pirate", "train.jsonl"), "train"), (("pirate", "eval.jsonl"), "eval"), (("pirate", "test.jsonl"), "test"),
        (("tales", "eval.jsonl"), "eval"),
    ]  # fmt: skip
    assert expand_bundled([DataSource(path="./pirate")])[0].path == "./pirate"


def test_real_rows(shared):
    gsm8k, grimm = read_sources(
        [DataSource(path=str(shared / "data" / name)) for name in ("gsm8k_train.jsonl", "grimm_stories.jsonl")]
    )
    assert (gsm8k.format, len(gsm8k.conversations)) == ("question-answer", 7473)
    assert (grimm.format, len(grimm.conversations)) == ("title-content", 62)


def test_the_one_key_that_is_left_over_is_proposed(tmp_path):
    path = tmp_path / "dolly.jsonl"
    path.write_text('{"instruction": "Name a colour.", "response": "Red."}\n', encoding="utf-8")
    with pytest.raises(DataError, match="the rows have `instruction` but no `output`") as caught:
        open_sources([DataSource(path=str(path))])
    assert "fields: {output: response}" in str(caught.value.remedy)
