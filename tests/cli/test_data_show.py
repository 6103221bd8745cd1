"""`luthier data show`: what it says is what is trained, on a terminal, in JSON and in a browser."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from luthier.data.conversation import IGNORED
from tests import tiny
from tests.cli.command import Command

USAGE, DATA = 2, 3
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = (
    "</script><script>document.title='owned'</script></textarea><img src=x onerror=\"document.title='owned'\">"
    "<!-- ]]> & &amp; ' {{ 7 * 7 }} {% raw %} <|eot_id|> \u202egnirts\u202c \x00 \x1b[31m \u200b"
)


def chat(*turns: tuple[str, str, bool]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content, "train": train} for role, content, train in turns]}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve short chats, one of several turns of which one is not trained, and a hostile one."""
    made: list[dict[str, object]] = [
        chat(("user", f"What is {i} plus {i}?", False), ("assistant", f"It is {2 * i}.", True)) for i in range(12)
    ]
    first, second = ("user", "Hi 😀", False), ("assistant", "Hello, 世界 👋🏽!", True)
    made.append(chat(first, second, first, ("assistant", "Not this.", False), first, ("assistant", "Yes.", True)))
    made.append(chat(("user", HOSTILE, False), ("assistant", HOSTILE, True)))
    return tiny.write_rows(tmp_path / "rows.jsonl", made)


def documents(shown: str) -> list[dict[str, object]]:
    found = json.loads(shown)["rows"]
    assert isinstance(found, list)
    return found


def test_json_has_every_token_with_its_label(luthier: Command, rows: Path) -> None:
    ended = luthier("data", "show", rows, "--rows", 99, "--json")
    assert ended.code == 0, ended.err
    found = documents(ended.out)
    assert sorted(row["line"] for row in found) == list(range(1, 15))
    for row in found:
        pieces = row["pieces"]
        assert [number for piece in pieces for number in piece["ids"]] == row["ids"]
        labels = row["labels"]
        for piece in pieces:
            trained = {labels[piece["start"] + i] != IGNORED for i in range(len(piece["ids"]))}
            assert trained == {piece["kind"].endswith("trained")}
        assert row["trained"] == sum(label != IGNORED for label in labels)


def test_rows_are_spread_and_the_same_each_time(luthier: Command, rows: Path) -> None:
    first, again = (luthier("data", "show", rows, "--split", "train", "--json").out for _ in range(2))
    assert first == again
    lines = [row["line"] for row in documents(first)]
    trained = [
        row["line"] for row in documents(luthier("data", "show", rows, "--rows", 99, "--split", "train", "--json").out)
    ]
    assert lines == [trained[0], trained[round((len(trained) - 1) / 2)], trained[-1]]


def test_marks_without_colours(luthier: Command, rows: Path) -> None:
    ended = luthier("data", "show", rows, "--at", "rows.jsonl:13")
    assert ended.code == 0, ended.err
    assert "\x1b" not in ended.out
    assert re.findall(r"\[\[(.*?)\]\]", ended.out)[1:] == ["Hello, 世界 👋🏽!‹<|eot_id|>›", "Yes.‹<|eot_id|>›"]
    assert "Not this.‹<|eot_id|>›" in ended.out
    assert "rows.jsonl:13  " in ended.out


def test_prompt_weights_are_said(luthier: Command, rows: Path) -> None:
    ended = luthier(
        "data",
        "show",
        rows,
        "--at",
        "rows.jsonl:1",
        "--set",
        "prompt_loss_weight=0.25",
        "--set",
        "split.eval=0",
        "--set",
        "split.train=1",
    )
    assert ended.code == 0, ended.err
    assert "‹<|begin_of_text|>›[[0.25: ‹<|start_header_id|>›user" in ended.out
    assert "[[It is 0.‹<|eot_id|>›]]" in ended.out


def test_a_hostile_row_cannot_move_the_terminal(luthier: Command, rows: Path) -> None:
    shown = luthier("data", "show", rows, "--at", "rows.jsonl:14").out
    assert "\\u202egnirts\\u202c" in shown
    assert "\\x00" in shown
    assert "\\x1b[31m" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u200b]", shown)


def test_tokens_stand_over_their_ids(luthier: Command, rows: Path) -> None:
    shown = luthier("data", "show", rows, "--at", "rows.jsonl:1", "--tokens").out
    (row,) = documents(luthier("data", "show", rows, "--at", "rows.jsonl:1", "--json").out)
    below = [number for line in shown.splitlines()[4::2] for number in line.replace("│", " ").split()]
    assert list(map(int, below)) == row["ids"]


def test_packs_of_the_first_step(luthier: Command, rows: Path) -> None:
    words = ("data", "show", rows, "--packed", "--set", "train.max_length=256", "--set", "train.batch_size=2")
    ended = luthier(*words, "--rows", 9, "--json")
    assert ended.code == 0, ended.err
    assert "packing: true" in ended.message
    document = json.loads(ended.out)
    assert len(document["packs"]) == document["packs_in_step"] == 2
    for pack in document["packs"]:
        assert pack["tokens"] == sum(one["tokens"] for one in pack["documents"]) <= pack["capacity"] == 256
        assert all(one["pieces"][0]["start"] == 0 for one in pack["documents"])
    shown = luthier(*words).out
    assert "pack 1 of 2  " in shown
    assert re.findall(r"── document (\d+), positions 0–", shown) == [
        str(i + 1) for i in range(len(document["packs"][0]["documents"]))
    ]


def test_recipe_run_folder_and_bundled_name(luthier: Command, rows: Path, tmp_path: Path) -> None:
    text = f"model: sprig\ndata: {rows.name}\ntemplate: alpaca\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(text.replace(rows.name, str(rows)), encoding="utf-8")
    for target in ("mine.yaml", "run"):
        assert "### Response:" in luthier("data", "show", target).out
    assert "pirate/train.jsonl:1" in luthier("data", "show", "pirate").out


def test_rows_that_cannot_be_used_are_counted_not_shown(luthier: Command, rows: Path) -> None:
    rows.write_text(rows.read_text(encoding="utf-8") + "[1]\n", encoding="utf-8")
    ended = luthier("data", "show", rows)
    assert ended.code == 0, ended.err
    assert "1 of 15 rows cannot be used" in ended.message
    assert "luthier data check" in ended.message
    ended = luthier("data", "show", rows, "--at", "rows.jsonl:15")
    assert (ended.code, ended.out) == (DATA, "")
    assert "rows.jsonl:15: the row cannot be used" in ended.message


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--row", "99"), USAGE, ("no row 99", "from 0 to 13", "try:")),
        (("--at", "rows.jsonl"), USAGE, ("not a place", "FILE:LINE")),
        (("--at", "other.jsonl:1"), USAGE, ("no file other.jsonl", "rows.jsonl")),
        (("--at", "rows.jsonl:99"), USAGE, ("no row stands there", "rows.jsonl:14")),
        (("--split", "test"), USAGE, ("no row is on the side test", "train (")),
        (("--row", "1", "--at", "rows.jsonl:1"), USAGE, ("--row and --at",)),
        (("--row", "1", "--packed"), USAGE, ("--packed", "leave")),
        (("--packed", "--split", "eval"), USAGE, ("only what is trained on is packed",)),
        (("--packed", "--set", "train.packing=false"), USAGE, ("train.packing: false", "--set train.packing=true")),
    ],
)
def test_what_is_not_there(
    luthier: Command, rows: Path, words: tuple[str, ...], code: int, said: tuple[str, ...]
) -> None:
    ended = luthier("data", "show", rows, *words)
    assert ended.code == code, ended.err
    assert ended.err.count("error:") == 1
    assert ended.out == ""
    for word in said:
        assert word in ended.message


def test_a_row_that_is_too_long_says_so(luthier: Command, tmp_path: Path) -> None:
    made = [chat(("user", "word " * 60, False), ("assistant", "Yes.", True))]
    made += [chat(("user", f"{i}", False), ("assistant", "No.", True)) for i in range(6)]
    rows = tiny.write_rows(tmp_path / "rows.jsonl", made)
    every = ("--set", "train.max_length=32", "--set", "split.train=1", "--set", "split.eval=0")
    ended = luthier("data", "show", rows, "--row", 0, *every)
    assert ended.code == DATA
    assert "rows.jsonl:1 is not used: its prompt alone" in ended.message
    assert "train.max_length" in ended.message


def test_the_parts_of_a_row_are_all_shown(luthier: Command, tmp_path: Path) -> None:
    made = [chat(("user", "Go.", False), ("assistant", "word " * 90, True))]
    made += [chat(("user", f"{i}", False), ("assistant", "No.", True)) for i in range(6)]
    rows = tiny.write_rows(tmp_path / "rows.jsonl", made)
    words = ("data", "show", rows, "--row", 0, "--set", "train.max_length=64", "--set", "long_rows=split")
    every = ("--set", "split.train=1", "--set", "split.eval=0")
    parts = documents(luthier(*words, *every, "--json").out)
    assert len(parts) > 1
    edges = [(part["begin"], part["end"]) for part in parts]
    assert edges[0][0] == 0
    assert [start for start, _ in edges[1:]] == [end for _, end in edges[:-1]]
    assert edges[-1][1] == parts[-1]["whole"]
    shown = luthier(*words, *every).out
    assert f"cut: 64 of {parts[0]['whole']} tokens" in shown
    assert f"a part: tokens {edges[1][0] + 1} to {edges[1][1]} of" in shown


class Token(NamedTuple):
    text: str
    count: int
    trained: bool


class Page(html.parser.HTMLParser):
    """Reads the rows back out of a page: of each article, its tokens; and every script in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[Token]] = []
        self.places: list[str] = []
        self.ids: list[list[int]] = []
        self.scripts: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert not [name for name in given if name.startswith("on")], attrs
        assert not {"src", "action", "srcdoc"} & set(given), attrs
        assert given.get("href", "#").startswith("#"), attrs
        if tag in ("meta", "input"):
            return
        self._open.append((tag, given.get("class", "")))
        if tag == "article":
            self.rows.append([])
            self.places.append(given.get("data-place", ""))
        elif tag == "script":
            self.scripts.append("")
        elif tag == "div" and given.get("class") == "doc":
            self.ids.append([int(number) for number in given["data-ids"].split()])
        elif tag == "i" and ("div", "turn") in self._open:
            trained = any(name == "mark" for name, _ in self._open)
            self.rows[-1].append(Token("", int(given.get("data-n", "1")), trained))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "script":
            self.scripts[-1] += data
        elif ("div", "turn") in self._open and any(name == "i" for name, _ in self._open):
            last = self.rows[-1][-1]
            self.rows[-1][-1] = last._replace(text=last.text + data)


def check_page(text: str, found: list[dict[str, object]]) -> None:
    """The page's rows are those of the JSON document: ids, and trained tokens one by one."""
    page = Page(text)
    assert len(page.scripts) == 1
    assert "owned" not in page.scripts[0]
    assert page.ids == [row["ids"] for row in found]
    for tokens, row in zip(page.rows, found, strict=True):
        trained = [token.trained for token in tokens for _ in range(token.count)]
        assert trained == [label != IGNORED for label in row["labels"]]  # type: ignore[attr-defined]
    (hostile,) = [
        tokens for tokens, place in zip(page.rows, page.places, strict=True) if place.endswith("rows.jsonl:14")
    ]
    shown = "".join(token.text for token in hostile)
    written = re.sub(r"[\x00\x1b\u200b\u202c\u202e]", _escaped, HOSTILE)
    assert shown.count(written) == 2


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def test_page_holds_the_rows_as_text(luthier: Command, rows: Path, tmp_path: Path) -> None:
    ended = luthier("data", "show", rows, "--html", tmp_path / "page.html", "--json")
    assert ended.code == 0, ended.err
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in html.unescape(text)
    # Tokens part most markup by themselves, so a parser might not notice what is not escaped.
    inside = "".join(re.findall(r"<i(?: class=\"s\")?(?: data-n=\"\d+\")?>(.*?)</i>", text, re.DOTALL))
    assert not re.search(r"[<>\"']|&(?!\w+;|#\d+;)", re.sub(r"</?u>", "", inside))
    check_page(text, documents(ended.out))


def test_page_with_packs_and_hostile_names(luthier: Command, rows: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "a<b>&'.yaml"
    recipe.write_text(f"model: sprig\ndata: {rows.name}\ntrain: {{packing: true, max_length: 300}}\n", encoding="utf-8")
    ended = luthier("data", "show", recipe, "--packed", "--html", tmp_path / "page.html")
    assert ended.code == 0, ended.err
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<h1>a&lt;b&gt;&amp;&#39;.yaml</h1>" in text
    assert len([place for place in page.places if not place]) >= 1
    assert "positions 0–" in text


def test_page_is_bounded(luthier: Command, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.data.view_page.MOST_TOKENS", 60)
    monkeypatch.setattr("luthier.data.view_page._MOST_OF_A_ROW", 20)
    ended = luthier("data", "show", rows, "--html", tmp_path / "page.html")
    assert ended.code == 0, ended.err
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert sum(map(len, Page(text).ids)) <= 60
    assert "of the rows asked for are left out" in text
    assert "more tokens of this row are not on this page" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome is installed")
def test_a_browser_shows_text_and_runs_only_our_script(luthier: Command, rows: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ended = luthier("data", "show", rows, "--html", page, "--json")
    assert ended.code == 0, ended.err
    assert CHROMIUM is not None
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*words, "--dump-dom", page.as_uri()], capture_output=True, text=True, encoding="utf-8", timeout=120, check=True
    )
    assert "<title>rows.jsonl · luthier data show</title>" in done.stdout
    assert '<output id="count">14 rows</output>' in done.stdout  # the script ran: its digest is the one in the policy
    check_page(done.stdout, documents(ended.out))
