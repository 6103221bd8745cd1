"""`luthier chat` with its lines from a pipe: what each does to the conversation, what is saved, what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from luthier.cli.loading import Voice, open_target
from luthier.data.conversation import Conversation, Turn
from luthier.data.sources import open_sources
from luthier.export.merge import write_tokenizer
from luthier.generate.generate import Completion, complete
from luthier.generate.sides import answer_sides
from luthier.model.locate import locate_model
from luthier.recipe.schema import DataSource
from tests.cli.command import Command, Ended

SKY, NAME, STORY = "What colour is the sky?", "What is my name?", "Tell me a story."
LIMIT = 24


@pytest.fixture(scope="module")
def voices(adapter: Path) -> dict[str, Voice]:
    """The base and the tuned model, each loaded by itself."""
    return {"base": open_target(adapter, base_only=True), "tuned": open_target(adapter, base_only=False)}


@pytest.fixture
def chat(luthier: Command, adapter: Path, monkeypatch: pytest.MonkeyPatch):
    def run(*lines: str, options: tuple[object, ...] = (), target: object = adapter) -> Ended:
        given = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        return luthier("chat", target, "--temperature", 0, "--max-tokens", LIMIT, *options)

    return run


def answer(voice: Voice, *said: str, system: str | None = None) -> str:
    """What the model says last, where `said` is question, answer, …, question."""
    turns = [Turn("system", system)] if system is not None else []
    turns += [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(said)]
    found = complete(
        voice.decoder,
        voice.template.tokenizer,
        voice.template.prompt_ids(turns),
        stop_ids=voice.template.stop_ids,
        max_new_tokens=LIMIT,
    )
    return found.text


def rows(path: Path) -> list[Conversation]:
    """What `luthier train` reads in the file, every row of it good."""
    (source,) = open_sources([DataSource(path=str(path))])
    found = list(source.rows())
    assert all(isinstance(row, Conversation) for row in found), found
    return [row for row in found if isinstance(row, Conversation)]


def said(row: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in row.turns]


def test_answers_alone_stand_on_standard_output_and_see_all_before_them(chat, voices: dict[str, Voice]) -> None:
    ended = chat(SKY, "", f"  {NAME}  ", "/system", "/help")
    one = answer(voices["tuned"], SKY)
    two = answer(voices["tuned"], SKY, one, NAME)
    assert (ended.code, ended.out) == (0, f"{one}\n{two}\n"), ended.err
    assert two != answer(voices["tuned"], NAME)
    assert "no system message" in ended.err
    assert "tokens/s" not in ended.err
    for command in ("/system", "/reset", "/undo", "/retry", "/save", "/quit"):
        assert command in ended.err


def test_compare_says_what_base_and_run_say_alone(
    chat, luthier: Command, adapter: Path, voices: dict[str, Voice]
) -> None:
    ended = chat(SKY, NAME, "/save both.jsonl", options=("--compare",))
    assert ended.code == 0, ended.err
    options = ("--prompt", SKY, "--temperature", 0, "--max-tokens", LIMIT)
    base, tuned = (luthier("generate", adapter, *words, *options).out for words in (("--base",), ()))
    assert base != tuned
    assert ended.out.startswith(f"base\n{base}\ntuned\n{tuned}")
    # Each side goes on with its own words, and those of the tuned one are kept.
    said_by_base = answer(voices["base"], SKY, base.removesuffix("\n"), NAME)
    said_by_tuned = answer(voices["tuned"], SKY, tuned.removesuffix("\n"), NAME)
    assert ended.out.endswith(f"base\n{said_by_base}\n\ntuned\n{said_by_tuned}\n")
    (kept,) = rows(Path("both.jsonl"))
    assert said(kept)[1::2] == [("assistant", tuned.removesuffix("\n")), ("assistant", said_by_tuned)]


def test_what_is_saved_is_a_row_that_train_reads(chat, voices: dict[str, Voice]) -> None:
    odd = 'Grüße 你好 🙂 "quoted" \\n'
    ended = chat("/system Be brief.", SKY, odd, "/save one.jsonl", "/reset", "/system -", "//help", "/save two.jsonl")
    assert ended.code == 0, ended.err
    assert "forgotten, but for the system message" in ended.err
    one, two = rows(Path("one.jsonl")), rows(Path("two.jsonl"))
    first = answer(voices["tuned"], SKY, system="Be brief.")
    assert said(one[0])[:4] == [("system", "Be brief."), ("user", SKY), ("assistant", first), ("user", odd)]
    assert said(two[0])[0] == ("user", "/help")
    assert len(one) == len(two) == 1
    # As a training row it begins as the chat prompted for its last answer.
    template = voices["tuned"].template
    prompt = template.prompt_ids(one[0].turns[:-1])
    assert template.encode(one[0]).ids.tolist()[: len(prompt)] == prompt


def test_an_answer_that_was_cut_is_kept_but_not_trained(chat) -> None:
    ended = chat(STORY, SKY, "/save it.jsonl", options=("--max-tokens", 4))
    assert ended.code == 0, ended.err
    assert "cut after 4 tokens: --max-tokens" in ended.err
    (row,) = rows(Path("it.jsonl"))
    trained = [turn.train for turn in row.turns if turn.role == "assistant"]
    marked = json.loads(Path("it.jsonl").read_text())["messages"]
    assert ["train" not in one for one in marked if one["role"] == "assistant"] == trained
    assert trained.count(False) == ended.err.count("(cut after")
    assert f"{trained.count(False)} cut short and not trained" in ended.err
    nothing = chat(STORY, "/save none.jsonl", options=("--max-tokens", 1))
    assert (nothing.code, "nothing to learn" in nothing.message) == (2, True)
    assert not Path("none.jsonl").exists()


def test_undo_and_retry(chat, voices: dict[str, Voice]) -> None:
    ended = chat(SKY, NAME, "/undo", STORY, "/save it.jsonl", "/retry", "/save --append it.jsonl")
    assert ended.code == 0, ended.err
    assert f"taken back: {NAME}" in ended.message
    first = answer(voices["tuned"], SKY)
    one, two = rows(Path("it.jsonl"))
    assert said(one)[:3] == [("user", SKY), ("assistant", first), ("user", STORY)]
    assert one.turns == two.turns  # greedy: another seed changes nothing
    warm = ("--temperature", 1.5, "--max-tokens", 200)
    ended = chat(SKY, "/save a.jsonl", "/retry", "/retry", "/save b.jsonl", options=(*warm, "--seed", 7))
    assert ended.code == 0, ended.err
    other = chat(SKY, options=(*warm, "--seed", 9))
    (before,), (after,) = rows(Path("a.jsonl")), rows(Path("b.jsonl"))
    assert before.turns != after.turns
    assert other.out == f"{after.turns[-1].content}\n"


@pytest.mark.parametrize(
    ("lines", "said_of_it"),
    [
        (("/save it.jsonl",), "nothing to save"),
        (("/undo",), "nothing to take back"),
        (("/retry",), "nothing to ask again"),
        ((SKY, "/save"), "/save FILE.jsonl"),
        ((SKY, "/save --append"), "/save FILE.jsonl"),
        ((SKY, "/save it.txt"), "/save it.jsonl"),
        ((SKY, "/save there.jsonl"), "/save --overwrite there.jsonl"),
        ((SKY, "/save link.jsonl"), "there already"),
        ((SKY, "/save folder.jsonl"), "there already"),
        ((SKY, "/save --overwrite folder.jsonl"), "folder.jsonl cannot be written"),
        ((SKY, "/save --append folder.jsonl"), "folder.jsonl cannot be written"),
        ((SKY, "/save --append bytes.jsonl"), "not UTF-8"),
        ((SKY, "/save there.jsonl/it.jsonl"), "cannot be written"),
        (("many words " * 600,), "ask something shorter"),
        ((SKY, "many words " * 600), "/reset begins a new one"),
    ],
)
def test_what_cannot_be_done_ends_a_pipe_and_changes_nothing(chat, lines: tuple[str, ...], said_of_it: str) -> None:
    Path("there.jsonl").write_bytes(b"precious")
    Path("bytes.jsonl").write_bytes(b"\xff\xfe")
    Path("folder.jsonl").mkdir()
    Path("link.jsonl").symlink_to("nowhere")
    ended = chat(*lines, STORY)
    assert ended.code == 2, ended.err
    assert said_of_it in ended.message
    assert ended.out.count("\n") == lines.count(SKY)  # what came after was not answered
    assert Path("there.jsonl").read_bytes() == b"precious"
    assert sorted(path.name for path in Path().iterdir()) == [
        *("bytes.jsonl", "folder.jsonl", "link.jsonl", "there.jsonl")
    ]


def test_overwriting_and_adding_as_told(chat) -> None:
    Path("it.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')  # no line break at its end
    ended = chat(SKY, "/save --append it.jsonl")
    assert ended.code == 0, ended.err
    assert len(Path("it.jsonl").read_text().splitlines()) == 2
    assert chat(SKY, "/save --overwrite it.jsonl").code == 0
    assert len(rows(Path("it.jsonl"))) == 1


def test_unknown_commands_are_said_and_passed_over(chat) -> None:
    ended = chat("/rest", "/reset now", "/etc/passwd", SKY)
    assert (ended.code, ended.out.count("\n")) == (0, 1)
    assert "there is no /rest; did you mean /reset?" in ended.message
    assert "/reset takes nothing behind it" in ended.message
    assert "there is no /etc/passwd" in ended.message


def test_bytes_that_are_no_text(luthier: Command, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/help\n\xff\xfe\n")))
    ended = luthier("chat", adapter)
    assert (ended.code, "line 2 of standard input is not UTF-8" in ended.message) == (2, True)


class Typed(io.TextIOWrapper):
    """Lines that a person types, as far as the command can tell."""

    def isatty(self) -> bool:
        return True


def test_ctrl_c_twice_leaves_a_step_that_takes_too_long(
    luthier: Command, adapter: Path, monkeypatch: pytest.MonkeyPatch, voices: dict[str, Voice]
) -> None:
    """The second strikes within a library, which makes an error of its own of it; the conversation is as before."""

    def stuck(*given: object, **named: object) -> list[Completion]:
        if len(asked) == 2:
            asked.append(STORY)
            os.kill(os.getpid(), signal.SIGINT)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise RuntimeError("could not determine the shape of object") from None
        asked.append(SKY)
        return answer_sides(*given, **named)  # type: ignore[arg-type]

    asked: list[str] = [SKY]
    monkeypatch.setattr("luthier.cli.chat.answer_sides", stuck)
    lines = f"{SKY}\n{STORY}\n{NAME}\n/save it.jsonl\n"
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(lines.encode())))
    before = signal.getsignal(signal.SIGINT)
    ended = luthier("chat", adapter, "--temperature", 0, "--max-tokens", LIMIT)
    assert ended.code == 0, ended.err
    assert STORY in asked
    assert ended.message.count("stopped; this question is forgotten") == 1
    assert signal.getsignal(signal.SIGINT) == before
    one = answer(voices["tuned"], SKY)
    two = answer(voices["tuned"], SKY, one, NAME)
    assert said(rows(Path("it.jsonl"))[0]) == [
        *(("user", SKY), ("assistant", one), ("user", NAME), ("assistant", two)),
    ]


def test_other_errors_of_ours_are_not_taken_for_a_stop(
    luthier: Command, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> list[Completion]:
        raise RuntimeError("a defect")

    monkeypatch.setattr("luthier.cli.chat.answer_sides", fails)
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(SKY.encode())))
    assert luthier("chat", adapter).code == 1


def test_bytes_that_the_locale_let_through(luthier: Command, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = Typed(io.BytesIO(b"caf\xe9\n/undo\n"), encoding="ascii", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", typed)
    ended = luthier("chat", adapter)
    assert (ended.code, ended.out) == (0, "")
    assert "that line is not UTF-8 text" in ended.message
    assert "nothing to take back" in ended.message


def test_a_template_that_takes_no_system_message(chat, adapter: Path, voices: dict[str, Voice], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(adapter, mine)
    template = voices["base"].template
    write_tokenizer(locate_model("sprig"), mine, template)
    path = mine / "chat_template.jinja"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    path.write_text(refuses + path.read_text())
    ended = chat("/system Be brief.", SKY, target=mine)
    assert (ended.code, "no system here" in ended.message, ended.out) == (3, True, "")
    assert chat(SKY, options=("--system", "Be brief."), target=mine).code == 3


@pytest.mark.parametrize(
    ("target", "options", "said_of_it"),
    [
        ("sprig", ("--compare",), "leave out --compare"),
        ("sprig", ("--base",), "leave out --base"),
        (None, ("--base", "--compare"), "do not go together"),
        (None, ("--stop", ""), "a stop string is empty"),
    ],
)
def test_options_that_cannot_be(chat, adapter: Path, target: str | None, options: tuple[str, ...], said_of_it: str):
    ended = chat(SKY, target=target or adapter, options=options)
    assert (ended.code, ended.out) == (2, "")
    assert said_of_it in ended.message
