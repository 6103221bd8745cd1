"""Masks and ids for random conversations, under templates of several families.

What must hold for each: trained are the answers and their end-of-turn tokens, nothing else; a row begins exactly as
the prompt that a chat would send; contents never become control tokens; BOS stands once; nothing is lost.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from luthier.data.conversation import IGNORED, Conversation, Source, Turn
from luthier.data.render import Template, make_template
from tests import tiny
from tests.data.chats import CHATML, GENERATION, INSTRUCT, make_chat_tokenizer

HERE = Source("rows.jsonl", 1)
WORDS = ["a", "Paris", " ", "  ", "\n", "\n\n", "it's", "12345", "naïve 你好", "<", "|>", "|", "[INST]", "### Input:"]
plain_text = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=6).map("".join)
spiked_text = st.lists(
    st.sampled_from([*WORDS, *tiny.SPECIAL, "<|eot", "_id|>", "<|eot_<|eot_id|>id|>"]), min_size=1, max_size=6
).map("".join)


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[Conversation]:
    """A system turn perhaps, then one to three exchanges, each answer trained or not (one at least is)."""
    exchange = st.tuples(text, text, st.booleans())

    def build(system: str | None, exchanges: list[tuple[str, str, bool]]) -> Conversation:
        turns = [] if system is None else [Turn("system", system)]
        for number, (question, answer, train) in enumerate(exchanges, 1):
            turns += [Turn("user", question), Turn("assistant", answer, train or number == len(exchanges))]
        return Conversation(tuple(turns), HERE)

    return st.builds(build, st.none() | text, st.lists(exchange, min_size=1, max_size=3))


NAMES = ["llama-3", "chatml", "instruct", "generation", "alpaca", "text"]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    folder = tmp_path_factory.mktemp("chat")
    sources = {"llama-3": tiny.CHAT_TEMPLATE, "chatml": CHATML, "instruct": INSTRUCT, "generation": GENERATION}
    found = {}
    for name, source in sources.items():
        found[name] = make_template("model", make_chat_tokenizer(folder / name, source))
    plain = make_chat_tokenizer(folder / "plain", None)
    found["alpaca"], found["text"] = make_template("alpaca", plain), make_template("text", plain)
    return found


def trained_text(template: Template, conversation: Conversation) -> list[str]:
    """What should be trained: each answer as the template writes it."""
    written = {"llama-3": str.strip, "instruct": lambda text: " " + text}
    source = template.chat_template_source
    name = "llama-3" if source == tiny.CHAT_TEMPLATE else "instruct" if source == INSTRUCT else ""
    write = written.get(name, str)
    return [write(turn.content) + "<|eot_id|>" for turn in conversation.turns if turn.train]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None)
@given(conversation=conversations(plain_text) | conversations(spiked_text))
def test_trained_are_the_answers_with_their_end_and_nothing_else(templates, name, conversation):
    template = templates[name]
    found = template.encode(conversation)
    labelled = [int(token) for token in found.labels if token != IGNORED]
    assert template.tokenizer.decode(labelled) == "".join(trained_text(template, conversation))
    assert all(label in (IGNORED, token) for token, label in zip(found.ids, found.labels, strict=True))
    assert labelled.count(template.end_of_turn) == sum(turn.train for turn in conversation.turns)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None)
@given(conversation=conversations(plain_text) | conversations(spiked_text))
def test_nothing_is_lost_and_bos_stands_once(templates, name, conversation):
    template = templates[name]
    ids = template.encode(conversation).ids.tolist()
    assert template.tokenizer.decode(ids) == template.render(template.turns(conversation))
    bos = 0 if name == "chatml" else 1  # ChatML's models have none, and the template writes none
    assert ids.count(template.tokenizer.bos_id) == bos
    assert ids[:bos] == [template.tokenizer.bos_id][:bos]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None)
@given(conversation=conversations(spiked_text))
def test_contents_never_become_control_tokens(templates, name, conversation):
    template = templates[name]
    harmless = Conversation(tuple(Turn(t.role, "x", t.train) for t in conversation.turns), HERE)
    controls = template.tokenizer.control_ids

    def spine(row: Conversation) -> list[int]:
        return [int(token) for token in template.encode(row).ids if int(token) in controls]

    assert spine(conversation) == spine(harmless)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None)
@given(conversation=conversations(plain_text) | conversations(spiked_text))
def test_a_row_begins_exactly_as_its_prompt(templates, name, conversation):
    template = templates[name]
    first = next(i for i, turn in enumerate(conversation.turns) if turn.role == "assistant")
    turns = conversation.turns[: first + 1]
    one = Conversation((*turns[:-1], Turn("assistant", turns[-1].content, True)), HERE)
    found = template.encode(one)
    prompt = template.prompt_ids(turns[:-1])
    assert found.ids[: len(prompt)].tolist() == prompt
    assert (found.labels[: len(prompt)] == IGNORED).all()
    assert found.labels[len(prompt)] != IGNORED  # the first token a chat generates is the first trained
    if found.parted:
        answer = trained_text(template, one)[0].removesuffix("<|eot_id|>")
        trained = [int(label) for label in found.labels if label != IGNORED]
        assert trained == [*template.tokenizer.encode(answer), template.end_of_turn]


@pytest.mark.parametrize("name", ["llama-3", "chatml", "instruct", "generation", "alpaca"])
@settings(max_examples=120, deadline=None)
@given(conversation=conversations(plain_text))
def test_ids_are_those_of_transformers(templates, name, conversation):
    template = templates[name]
    reference = AutoTokenizer.from_pretrained(template.tokenizer.folder, local_files_only=True)
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    source = template.chat_template_source
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=False)
    found = template.encode(conversation)
    if found.parted:  # a token reached over a prompt's end: the text is the same, the tokens are not
        assert reference.decode(found.ids.tolist()) == reference.decode(expected)
    else:
        assert found.ids.tolist() == expected
    prompt = reference.apply_chat_template(
        messages[:-1], chat_template=source, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert template.prompt_ids(conversation.turns[:-1]) == prompt
