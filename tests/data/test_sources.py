"""Reading files: what is accepted, and the one message that each kind of bad input gets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from luthier.data.sources import SHOWN_PROBLEMS, expand_bundled, read_records, read_sources
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


def test_records_stream(tmp_path):
    rows = source(tmp_path / "rows.jsonl", [GOOD] * 3 + ["not an object"])
    stream = read_records(rows.path)
    assert next(stream).fields == GOOD  # the first row comes before the bad one is met
    with pytest.raises(DataError, match=r"rows\.jsonl:4: a row must be a JSON object"):
        list(stream)


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
        "a.jsonl:2: not JSON",
        "a.jsonl:3: a row must be a JSON object, not a list",
        "b.jsonl:2: the key 'answer' is missing",
        "b.jsonl:3: 'answer' is empty",
        "b.jsonl:4: 'question' must be text, not a number",
        "b.jsonl:5: the key 'question' is missing (the row looks like text; this file is read as question-answer)",
    ):
        assert part in error.message


def test_many_bad_rows_are_counted_and_the_first_shown(tmp_path):
    error = refused(source(tmp_path / "rows.jsonl", [GOOD] + [{"question": "q", "answer": ""}] * 800))
    assert len(error.problems) == SHOWN_PROBLEMS
    assert f"800 of 801 rows cannot be used; the first {SHOWN_PROBLEMS} are" in error.message


@pytest.mark.parametrize("content", ["", "\n\r\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path, content):
    assert "rows.jsonl is empty" in refused(source(tmp_path / "rows.jsonl", content)).message


def test_a_missing_file_names_the_nearest(tmp_path):
    source(tmp_path / "stories.jsonl", [GOOD])
    error = refused(DataSource(path=str(tmp_path / "storys.jsonl")))
    assert "there is no file" in error.message
    assert error.remedy == "did you mean stories.jsonl?"
    error = refused(DataSource(path=str(tmp_path / "no" / "rows.jsonl")))
    assert "does not exist either" in error.message
    assert "pirate" in str(error.remedy)


def test_a_folder_and_an_unreadable_file(tmp_path):
    assert "is a folder, not a file" in refused(DataSource(path=str(tmp_path))).message
    locked = source(tmp_path / "locked.jsonl", [GOOD])
    Path(locked.path).chmod(0)
    if os.access(locked.path, os.R_OK):
        pytest.skip("this user may read every file")
    assert "cannot be read: Permission denied" in refused(locked).message


def test_a_json_array_and_packed_files_are_named(tmp_path):
    error = refused(source(tmp_path / "rows.json", json.dumps([GOOD, GOOD], indent=1)))
    assert "one JSON array" in error.message
    assert "jq -c '.[]' rows.json > rows.jsonl" in str(error.remedy)
    assert "is gzip" in refused(source(tmp_path / "rows.jsonl.gz", b"\x1f\x8b\x08\x00rest")).message
    assert "is Parquet" in refused(source(tmp_path / "rows.parquet", b"PAR1rest")).message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "q", "answer": "\xff"}', "not JSON"),
        (b'{"question": "q", "answer": "\\ud800"}', "not JSON"),
        (b'{"question": "q", "answer": "a"', "not JSON"),
        (b'{"question": "q", "answer": NaN}', "not JSON"),
        (b"3", "must be a JSON object, not the value 3"),
        (b"null", "must be a JSON object, not the value null"),
        (b'{"question": "q", "answer": null}', "'answer' must be text, not null"),
        (b'{"question": "q", "answer": ["a"]}', "'answer' must be text, not a list"),
    ],
)
def test_a_bad_line_gets_its_reason(tmp_path, line, reason):
    error = refused(source(tmp_path / "rows.jsonl", json.dumps(GOOD).encode() + b"\n" + line + b"\n"))
    assert error.problems[0].line == 2
    assert reason in error.problems[0].reason


def test_unknown_keys_list_the_formats_and_the_nearest(tmp_path):
    error = refused(source(tmp_path / "rows.jsonl", [{"Question": "q", "response": "a"}]))
    assert "no format has these keys: Question, response" in error.message
    for name in ("messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "title-content", "text"):
        assert f"    {name}:" in error.message
    assert "nearest is question-answer" in str(error.remedy)
    assert "{question: Question, answer: your-key}" in str(error.remedy)


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
        "recognised by question and answer; text would fit too",
    )
    (found,) = read_sources([source(tmp_path / "rows.jsonl", rows, format="text")])
    assert (found.format, found.recognised) == ("text", "as the recipe says")
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
