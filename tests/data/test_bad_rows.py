"""Every kind of bad row and bad file: its message, its place, and what to do about it; all in one pass."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from luthier.data.conversation import Conversation
from luthier.data.problems import BadRow
from luthier.data.rawrow import ROW_LIMIT
from luthier.data.sources import open_sources
from luthier.errors import DataError
from luthier.recipe.schema import DataSource

GOOD = {"question": "2 + 2?", "answer": "4"}
GOOD_LINE = json.dumps(GOOD).encode() + b"\n"


def rows(path: Path, content: bytes, **settings: object) -> list[Conversation | BadRow]:
    path.write_bytes(content)
    (source,) = open_sources([DataSource(path=str(path), **settings)])
    return list(source.rows())


def bad(path: Path, content: bytes, **settings: object) -> list[BadRow]:
    return [row for row in rows(path, content, **settings) if isinstance(row, BadRow)]


def chat(*turns: object) -> bytes:
    return json.dumps({"messages": list(turns)}).encode() + b"\n"


def turn(role: object, content: object = "x", **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


USER, ANSWER, SYSTEM, TOOL = turn("user"), turn("assistant"), turn("system"), turn("tool")

# What the line is -> the column, and words of the reason and of the remedy.
LINES = {
    "invalid JSON": (b'{"question": "q" "answer": "a"}', 18, "not JSON", "JSON library"),
    "single quotes": (b"{'question': 'q'}", 2, "not JSON", "double quotes"),
    "ends early": (b'{"question": "q", "ans', 23, "ends before it is complete", "one line"),
    "NaN": (b'{"question": "q", "answer": NaN}', 29, "no NaN", "null"),
    "invalid UTF-8": (b'{"question": "\xc3\xa9", "answer": "\xff"}', 30, "not UTF-8: the byte 0xff", "iconv"),
    "a lone surrogate": (b'{"question": "q", "answer": "\\ud83d"}', 30, "surrogate", "emoji"),
    "a NUL byte": (b'{"question": "q", "answer": "a\0"}', 31, "NUL byte", "disk was full"),
    "only NUL bytes": (b"\0" * 64, 1, "NUL byte", "write the file again"),
    "a list": (b'["q", "a"]', 1, "must be a JSON object, not a list", "under keys"),
    "a number": (b"3", 1, "must be a JSON object, not a number (3)", "under keys"),
    "null": (b"null", 1, "must be a JSON object, not null", "under keys"),
    "a missing field": (b'{"question": "q"}', 1, "the key 'answer' is missing", "add 'answer'"),
    "a null field": (b'{"question": "q", "answer": null}', 19, "'answer' must be text, not null", "take the row out"),
    "a number as text": (b'{"question": 3, "answer": "a"}', 2, "must be text, not a number", '"question": "3"'),
    "a list as text": (b'{"question": "q", "answer": ["a"]}', 19, "must be text, not a list", "write the text"),
    "an answer of spaces": (b'{"question": "q", "answer": " \\n\\t"}', 19, "'answer' is only spaces", "write the text"),
    "an empty answer": (b'{"question": "q", "answer": ""}', 19, "'answer' is empty", "take the row out"),
    "another format": (b'{"text": "t"}', 1, "'question' is missing", "looks like text, this file is read as"),
    "a second row": (b'{"question": "q", "answer": "a"}, {}', 33, "more stands after the end of the row", "no comma"),
    "a key inside": (b'{"meta": {"answer": 1}, "question": "q", "answer": 2}', 42, "not a number", '"answer": "2"'),
    "a value in quotes": (b'{"question": "say \\"answer\\": no", "answer": 1}', 36, "not a number", '"answer": "1"'),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line(tmp_path, name):
    line, column, reason, remedy = LINES[name]
    found = rows(tmp_path / "rows.jsonl", GOOD_LINE + b"\n" + line + b"\r\n" + GOOD_LINE)
    assert [isinstance(row, BadRow) for row in found] == [False, True, False]
    problem, raw = found[1]
    assert problem.file == str(tmp_path / "rows.jsonl")
    assert (problem.line, problem.column, problem.row, problem.severity) == (3, column, 1, "error")
    assert reason in problem.reason
    assert remedy in problem.remedy
    assert raw == line.decode(errors="replace")
    assert f"rows.jsonl:3: column {column}: " in str(problem.as_problem())


TURNS = {
    "an unknown role": ((USER, turn("bot")), 2, "'role' is 'bot'; known are assistant, developer", "use one of them"),
    "a role that is no text": ((turn(["user"]), ANSWER), 1, "'role' is ['user']", "use one of them"),
    "two users": ((USER, USER, ANSWER), 2, "turn 2: the user speaks twice in a row", "join the two"),
    "two assistants": ((USER, ANSWER, ANSWER), 3, "turn 3: the assistant speaks twice in a row", "join the two"),
    "two system turns": ((SYSTEM, SYSTEM, USER, ANSWER), 2, "turn 2: a second system turn", "join them into one"),
    "a late system turn": ((USER, ANSWER, SYSTEM), 3, "turn 3: a system turn after others", "put it first"),
    "the assistant first": ((ANSWER, USER, ANSWER), 1, "the assistant speaks first", "add the user's turn"),
    "the assistant after system": ((SYSTEM, ANSWER), 2, "the assistant speaks first", "add the user's turn"),
    "a tool after the user": ((USER, TOOL, ANSWER), 2, "a tool's turn cannot follow the user's", "only after"),
    "the user after a tool": ((USER, ANSWER, TOOL, USER), 4, "a user's turn cannot follow the tool's", "the order is"),
    "the user last": ((USER, ANSWER, USER), 3, "turn 3: the last turn is the user's", "or take the turn out"),
    "a tool last": ((USER, ANSWER, TOOL), 3, "the last turn is the tool's", "add the answer"),
    "an empty turn": ((USER, turn("assistant", " ")), 2, "the assistant's turn is only spaces", "write the text"),
    "a number as text": ((USER, turn("assistant", 4)), 2, "'content' must be text, not a number", "in quotes"),
    "parts": ((turn("user", [{"type": "text"}]), ANSWER), 1, "'content' must be text, not a list", "write the text"),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_bad_turns(tmp_path, name):
    turns, number, reason, remedy = TURNS[name]
    line = chat(*turns)
    found = rows(tmp_path / "rows.jsonl", chat(USER, ANSWER) + line)
    assert isinstance(found[0], Conversation)
    problem = found[1].problem
    key = "content" if "content" in reason or "only spaces" in reason else "role"
    column = [i + 1 for i in range(len(line)) if line.startswith(f'"{key}"'.encode(), i)][number - 1]
    assert (problem.line, problem.column) == (2, column)
    assert reason in problem.reason
    assert remedy in problem.remedy


@pytest.mark.parametrize(
    ("row", "key", "reason", "remedy"),
    [
        ({"messages": [USER]}, "messages", "there is no assistant turn", "add the answer"),
        ({"messages": []}, "messages", "there is no assistant turn", "add the answer"),
        ({"messages": None}, "messages", "'messages' must be a list, not null", '"messages": [{"role"'),
        ({"messages": "[{}]"}, "messages", "must be a list, not text", "twice encoded"),
        ({"messages": ["x"]}, "messages", "turn 1: must be an object with 'role' and 'content', not text", '{"role"'),
        ({"messages": [USER, {"role": "assistant"}]}, "messages", "turn 2: 'content' is missing", "add 'content'"),
        ({"messages": [{"from": "human", "value": "x"}]}, "messages", "'role' is missing", "call them 'role' and 'con"),
        ({"messages": [USER, ANSWER, turn("user", train=True), ANSWER]}, "train", "turn 3: 'train' is true", "take it"),
        ({"messages": [USER, turn("assistant", train="no")]}, "train", "'train' must be true or false", "write true"),
        ({"messages": [USER, turn("assistant", train=False)]}, "messages", "marked as not learned", "train: true"),
        ({"messages": [USER, turn("assistant", weight=0.5)]}, "weight", "'weight' must be 0 or 1", "train"),
        ({"messages": [turn("user", train=True), ANSWER]}, "train", "only the assistant's turns", "train_on: all"),
        ({"messages": [USER, turn("assistant", None, tool_calls=[{}])]}, "tool_calls", "tool calls", "turn's text"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "y"}, "system", "two system turns", "keep one"),
        ({"messages": [USER, ANSWER], "system": 3}, "system", "'system' must be text, not a number", '"system": "3"'),
    ],
)  # fmt: skip
def test_bad_lists_of_turns(tmp_path, row, key, reason, remedy):
    line = json.dumps(row).encode()
    (found,) = bad(tmp_path / "rows.jsonl", chat(USER, ANSWER) + line)
    assert (found.problem.line, found.problem.column) == (2, line.index(f'"{key}":'.encode()) + 1)
    assert reason in found.problem.reason
    assert remedy in found.problem.remedy


def test_what_is_no_fault(tmp_path):
    weighed = chat(USER, turn("assistant", weight=0), USER, turn("assistant", weight=1, train=None))
    tools = chat(turn("developer"), USER, ANSWER, TOOL, turn("tool", ""), ANSWER, USER, ANSWER)
    found = rows(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + weighed.replace(b"\n", b"\r\n") + b" \r\n" + tools)
    assert [[t.train for t in row.turns] for row in found] == [
        [False, False, False, True],
        [False, False, True, False, False, True, False, True],
    ]
    assert [row.source.line for row in found] == [1, 3]


def test_a_half_last_line(tmp_path):
    (found,) = bad(tmp_path / "rows.jsonl", GOOD_LINE + '{"question": "é'.encode())
    assert (found.problem.line, found.problem.column, found.problem.row) == (2, 16, 1)
    assert "the file seems cut off: it ends inside this row" in found.problem.reason
    assert "take the half row out" in found.problem.remedy
    (found,) = bad(tmp_path / "rows.jsonl", GOOD_LINE + '{"question": "é'.encode()[:-1])  # inside a character
    assert "seems cut off" in found.problem.reason
    assert rows(tmp_path / "rows.jsonl", GOOD_LINE * 2 + GOOD_LINE[:-1])[2].turns[1].content == "4"  # only the LF lacks


def test_a_line_of_100_mb_is_not_held(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(GOOD_LINE + b'{"question": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + GOOD_LINE)
    (source,) = open_sources([DataSource(path=str(path))])
    tracemalloc.start()
    try:
        first, long, last = source.rows()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 5 * ROW_LIMIT  # the line, the line again while it is put together, its decoded beginning
    assert (first.turns, first.source.line, last.source.line) == (last.turns, 1, 3)
    assert (long.problem.line, long.problem.column, long.problem.row) == (2, 1, 1)
    assert "a line of more than 16 MiB" in long.problem.reason
    assert "a line break is missing" in long.problem.remedy
    assert len(long.raw) == 2000
    assert [row.source.line for row in source.rows(2)] == [3]


def test_mapped_columns_are_named_as_in_the_file(tmp_path):
    line = b'{"ask": "q", "reply": 4}'
    (found,) = bad(tmp_path / "rows.jsonl", line, fields={"question": "ask", "answer": "reply"})
    assert found.problem.column == line.index(b'"reply"') + 1


def test_all_of_them_in_one_pass(tmp_path):
    content = b"".join(line + b"\n" for line, *_ in LINES.values()) + GOOD_LINE
    found = rows(tmp_path / "rows.jsonl", content)
    assert [row.problem.line for row in found[:-1]] == list(range(1, len(LINES) + 1))
    assert [row.problem.row for row in found[:-1]] == list(range(len(LINES)))
    assert isinstance(found[-1], Conversation)


def test_every_row_may_be_bad(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert len(bad(path, b"not\nany\njson\n")) == 3
    assert "no row of it can be read" in open_sources([DataSource(path=str(path))])[0].recognised


# --- files


def refused(path: Path | str, **settings: object) -> DataError:
    with pytest.raises(DataError) as caught:
        open_sources([DataSource(path=str(path), **settings)])
    return caught.value


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
def test_zero_rows(tmp_path, content):
    for name in ("rows.jsonl", "rows.csv", "rows.txt", "rows.json"):
        (tmp_path / name).write_bytes(content)
        assert f"{name} is empty" in refused(tmp_path / name).message
    (tmp_path / "list.json").write_bytes(b"[ \n]")
    assert "list.json is empty" in refused(tmp_path / "list.json").message
    (tmp_path / "head.csv").write_bytes(b"question,answer\n")
    assert "head.csv is empty" in refused(tmp_path / "head.csv").message


def test_a_file_that_vanishes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD_LINE)
    (source,) = open_sources([DataSource(path=str(path))])
    path.unlink()
    with pytest.raises(DataError, match=r"there is no file .*rows\.jsonl"):
        list(source.rows())
    with pytest.raises(DataError, match=r"there is no file .*rows\.jsonl"):
        source.digest()


def test_a_folder_without_data(tmp_path):
    assert "has no data: it is empty" in refused(tmp_path).message
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"x")
    error = refused(tmp_path)
    assert "has no data: in it are 2 .png" in error.message
    assert ".jsonl" in str(error.remedy)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe.jsonl").message
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    error = refused(tmp_path / "loop.jsonl")
    assert "leads nowhere" in error.message
    assert error.remedy == "mend the link"


def test_an_unreadable_file(tmp_path):
    path = tmp_path / "locked.jsonl"
    path.write_bytes(GOOD_LINE)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    error = refused(path)
    assert "cannot be read: Permission denied" in error.message
    assert "ls -l" in str(error.remedy)


@pytest.mark.parametrize(
    ("name", "content", "what", "remedy"),
    [
        ("rows.zip", b"PK\x03\x04rest", "a zip archive", "unpack"),
        ("rows.csv", "question,answer\nq,a\n".encode("utf-16"), "UTF-16", "iconv"),
        ("rows.jsonl", b"SQLite format 3\0", "an SQLite data base", "JSONL"),
        ("rows.parquet", b"PAR1rest", "begins as Parquet but cannot be read", "again"),
        ("rows.jsonl.gz", b"\x1f\x8b\x08\x00rest", "cut off here", "again"),
        ("rows.jsonl.gz", gzip.compress(b"PAR1", mtime=0), "Parquet inside gzip", "unpack"),
        ("rows.json", b'{\n "data": []\n}', "stands on several lines", "jq -c . rows.json"),
        ("rows.dat", b"what is this\n", "neither its content nor its name", ".jsonl"),
        ("rows.csv", b"text,text\na,b\n", "names 'text' twice", "name of its own"),
        ("rows.csv", b'text,"x\n', "the header cannot be read", "doubled"),
    ],
)
def test_a_file_of_another_kind(tmp_path, name, content, what, remedy):
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert what in error.message
    assert name in error.message
    assert remedy in str(error.remedy)


def test_all_files_that_cannot_be_used_come_at_once(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "rows.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError) as caught:
        open_sources([DataSource(path=str(tmp_path / name)) for name in ("empty.jsonl", "rows.zip", "none.jsonl")])
    assert "3 files or data sets cannot be used" in caught.value.message
    assert [Path(problem.where).name for problem in caught.value.problems] == ["empty.jsonl", "rows.zip", "none.jsonl"]
    assert all(problem.remedy for problem in caught.value.problems)
