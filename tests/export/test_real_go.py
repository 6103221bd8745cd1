"""Modelfile templates in Go's own text/template: 200 random conversations each, byte for byte what jinja writes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from luthier.data.conversation import Turn
from luthier.data.render import Template, make_template
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.export.go_template import derive_pieces, go_source
from luthier.export.ollama import OllamaSettings, modelfile
from tests import tiny
from tests.export import go, real_go
from tests.export.test_ollama import DEFAULT_SYSTEM, IN_FIRST_USER, NO_SYSTEM, field

BOS = tiny.SPECIAL[0]
KNOWN = ("llama3", "chatml", "mistral", "alpaca", "human-assistant", "text")

DATED = (  # the shape of Llama 3.1's and later: a system turn always, with the day in it; contents trimmed
    "{{ bos_token }}{% set day = strftime_now('%d %b %Y') %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ day }}\n\n{{ system }}<|eot_id|>"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
REASONING = (  # the shape of Qwen3's: earlier answers without their reasoning
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "[{{ message['role'] }}]\n{{ content }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
STRIPPED = (  # the shape of Llama 2's: what is said is stripped, the system message too
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'].strip() + "
    "'\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].rstrip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].lstrip() + '<|eot_id|>' }}{% endif %}{% endfor %}"
)
SOURCES = {
    "model, Llama 3's": tiny.CHAT_TEMPLATE,
    "model, dated": DATED,
    "model, reasoning": REASONING,
    "model, stripped": STRIPPED,
    "model, default system": DEFAULT_SYSTEM,
    "model, in the first user's turn": IN_FIRST_USER,
    "model, no system": NO_SYSTEM,
}
NAMES = (*KNOWN, *SOURCES, 'Q: "{question}" {{1}}\nA: {answer}')

PIECES = (
    *("Hello", "why?", "a\tb", " ", "  ", "\n", "\n\n", "\r\n", "\u2003", "\u00a0", "\u3000", "\x1c", "\x85"),
    *("naïve", "你好", "🦙👩‍👩‍👧", "ก็", "\ufeff", "\u200b", "{{ .Content }}", "{% if %}", "}}", '"', '"""', "\\n", "`"),
    *("\n\n### Input:\n", "### Input:", "<think>", "</think>", "</think>\n\n", "<|eot_id|>", "[INST]", "x = {1: [2]}"),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_go.build(tmp_path_factory.mktemp("go"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = tiny.make_tokenizer()
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


def template_for(name: str, tokenizer: ChatTokenizer) -> Template:
    if name in SOURCES:
        tokenizer.chat_template = SOURCES[name]
        name = "model"
    return make_template(name, tokenizer)


def conversations(seed: str, system: bool, count: int = 200) -> list[list[Turn]]:
    """Random ones of one to four questions; half of them begin with a system message, where the template takes one."""
    drawn = random.Random(seed)

    def content() -> str:
        return "".join(drawn.choices(PIECES, k=drawn.randint(1, 8))) or "."

    found: list[list[Turn]] = []
    for _ in range(count):
        turns = [Turn("assistant" if i % 2 else "user", content()) for i in range(drawn.choice((1, 3, 5, 7)))]
        if system and drawn.random() < 0.5:
            turns.insert(0, Turn("system", content()))
        found.append(turns)
    return found


def first_difference(wanted: Sequence[str], found: Sequence[str]) -> str:
    return next(f"{one!r}\n{other!r}" for one, other in zip(wanted, found, strict=True) if one != other)


@pytest.mark.parametrize("name", NAMES)
def test_go_itself_writes_what_jinja_writes(name: str, tokenizer: ChatTokenizer, program: Path) -> None:
    template = template_for(name, tokenizer)
    pieces = derive_pieces(template)
    asked = conversations(name, pieces.before is not None)
    wanted = [template.render(turns, generation_prompt=True) for turns in asked]
    for bos in ("", BOS):
        source = go_source(pieces, bos)
        assert '"""' not in source
        found = real_go.render(program, source, asked)
        without = [text.removeprefix(bos) for text in wanted]
        assert found == without, first_difference(without, found)
    # And the reader that the other tests use reads as Go does.
    assert [go.render(go_source(pieces, ""), turns) for turns in asked[:10]] == wanted[:10]


def test_a_long_message(tokenizer: ChatTokenizer, program: Path) -> None:
    """Templates that call themselves for each byte: 60,000 bytes of content are still written right."""
    for name in ("alpaca", "model, reasoning", "model, dated"):
        template = template_for(name, tokenizer)
        turns = [Turn("user", "é " * 20_000), Turn("assistant", "word " * 12_000), Turn("user", "Go on.")]
        (found,) = real_go.render(program, go_source(derive_pieces(template), ""), [turns])
        assert found == template.render(turns, generation_prompt=True)


def test_the_template_of_a_modelfile(tokenizer: ChatTokenizer, program: Path) -> None:
    template = template_for("alpaca", tokenizer)
    text, _ = modelfile(template, 512, OllamaSettings(system="Be kind."))
    turns = [Turn("system", "Be kind."), Turn("user", "Add.\n\n### Input:\n1 2")]
    (found,) = real_go.render(program, field(text, "TEMPLATE")[0], [turns])
    assert found == template.render(turns, generation_prompt=True).removeprefix(BOS)
