"""The templates that a recipe can name: which there are, what they need of a tokenizer, and the same for Ollama."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.data.conversation import Conversation, Source, Turn
from luthier.data.render import Template, make_template
from luthier.data.templates import TEMPLATES
from luthier.errors import DataError
from luthier.export.go_template import derive_pieces, go_source
from luthier.recipe.schema import NAMED_TEMPLATES
from tests.data.families import BUNDLED, make_tokenizer, tokenizer_of
from tests.export import go

HERE = Source("rows.jsonl", 7)
PLAIN = ("<unk>", "<s>", "</s>")


def test_the_names_are_those_that_a_recipe_may_say() -> None:
    assert set(TEMPLATES) == {*NAMED_TEMPLATES, "text"}


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("llama3", "no <|start_header_id|> and no <|end_header_id|> and no <|eot_id|>"),
        ("chatml", "no <|im_start|> and no <|im_end|>"),
    ],
)
def test_a_template_whose_tokens_the_tokenizer_lacks(tmp_path: Path, name: str, missing: str) -> None:
    tokenizer = make_tokenizer(tmp_path / "base", PLAIN, "<s>", "</s>")
    with pytest.raises(DataError) as caught:
        make_template(name, tokenizer)
    assert missing in caught.value.message
    assert f"`template: {name}`" in caught.value.message
    assert "`template: alpaca`" in str(caught.value.remedy)
    instruct = make_tokenizer(tmp_path / "chat", PLAIN, "<s>", "</s>", template="{{ messages }}")
    with pytest.raises(DataError) as caught:
        make_template(name, instruct)
    assert "`template: model`" in str(caught.value.remedy)
    half = make_tokenizer(tmp_path / "half", ("<|im_start|>", "<|eot_id|>", *PLAIN), "<s>", "</s>")
    with pytest.raises(DataError, match=r"has no <\|im_end\|>$"):
        make_template("chatml", half)


@pytest.mark.parametrize("name", ["alpaca", "mistral", "human-assistant", "text", "Q: {question}\nA: {answer}"])
def test_a_tokenizer_without_an_end_token(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="has no end token"):
        make_template(name, make_tokenizer(tmp_path, PLAIN, "<s>", None))


@pytest.mark.parametrize(
    ("name", "end"),
    [("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>"), ("mistral", "</s>"), ("human-assistant", "</s>")],
)
def test_each_ends_answers_with_its_own_token(tmp_path: Path, name: str, end: str) -> None:
    template = make_template(name, tokenizer_of(BUNDLED[name], tmp_path))
    assert template.tokenizer.token_text(template.end_of_turn) == end
    assert template.stop_strings[0] == end
    again = make_template(template.name, template.tokenizer)
    assert again.chat_template_source == template.chat_template_source
    assert again.fingerprint == template.fingerprint


def test_chatml_begins_with_bos_where_the_tokenizer_always_does(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from luthier.data.tokenizer import load_tokenizer

    controls = (*PLAIN, "<|im_start|>", "<|im_end|>")
    make_tokenizer(tmp_path, controls, "<s>", "</s>")
    fast = AutoTokenizer.from_pretrained(tmp_path)
    fast.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save_pretrained(tmp_path)
    template = make_template("chatml", load_tokenizer(tmp_path))
    row = Conversation((Turn("user", "q"), Turn("assistant", "a", True)), HERE)
    assert template.encode(row).ids.tolist()[:2] == [1, controls.index("<|im_start|>")]


@pytest.mark.parametrize("name", ["mistral", "human-assistant"])
def test_a_layout_without_a_place_for_tool_turns_says_so(tmp_path: Path, name: str) -> None:
    template = make_template(name, tokenizer_of(BUNDLED[name], tmp_path))
    turns = (Turn("user", "q"), Turn("tool", "t"), Turn("assistant", "a", True))
    found = template.encode_chunk([Conversation(turns, HERE)])
    assert f"template: {name} has no place for a turn of role tool" in found.faults[0].reason


def test_mistral_takes_a_system_turn_only_at_the_beginning(tmp_path: Path) -> None:
    template = make_template("mistral", tokenizer_of(BUNDLED["mistral"], tmp_path))
    turns = (Turn("user", "q"), Turn("assistant", "a", True), Turn("system", "s"))
    found = template.encode_chunk([Conversation(turns, HERE)])
    assert "only as the first turn" in found.faults[0].reason


def go_renders(template: Template, turns: list[Turn]) -> str:
    return go.render(go_source(derive_pieces(template), ""), turns)


@pytest.mark.parametrize("name", BUNDLED)
def test_ollama_writes_what_the_template_writes(tmp_path: Path, name: str) -> None:
    template = make_template(BUNDLED[name].template, tokenizer_of(BUNDLED[name], tmp_path))
    chat = [Turn("user", "Hello?"), Turn("assistant", "Yes."), Turn("user", "Why?\n\nSay!")]
    for turns in (chat, [Turn("system", "Be kind."), *chat]):
        assert go_renders(template, turns) == template.render(turns, generation_prompt=True)
