"""Two answers in columns: what stands there in the end, whatever the pieces and the order in which they come."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from luthier.cli.chat_view import Columns, Stacked
from luthier.guard.secrets import visible
from tests.cli.terminal import shown

WORDS = st.lists(
    st.sampled_from(["a", "word", " ", "\n", "  ", "你好", "🙂", "\t", "\x1b[2J", "x" * 50, "é", "-", "\r"])
)


def drawn(pieces: list[tuple[int, str]], width: int, *, close: bool) -> str:
    last = {side: place for place, (side, _) in enumerate(pieces)}
    with redirect_stdout(io.StringIO()) as out:
        view = Columns(("one", "two"), width)
        for place, (side, piece) in enumerate(pieces):
            view.put(side, piece, not close and place == last[side])
        if close:
            view.close()
    return out.getvalue()


@pytest.mark.parametrize("close", [False, True])
@given(pieces=st.lists(st.tuples(st.integers(0, 1), WORDS.map("".join)), min_size=1), width=st.integers(20, 90))
def test_columns_hold_both_texts(pieces: list[tuple[int, str]], width: int, close: bool) -> None:
    pieces = [*pieces, (0, ""), (1, "")]
    out = drawn(pieces, width, close=close)
    assert out.endswith("\n")
    lines = shown(out)[1:-1]
    for side in (0, 1):
        text = visible("".join(piece for of, piece in pieces if of == side))
        assert "".join("".join(line.split("│")[side] for line in lines).split()) == "".join(text.split())
    for line in lines:
        assert cell_len(line) < width
        assert cell_len(line.split("│")[0]) == (width - 4) // 2 + 1
    # Nothing but the last line was ever drawn over.
    assert all(part.count("\r") >= 1 for part in out.split("\n")[1:-1])


def test_a_line_stays_open_until_every_side_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    view = Columns(("one", "two"), 30)
    view.put(0, "first\nsecond\nthird", False)
    assert capsys.readouterr().out.count("\n") == 1  # the names
    view.put(1, "uno\ndos", False)
    assert capsys.readouterr().out.count("\n") == 1
    view.put(1, "", True)
    assert capsys.readouterr().out.count("\n") == 1
    view.put(0, " one", True)
    assert [line.split() for line in shown(capsys.readouterr().out)] == [["third", "one", "│"], []]


def test_stacked_sides_keep_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    view = Stacked(("one", "two"))
    for side, text, ended in ((1, "zwei", False), (0, "eins", False), (1, "!", True), (0, ".", True)):
        view.put(side, text, ended)
    view.close()
    assert capsys.readouterr().out == "one\neins.\n\ntwo\nzwei!\n"
