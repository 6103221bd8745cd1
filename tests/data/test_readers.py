"""Kinds of files: the same rows come out of all of them, from any row on; and what is wrong in each has its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data import readers_json
from luthier.data.conversation import Conversation
from luthier.data.problems import BadRow
from luthier.data.rawrow import ROW_LIMIT
from luthier.data.readers_json import read_json_list
from luthier.data.sources import OpenSource, open_sources
from luthier.errors import DataError
from luthier.recipe.schema import DataSource

ROWS = [
    {"question": "2 + 2?", "answer": "4"},
    {"question": 'a "quoted", text;\twith all', "answer": "two\nlines\r\nand a third: é 🎻"},
    {"question": "[{\\", "answer": "]},{"},
]


def opened(path: Path, **settings: object) -> OpenSource:
    (found,) = open_sources([DataSource(path=str(path), **settings)])
    return found


def table(rows: list[dict[str, str]], separator: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[dict[str, object]], group: int = 2) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=group)
    return out.getvalue()


def lines(rows: list[dict[str, str]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


KINDS = {
    "rows.jsonl": (lines, "JSONL"),
    "rows.json": (lambda rows: json.dumps(rows, indent=2).encode(), "a JSON list"),
    "packed.jsonl": (lambda rows: json.dumps(rows).encode(), "a JSON list"),
    "rows.jsonl.gz": (lambda rows: gzip.compress(lines(rows)), "JSONL in gzip"),
    "rows.jsonl.zst": (lambda rows: zstandard.compress(lines(rows)), "JSONL in Zstandard"),
    "list.json.gz": (lambda rows: gzip.compress(json.dumps(rows).encode()), "a JSON list in gzip"),
    "rows.csv": (lambda rows: table(rows, ","), "CSV"),
    "bom.csv": (lambda rows: b"\xef\xbb\xbf" + table(rows, ","), "CSV"),
    "german.csv": (lambda rows: table(rows, ";"), "CSV parted by semicolons"),
    "rows.tsv": (lambda rows: table(rows, "\t"), "TSV"),
    "rows.csv.gz": (lambda rows: gzip.compress(table(rows, ",")), "CSV in gzip"),
    "rows.parquet": (parquet, "Parquet"),
    "wrong.jsonl": (lambda rows: table(rows, ","), "CSV, though it is named .jsonl"),
    "wrong.csv": (lines, "JSONL, though it is named .csv"),
    "wrong.txt": (lines, "JSONL, though it is named .txt"),
    "gz_without_ending.jsonl": (lambda rows: gzip.compress(lines(rows)), "JSONL in gzip"),
    "parquet_named.jsonl": (parquet, "Parquet"),
    "no_ending": (lines, "JSONL"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    write, kind = KINDS[name]
    path = tmp_path / name
    path.write_bytes(write(ROWS))
    source = opened(path)
    assert source.recognised.startswith(f"{kind}, recognised by question and answer")
    found = list(source.rows())
    assert [row.fields for row in found] == ROWS
    assert [row.turns for row in found] == [row.turns for row in opened(written(tmp_path, "x.jsonl", ROWS)).rows()]
    for start in range(len(ROWS) + 2):
        assert list(source.rows(start)) == found[start:]


def written(folder: Path, name: str, rows: list[dict[str, str]]) -> Path:
    (folder / name).write_bytes(lines(rows))
    return folder / name


def test_lines_are_those_of_the_file(tmp_path):
    places = {"rows.csv": [2, 3, 6], "rows.json": [2, 6, 10], "packed.jsonl": [1, 1, 1], "rows.parquet": [1, 2, 3]}
    for name, expected in places.items():
        (tmp_path / name).write_bytes(KINDS[name][0](ROWS))
        assert [row.source.line for row in opened(tmp_path / name).rows()] == expected


def test_nested_parquet_becomes_plain_lists(tmp_path):
    turns = [{"role": "user", "content": "u", "train": None}, {"role": "assistant", "content": "a", "train": None}]
    late = [*turns, {"role": "user", "content": "v", "train": None}, {**turns[1], "train": False}]
    (tmp_path / "rows.parquet").write_bytes(parquet([{"messages": turns}, {"messages": None}, {"messages": late}]))
    first, second, third = opened(tmp_path / "rows.parquet").rows()
    assert [turn.train for turn in first.turns] == [False, True]
    assert [turn.train for turn in third.turns] == [False, True, False, False]
    assert (second.problem.line, second.problem.column, second.problem.row) == (2, None, 1)
    assert "'messages' must be a list, not null" in second.problem.reason
    assert second.raw == '{"messages":null}'


def test_parquet_that_is_not_utf8_costs_its_row_only(tmp_path):
    broken = pa.array([b"q", b"\xff", b"q"], pa.binary()).view(pa.string())
    rows = pa.table({"question": broken, "answer": ["1", "2", "3"]})
    pq.write_table(rows, tmp_path / "rows.parquet")
    found = list(opened(tmp_path / "rows.parquet").rows())
    assert [isinstance(row, BadRow) for row in found] == [False, True, False]
    assert "not UTF-8" in found[1].problem.reason


def test_bad_rows_of_a_table(tmp_path):
    content = (
        b'question,answer\nq,a\nq,a,b\nq\n\n"two\nlines",\nq,\xff\nq,a\0\nq,"say "x""\nq,a\n"never closed,a\nq,a\n'
    )
    (tmp_path / "rows.csv").write_bytes(content)
    found = list(opened(tmp_path / "rows.csv").rows())
    bad = [(row.problem.line, row.problem.column, row.problem.row, row.problem.reason) for row in found if is_bad(row)]
    assert [row[:3] for row in bad] == [(3, 1, 1), (4, 1, 2), (6, 1, 3), (8, 3, 4), (9, 4, 5), (10, 1, 6), (12, 1, 8)]
    for (*_, reason), words in zip(bad, REASONS, strict=True):
        assert words in reason
    assert all(row.problem.remedy for row in found if is_bad(row))
    assert [row.source.line for row in found if not is_bad(row)] == [2, 11]
    assert found[3].raw == '"two\nlines",'
    for start in range(len(found) + 1):
        assert list(opened(tmp_path / "rows.csv").rows(start)) == found[start:]


REASONS = (
    "the row has 3 cells, the header 2",
    "the row has 1 cell, the header 2",
    "'answer' is empty",
    "not UTF-8: the byte 0xff",
    "NUL byte",
    "not CSV",
    "a quote that opens in this row is not closed",
)


def is_bad(row: object) -> bool:
    return isinstance(row, BadRow)


def test_a_table_whose_quote_swallows_the_rest_is_not_held(tmp_path):
    with (tmp_path / "rows.csv").open("wb") as file:
        file.write(b'question,answer\nq,a\nq,"')
        for _ in range(2 * ROW_LIMIT // 2**16):
            file.write((b"x" * 63 + b"\n") * 2**10)
    found = list(opened(tmp_path / "rows.csv").rows())
    assert "not closed" in found[1].problem.reason
    assert found[1].problem.line == 3
    assert len(found[1].raw) == 2000


def test_mapped_columns_tell_a_table_by_its_header(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"ask,reply\nq,a\n")
    fields = {"question": "ask", "answer": "reply"}
    assert [turn.content for turn in next(opened(tmp_path / "rows.jsonl", fields=fields).rows()).turns] == ["q", "a"]


def test_bad_elements_of_a_list_cost_only_themselves(tmp_path):
    content = b"""[
  {"question": "q", "answer": "a"},
  {"question": "q" "answer": "a"},
  {"question": "q",
   "answer": 4}, 3, , {"question": "q", "answer": "b"}
] more"""
    (tmp_path / "rows.json").write_bytes(content)
    found = list(opened(tmp_path / "rows.json").rows())
    assert [(row.problem.line, row.problem.column, row.problem.row) for row in found if is_bad(row)] == [
        (3, 20, 1), (5, 4, 2), (5, 18, 3), (5, 21, 4), (6, 3, 6)
    ]  # fmt: skip
    reasons = [row.problem.reason for row in found if is_bad(row)]
    for reason, words in zip(
        reasons, ("not JSON", "text, not a number", "not a number (3)", "a comma too", "after the"), strict=True
    ):
        assert words in reason
    assert [row.source.line for row in found if not is_bad(row)] == [2, 5]
    for start in range(len(found) + 1):
        assert list(opened(tmp_path / "rows.json").rows(start)) == found[start:]


@pytest.mark.parametrize("cut", ["[", '[{"question": "q", "answer": "a"}', '[{"question": "q", "answer": "a"}, {"q'])
def test_a_list_that_is_cut_off(tmp_path, cut):
    (tmp_path / "rows.json").write_text(cut)
    *good, last = opened(tmp_path / "rows.json").rows()
    assert "the file seems cut off: its list is not closed" in last.problem.reason
    assert last.problem.row == len(good)


def test_a_long_element_of_a_list_is_not_held(tmp_path):
    with (tmp_path / "rows.json").open("wb") as file:
        file.write(b'[{"question": "q", "answer": "a"},\n{"question": "')
        for _ in range(3 * ROW_LIMIT // 2**20):
            file.write(b"x\\" * 2**19)
        file.write(b'x"},\n{"question": "q", "answer": "b"}]')
    first, long, last = opened(tmp_path / "rows.json").rows()
    assert (first.source.line, last.source.line) == (1, 3)
    assert "an element of more than 16 MiB" in long.problem.reason
    assert (long.problem.line, long.problem.row, len(long.raw)) == (2, 1, 2000)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text()
    | st.sampled_from(['"', "\\", '\\"', "]", "}", ",", "[{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_list_is_cut_as_a_parser_cuts_it(tmp_path, monkeypatch, examples):
    path = tmp_path / "rows.json"

    @settings(max_examples=examples, deadline=None)
    @given(values=st.lists(JSON, max_size=5), indent=st.none() | st.integers(0, 2), block=st.integers(1, 40))
    def holds(values: list[object], indent: int | None, block: int) -> None:
        monkeypatch.setattr(readers_json, "_BLOCK", block)  # so that blocks end anywhere
        text = json.dumps(values, indent=indent, ensure_ascii=False)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n")
        found = list(read_json_list(str(path)))
        assert [row[2] for row in found] == values
        for line, column, value, written in found:
            rest = "\n".join(text.split("\n")[line - 1 :])[column - 1 :]
            assert rest.encode().startswith(written)
            assert json.loads(written) == value

    holds()


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_packed_data_that_is_cut_off_gives_what_came_before(tmp_path, pack):
    rows = [{"question": f"{i * i * 7919} of {i}?", "answer": str(i * 31337)} for i in range(40_000)]
    whole = pack(lines(rows))
    (tmp_path / "rows.jsonl").write_bytes(whole[: len(whole) // 2])
    *good, last = opened(tmp_path / "rows.jsonl").rows()
    assert 1000 < len(good) < 40_000
    assert all(isinstance(row, Conversation) for row in good)
    assert "the compressed file is cut off here" in last.problem.reason
    assert (last.problem.row, last.problem.line) == (len(good), len(good) + 1)
    for start in (len(good) - 1, len(good), len(good) + 1):
        assert list(opened(tmp_path / "rows.jsonl").rows(start)) == [*good, last][start:]
    assert "again" in last.problem.remedy
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 64] = b"\xaa" * 64
    (tmp_path / "rows.jsonl").write_bytes(damaged)
    assert any(is_bad(row) for row in opened(tmp_path / "rows.jsonl").rows())


def test_packed_data_in_several_parts(tmp_path):
    for pack, name in ((gzip.compress, "a.gz"), (zstandard.compress, "a.zst")):
        (tmp_path / name).write_bytes(b"".join(pack(lines([row])) for row in ROWS))
        assert [row.fields for row in opened(tmp_path / name).rows()] == ROWS


# --- text and folders


def test_a_text_file_is_a_row(tmp_path):
    (tmp_path / "tale.md").write_bytes("\ufeff# Once\r\n\r\n[a](b) é\n".encode())
    (row,) = opened(tmp_path / "tale.md").rows()
    assert row.plain
    assert row.turns[0].content == "# Once\n\n[a](b) é\n"
    assert list(opened(tmp_path / "tale.md").rows(1)) == []
    with pytest.raises(DataError, match="one row of format text, not of alpaca"):
        opened(tmp_path / "tale.md", format="alpaca")


@pytest.mark.parametrize(
    ("content", "line", "column", "reason"),
    [
        (b"one\ntw\xc3\xa9\xff", 2, 4, "not UTF-8: the byte 0xff"),
        (b"one\0", 1, 4, "NUL byte"),
        (b"x" * (ROW_LIMIT + 1), 1, 1, "more than 16 MiB"),
    ],
    ids=["utf-8", "nul", "long"],
)
def test_a_text_file_that_is_none(tmp_path, content, line, column, reason):
    (tmp_path / "a.txt").write_bytes(content)
    ((problem, _),) = opened(tmp_path / "a.txt").rows()
    assert (problem.line, problem.column) == (line, column)
    assert reason in problem.reason


def test_a_folder_is_its_files_sorted(tmp_path):
    (tmp_path / "b" / ".git").mkdir(parents=True)
    for name in ("b/z.jsonl", "b/a.jsonl.gz", "a.csv", "b/.git/x.jsonl"):
        (tmp_path / name).write_bytes(table(ROWS, ",") if name.endswith("csv") else lines(ROWS))
    (tmp_path / "README.md").write_text("what the rows are")
    (tmp_path / "b" / "README").write_text("x")
    (tmp_path / "b" / "picture.png").write_text("x")
    found = open_sources([DataSource(path=str(tmp_path), weight=2.0, split="eval")])
    names = [str(Path(source.path).relative_to(tmp_path)) for source in found]
    assert names == ["a.csv", "b/a.jsonl.gz", "b/z.jsonl"]
    assert {(source.recipe.weight, source.recipe.split) for source in found} == {(2.0, "eval")}
    assert [source.recipe.path for source in found] == [source.path for source in found]
    assert found[0].notes == ("3 other files in the folder are no data and are not read (1 .md, 1 README, 1 .png)",)
    assert [source.notes for source in found[1:]] == [()] * 2


def test_a_folder_of_texts(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    found = open_sources([DataSource(path=str(tmp_path))])
    assert [row.turns[0].content for source in found for row in source.rows()] == ["one", "two"]
    assert {(source.format, source.notes) for source in found} == {("text", ())}


@pytest.mark.parametrize(("library", "name"), [("zstandard", "rows.jsonl.zst"), ("pyarrow", "rows.parquet")])
def test_a_library_that_is_missing_is_named(tmp_path, library, name):
    (tmp_path / name).write_bytes(KINDS[name][0](ROWS))
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from luthier.data.sources import open_sources\n"
        "from luthier.errors import DataError\n"
        "from luthier.recipe.schema import DataSource\n"
        "try: open_sources([DataSource(path=sys.argv[1])])\n"
        "except DataError as error: print(error.message, error.remedy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    assert f"needs the library {library}" in done.stdout
    assert 'pip install "luthier[data]"' in done.stdout
