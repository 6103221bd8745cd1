"""Masks and ids for random conversations, under every template of ours and those of nine model families.

What must be trained is said by formats written by hand (tests/data/families.py), never by the code under test. It must
hold: trained are the answers with their end of turn and nothing else; nothing is lost; contents never become control
tokens; BOS stands at most once; a row begins exactly as the prompt that a chat would send; a row's encoding does not
depend on the rows beside it; and where a template rewrites what it has written, the row is refused by turn.

Each property has a quick tier, and one of a thousand examples that is marked slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from luthier.data.conversation import Conversation, Source, Turn
from luthier.data.labels import EncodedChunk
from luthier.data.render import Template, make_template
from tests.data.families import BUNDLED, FAMILIES, Piece, tokenizer_of

HERE = Source("rows.jsonl", 1)
EVERY = FAMILIES | {f"our {name}": family for name, family in BUNDLED.items()}
CONTROLS = sorted({token for family in EVERY.values() for token in family.controls})
BROKEN = [
    "<|eot",
    "_id|>",
    "<|eot_<|eot_id|>id|>",
    "<",
    "|>",
    "</",
    "s>",
    "<s",
    "[INST",
    "INST]",
    "<start_of_<bos>turn>",
]
WORDS = [
    "a",
    "Paris",
    " ",
    "  ",
    "\n",
    "\n\n",
    "it's",
    "12345",
    "naïve 你好",
    "|",
    "### Input:",
    "\n\n### Input:\n",
    "🦙",
]
plain_text = st.lists(
    st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=6
).map("".join)
spiked_text = st.lists(st.sampled_from([*WORDS, *CONTROLS, *BROKEN]), min_size=1, max_size=6).map("".join)


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[Conversation]:
    """A system turn perhaps, then one to three exchanges, each answer trained or not (one at least is)."""
    exchange = st.tuples(text, text, st.booleans())

    def build(system: str | None, exchanges: list[tuple[str, str, bool]], sure: int) -> Conversation:
        turns = [] if system is None else [Turn("system", system)]
        for number, (question, answer, train) in enumerate(exchanges):
            turns += [Turn("user", question), Turn("assistant", answer, train or number == sure % len(exchanges))]
        return Conversation(tuple(turns), HERE)

    return st.builds(build, st.none() | text, st.lists(exchange, min_size=1, max_size=3), st.integers(0, 2))


any_conversation = conversations(plain_text) | conversations(spiked_text)


@dataclass(frozen=True)
class Case:
    """A template, the same format by hand, and what it must refuse."""

    template: Template
    write: Callable[[Conversation], list[Piece]]
    refusal: Callable[[Conversation], str | None]

    def usable(self, conversation: Conversation) -> Conversation:
        """The conversation, or its last exchange where the template must refuse it."""
        if self.refusal(conversation) is None:
            return conversation
        question, answer = conversation.turns[-2:]
        return Conversation((question, Turn("assistant", answer.content, True)), HERE)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("families")
    found = {}
    for name, family in EVERY.items():
        template = make_template(family.template, tokenizer_of(family, folder / name))
        found[name] = Case(template, family.write, family.refusal)
    return found


everywhere = pytest.mark.parametrize("name", EVERY)
both_tiers = pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.slow)])


def pieces(case: Case, conversation: Conversation) -> list[Piece]:
    """What is written, by hand: neighbours that are trained alike as one."""
    runs = groupby((piece for piece in case.write(conversation) if piece[0]), key=lambda piece: piece[1])
    return [("".join(text for text, _ in run), trained) for trained, run in runs]


def spoken(case: Case, chunk: EncodedChunk) -> list[Piece]:
    """What the tokens of a row say, cut where the labels change."""
    runs = groupby(zip(chunk.ids.tolist(), chunk.labels.tolist(), strict=True), key=lambda pair: pair[1])
    return [(case.template.tokenizer.decode([token for token, _ in run]), trained) for trained, run in runs]


def encode(case: Case, conversation: Conversation) -> EncodedChunk:
    found = case.template.encode_chunk([conversation])
    assert not found.faults, found.faults
    assert found.lengths.tolist() == [len(found.ids)] == [len(found.labels)]
    return found


@everywhere
@both_tiers
def test_trained_are_the_answers_with_their_end_and_nothing_else(cases: dict[str, Case], name: str, examples: int):
    case = cases[name]

    @settings(max_examples=examples, deadline=None)
    @given(any_conversation)
    def check(conversation: Conversation) -> None:
        conversation = case.usable(conversation)
        found = encode(case, conversation)
        assert spoken(case, found) == pieces(case, conversation)
        # Each answer ends with the end-of-turn token itself, whatever pads.
        ends = np.flatnonzero(found.labels & ~np.append(found.labels[1:], False))
        assert (found.ids[ends] == case.template.end_of_turn).all()
        assert int((found.ids[found.labels] == case.template.end_of_turn).sum()) == sum(
            turn.train for turn in conversation.turns
        )

    check()


@everywhere
@both_tiers
def test_ids_are_those_of_the_library_and_the_mask_is_that_of_its_offsets(
    cases: dict[str, Case], name: str, examples: int
):
    case = cases[name]
    tokenizer = case.template.tokenizer
    reference = AutoTokenizer.from_pretrained(tokenizer.folder, local_files_only=True)

    @settings(max_examples=examples, deadline=None)
    @given(conversations(plain_text))
    def check(conversation: Conversation) -> None:
        conversation = case.usable(conversation)
        found = encode(case, conversation)
        written = pieces(case, conversation)
        text = "".join(part for part, _ in written)
        expected = reference(text, add_special_tokens=False, return_offsets_mapping=True)
        if not found.parted[0]:  # else a token reaches over a prompt's end: the text is the same, the tokens are not
            trained = [flag for part, flag in written for _ in part]
            assert found.ids.tolist() == expected["input_ids"]
            assert found.labels.tolist() == [trained[start] for start, _ in expected["offset_mapping"]]
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        given = {"chat_template": case.template.chat_template_source, "date_string": "26 Jul 2024", "tokenize": False}
        assert reference.apply_chat_template(messages, **given) == text

    check()


@everywhere
@both_tiers
def test_contents_never_become_control_tokens_and_bos_stands_once(cases: dict[str, Case], name: str, examples: int):
    case = cases[name]
    tokenizer = case.template.tokenizer

    def spine(conversation: Conversation) -> list[int]:
        return [token for token in encode(case, conversation).ids.tolist() if token in tokenizer.control_ids]

    @settings(max_examples=examples, deadline=None)
    @given(conversations(spiked_text))
    def check(conversation: Conversation) -> None:
        conversation = case.usable(conversation)
        harmless = Conversation(tuple(Turn(t.role, "x", t.train) for t in conversation.turns), HERE)
        found = spine(conversation)
        assert found == spine(harmless)
        text = "".join(part for part, _ in pieces(case, harmless))
        bos = tokenizer.special.get("bos_token")
        written = isinstance(bos, str) and text.startswith(bos)
        assert found.count(tokenizer.bos_id) == int(written)
        assert not written or encode(case, conversation).ids[0] == tokenizer.bos_id

    check()


@everywhere
@both_tiers
def test_a_row_begins_exactly_as_its_prompt(cases: dict[str, Case], name: str, examples: int):
    case = cases[name]

    @settings(max_examples=examples, deadline=None)
    @given(any_conversation)
    def check(conversation: Conversation) -> None:
        conversation = case.usable(conversation)
        first = next(i for i, turn in enumerate(conversation.turns) if turn.role == "assistant")
        turns = conversation.turns[:first]
        one = Conversation((*turns, Turn("assistant", conversation.turns[first].content, True)), HERE)
        found = encode(case, one)
        prompt = case.template.prompt_ids(turns)
        assert found.ids[: len(prompt)].tolist() == prompt == case.template.prompt_ids_of(one)
        assert not found.labels[: len(prompt)].any()
        assert found.labels[len(prompt)]  # the first token a chat generates is the first trained

    check()


@everywhere
@both_tiers
def test_what_is_trained_follows_train_on(cases: dict[str, Case], name: str, examples: int):
    case = cases[name]
    of = case.template
    whole = make_template(of.name, of.tokenizer, "all")
    only_last = make_template(of.name, of.tokenizer, "last")
    last_case = Case(only_last, case.write, case.refusal)

    @settings(max_examples=examples, deadline=None)
    @given(any_conversation)
    def check(conversation: Conversation) -> None:
        trained = [i for i, turn in enumerate(conversation.turns) if turn.train]
        flags = [turn._replace(train=i == trained[-1]) for i, turn in enumerate(conversation.turns)]
        one = Conversation(tuple(flags), HERE)
        if case.refusal(one) is None:
            assert spoken(last_case, encode(last_case, conversation)) == pieces(case, one)
        conversation = case.usable(conversation)
        found = encode(Case(whole, case.write, case.refusal), conversation)
        assert found.labels.all()
        assert whole.tokenizer.decode(found.ids.tolist()) == "".join(text for text, _ in pieces(case, conversation))

    check()


@pytest.mark.parametrize("name", ["llama-2", "mistral-v3", "qwen-3", "gemma"])
@both_tiers
def test_what_cannot_be_trained_is_refused_by_turn(cases: dict[str, Case], name: str, examples: int):
    case = cases[name]

    @settings(max_examples=examples, deadline=None)
    @given(conversations(plain_text))
    def check(conversation: Conversation) -> None:
        expected = case.refusal(conversation)
        found = case.template.encode_chunk([conversation])
        if expected is None:
            assert not found.faults
        else:
            assert expected in found.faults[0].reason
            assert found.faults[0].remedy
            assert found.lengths.tolist() == [0] == [len(found.ids)]

    check()


@everywhere
@both_tiers
def test_a_row_does_not_depend_on_its_chunk(cases: dict[str, Case], name: str, examples: int):
    case = cases[name]

    @settings(max_examples=max(20, examples // 5) if examples < 1000 else examples, deadline=None)
    @given(st.lists(any_conversation, max_size=5))
    def check(rows: list[Conversation]) -> None:
        chunk = case.template.encode_chunk(rows)
        at = 0
        for i, row in enumerate(rows):
            alone = case.template.encode_chunk([row])
            end = at + int(chunk.lengths[i])
            assert chunk.ids[at:end].tolist() == alone.ids.tolist()
            assert chunk.labels[at:end].tolist() == alone.labels.tolist()
            assert chunk.parted[i] == alone.parted[0]
            assert chunk.faults.get(i) == alone.faults.get(0)
            at = end
        assert at == len(chunk.ids) == len(chunk.labels)

    check()
