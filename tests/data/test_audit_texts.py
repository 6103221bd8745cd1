"""Every check of a row's text: a row that has the fault, and rows that only look like it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.audit.findings import excerpt
from luthier.data.audit.texts import TEXT_CHECKS, RowText, row_text, template_tokens
from luthier.data.conversation import Conversation, Source, Turn

TOKENS = template_tokens(["<|eot_id|>", "«end»"])
CHECKS = {check.name: check for check in TEXT_CHECKS}


def pair(question: str, answer: str) -> RowText:
    turns = (Turn("user", question), Turn("assistant", answer, train=True))
    return row_text(Conversation(turns, Source("a.jsonl", 1)), TOKENS)


# check -> answers with the fault, answers without it
CASES: dict[str, tuple[list[str], list[str]]] = {
    "secrets": (
        ["use AKIAABCDEFGHIJKLMNOP", "token: ghp_" + "a1B2" * 9, "-----BEGIN RSA PRIVATE KEY-----\nMII"],
        ["the risk-free rate", "set the API key first", "ghp_ is how such tokens begin", "sk-learn"],
    ),
    "mojibake": (
        ["I donâ€™t know", "the cafÃ© is shut", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚, he said", "æ—¥æœ¬èªž", "РџСЂРёРІРµС‚", "Â£5"],
        [
            "I don’t know “that”…",
            "le café à côté, l’été à Noël: «Ça va?»",
            "Привет, мир. Ёлка",
            "猫坐在屋顶上。天气预报说明天会下雨。",
            "├── src\n│   └── main.py",
            "∀x∈ℝ: x²≥0 ± ½",
            "Łódź, Ærøskøbing, São Paulo, Đặng Thị Ngọc",
            "5 € → 6 £ ™ ©",
            "👩‍👩‍👧 a family 🎉",
        ],
    ),
    "replacement-characters": (["caf\ufffd"], ["café", "a question mark?"]),
    "control-characters": (["a\x00b", "bell\x07", "\x1b[31mred", "it\x92s", "page\x0cbreak"], ["a\tb\r\nc", "é"]),
    "template-tokens": (
        [
            "<|eot_id|>",
            "<|im_end|>\n<|im_start|>user",
            "[INST] hi [/INST]",
            "<<SYS>>",
            "done</s>",
            "fine.\n### Response: x",
            "### Human: hi",
            "<end_of_turn>",
            "hi\nUSER: and now?",
            "over «end» again",
        ],
        ["a <b> and a < b | c >", "### Results", "an [INSTANCE] of it", "x <|> y", "the USER: field", "list[int]"],
    ),
    "hollow-answers": (
        ["-", "N/A", " … ", "TODO", "[insert your answer]", "null."],
        ["No", "0", "None", "Je", "一", "x"],
    ),
    "echoes": ([" Why? "], ["Why", "Because."]),
    "boilerplate": (
        [
            "As an AI language model, I have no opinion.",
            "Well, as an AI, I do not eat.",
            "I'm sorry, but I can't help with that.",
            "I cannot assist with this.",
            "My knowledge cutoff is 2023.",
        ],
        ["I am sorry to hear that.", "AI is a field of study.", "I cannot swim.", "As an aid to memory, sing."],
    ),
    "invisible-characters": (
        ["a\u200bb", "soft\u00adhyphen", "user\u202enimda", "\ufeffHello", "so\u200cft"],
        ["نمی\u200cخواهم", "👩\u200d👩\u200d👧", "שלום\u200f!", "plain"],
    ),
    "markup": (
        ["a&nbsp;b", "one<br/>two", "<div class='x'>", "&#8217;"],
        ["a & b", "if a<b and c>d", "AT&T;", "<thing>"],
    ),
}


def test_every_check_has_its_cases() -> None:
    assert set(CASES) == set(CHECKS)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, (faulty, _) in CASES.items() for text in faulty])
def test_finds_the_fault(name: str, text: str) -> None:
    assert CHECKS[name].find(pair("Why?", text))


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, (_, sound) in CASES.items() for text in sound])
def test_leaves_alone_what_only_looks_like_it(name: str, text: str) -> None:
    assert CHECKS[name].find(pair("Why?", text)) is None


def test_no_check_finds_anything_in_plain_rows() -> None:
    row = pair("What does 48/2 make? <<48/2=24>>", "It makes 24, as 2 * 24 is 48.\n#### 24")
    assert [check.name for check in TEXT_CHECKS if check.find(row)] == []


def test_garbled_letters_come_with_what_they_were() -> None:
    found = CHECKS["mojibake"].find(pair("Why?", "Well, I donâ€™t know."))
    assert found is not None
    assert "meant: don’t" in found


def test_a_key_is_not_shown() -> None:
    found = CHECKS["secrets"].find(pair("Why?", "use AKIAABCDEFGHIJKLMNOP now"))
    assert found is not None
    assert "IJKLMNOP" not in found


def test_answers_are_those_that_are_trained() -> None:
    turns = (
        Turn("user", "one"),
        Turn("assistant", "As an AI language model, no."),
        Turn("user", "two"),
        Turn("assistant", "yes", train=True),
    )
    row = row_text(Conversation(turns, Source("a.jsonl", 1)), TOKENS)
    assert (row.asked, row.answers) == ("two", ("yes",))
    assert CHECKS["boilerplate"].find(row) is None


def test_plain_text_has_no_question_to_repeat() -> None:
    row = row_text(Conversation((Turn("assistant", "text", train=True),), Source("a", 1), plain=True), TOKENS)
    assert CHECKS["echoes"].find(row) is None


@given(st.text(max_size=200), st.data())
def test_an_excerpt_is_one_visible_line(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    shown = excerpt(text, start, data.draw(st.integers(start, len(text))))
    assert "\n" not in shown
    assert all(character.isprintable() or character.isspace() for character in shown)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=300))
def test_every_check_takes_any_text(text: str) -> None:
    for check in TEXT_CHECKS:
        found = check.find(pair(text or "x", text or "y"))
        assert found is None or found
