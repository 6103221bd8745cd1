"""`luthier chat` at a terminal: prompt, line editing, Ctrl-C, what is dim, and two answers in columns or stacked."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.cli.terminal import CTRL_C, CTRL_D, PROMPT, UP, Terminal, shown

SKY, STORY = "What colour is the sky?", "Tell me a story."
GREEDY = ("--temperature", 0, "--max-tokens", 24)
ENDLESS = ("--temperature", 5, "--top-p", 1, "--max-tokens", 900)
"""Any token after any other: an answer hardly ever ends before its room is used up."""
STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STATUS = re.compile(r"\d+ tokens, [\d,]+ tokens/s, \d+ of 1,024 in the context")


def ask(terminal: Terminal, question: str) -> str:
    """What comes back for a line, up to the next prompt, without colours."""
    terminal.type(f"{question}\r")
    return STYLE.sub("", terminal.until(f"\n{PROMPT}")).replace("\r\n", "\n")


def answer(luthier: Command, adapter: Path, *words: str) -> str:
    ended = luthier("generate", adapter, "--prompt", SKY, *GREEDY, *words)
    assert ended.code == 0, ended.err
    return ended.out.removesuffix("\n")


def test_a_conversation(luthier: Command, adapter: Path, tmp_path: Path) -> None:
    tuned = answer(luthier, adapter)
    with Terminal(tmp_path, "chat", adapter, *GREEDY) as terminal:
        assert "/help lists the commands" in terminal.until(PROMPT)
        first = ask(terminal, SKY)
        assert tuned in first.splitlines()
        assert STATUS.search(first)
        # An error is said, and the conversation goes on as it was.
        assert "nothing to take back" not in ask(terminal, "/undo")
        assert "nothing to take back" in ask(terminal, "/undo")
        assert "ask something shorter" in ask(terminal, "q7z9 " * 500)
        if importlib.util.find_spec("readline") is not None:
            terminal.type(f"{UP}{UP}{UP}{UP}\r")  # the long line, /undo, /undo, and the question
            assert tuned in STYLE.sub("", terminal.until(f"\n{PROMPT}")).replace("\r\n", "\n").splitlines()
        assert "saved as a row of it.jsonl" in ask(terminal, "/save it.jsonl")
        assert "is there already" in ask(terminal, "/save it.jsonl")
        terminal.interrupt()
        assert "Ctrl-C again or /quit to leave" in terminal.until(f"\n{PROMPT}")
        assert tuned in ask(terminal, "/retry").splitlines()  # which makes the next Ctrl-C the first again
        terminal.interrupt()
        terminal.until(f"\n{PROMPT}")
        terminal.interrupt()
        assert terminal.ended() == 0


def test_the_end_of_input_ends_it(adapter: Path, tmp_path: Path) -> None:
    with Terminal(tmp_path, "chat", adapter) as terminal:
        terminal.until(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.ended() == 0


def test_typed_questions_whose_answers_go_into_a_file(luthier: Command, adapter: Path, tmp_path: Path) -> None:
    tuned = answer(luthier, adapter)
    with (
        (tmp_path / "answers.txt").open("wb") as out,
        Terminal(tmp_path, "chat", adapter, *GREEDY, out=out) as terminal,
    ):
        terminal.until(PROMPT)
        assert STATUS.search(ask(terminal, SKY))
        terminal.type("/quit\r")
        assert terminal.ended() == 0
    assert (tmp_path / "answers.txt").read_text() == f"{tuned}\n"


@pytest.mark.parametrize("compare", [False, True])
def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(adapter: Path, tmp_path: Path, compare: bool) -> None:
    with Terminal(tmp_path, "chat", adapter, *ENDLESS, *(["--compare"] * compare), columns=60) as terminal:
        terminal.until(PROMPT)
        terminal.type(f"{STORY}\r")
        terminal.until(f"{STORY}\r\n")
        terminal.until(" ")  # it is being written
        terminal.type(CTRL_C)
        seen = " ".join(STYLE.sub("", terminal.until(f"\n{PROMPT}")).split())
        assert "stopped; the next answer sees what there is" in seen
        count = re.search(r"([\d,]+) tokens,", seen)
        assert count is not None
        assert int(count[1].replace(",", "")) < 900
        assert f"taken back: {STORY}" in ask(terminal, "/undo")
        terminal.type("/quit\r")
        assert terminal.ended() == 0


def test_two_columns_where_they_fit_and_stacked_where_not(luthier: Command, adapter: Path, tmp_path: Path) -> None:
    sides = [answer(luthier, adapter, *words) for words in (("--base",), ())]
    assert sides[0] != sides[1]
    with Terminal(tmp_path, "chat", adapter, *GREEDY, "--compare", columns=82) as terminal:
        terminal.until(PROMPT)
        lines = [line.split("│") for line in shown(ask(terminal, SKY)) if "│" in line]
        assert all(len(line) == 2 for line in lines)
        assert [cell.strip() for cell in lines[0]] == ["base", "tuned"]
        for side, text in enumerate(sides):
            assert " ".join(" ".join(line[side] for line in lines[1:]).split()) == " ".join(text.split())
    with Terminal(tmp_path, "chat", adapter, *GREEDY, "--compare", columns=79) as terminal:
        terminal.until(PROMPT)
        assert f"base\n{sides[0]}\n\ntuned\n{sides[1]}\n" in ask(terminal, SKY)
