"""The Modelfile: its Go template, read by an interpreter of Go's language, writes what the trained template writes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.conversation import Turn
from luthier.data.render import Template, make_template
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import ExportError
from luthier.export.gguf import GGUFFile
from luthier.export.go_template import derive_pieces, go_source
from luthier.export.ollama import OllamaExport, OllamaSettings, export_ollama, model_name, modelfile
from tests import tiny
from tests.export import go

BOS = tiny.SPECIAL[0]
END = tiny.SPECIAL[5]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}<|eot_id|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (  # writes a system message of its own where there is none, as Qwen2.5's does
    "{% if messages[0]['role'] != 'system' %}[SYS]You are kind.[/SYS]{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}[SYS]{{ message['content'] }}[/SYS]"
    "{% else %}[{{ message['role'] }}]{{ message['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
IN_FIRST_USER = (  # the system message inside the first user's turn, as in Llama 2 and Mistral
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '<|eot_id|>' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system messages') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
COUNTING = (  # numbers its turns: no fixed pieces
    "{% for message in messages %}{{ loop.index }}. {{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
TWICE = (
    "{% for message in messages %}{{ message['content'] }}{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
BY_CONTENT = (  # the same pieces for stand-ins, others for a question
    "{% for message in messages %}{{ 'Q' if '?' in message['content'] else 'S' }}: {{ message['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
SOURCES = {
    "llama3": tiny.CHAT_TEMPLATE,
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "system in the first user's turn": IN_FIRST_USER,
    "no system": NO_SYSTEM,
}
NAMES = [*SOURCES, "alpaca", "text", 'Q: "{question}" {{1}}\nA: {answer}']


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_llama)


def template_for(name: str, tokenizer: ChatTokenizer) -> Template:
    if name in SOURCES:
        tokenizer.chat_template = SOURCES[name]
        name = "model"
    return make_template(name, tokenizer)


# Contents without white space at their ends, which templates may trim, and without Alpaca's marker.
CONTENT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).map(str.strip).filter(bool)
CHATS = st.lists(CONTENT, min_size=1, max_size=7).filter(lambda texts: len(texts) % 2 == 1)


@pytest.mark.parametrize("name", NAMES)
def test_go_writes_what_jinja_writes(name: str, tokenizer: ChatTokenizer) -> None:
    template = template_for(name, tokenizer)
    pieces = derive_pieces(template)
    assert (pieces.before is None) == (name == "no system")
    source = go_source(pieces, "")
    without_bos = go_source(pieces, BOS)

    @settings(max_examples=40, deadline=None)
    @given(texts=CHATS, system=st.none() | CONTENT)
    def check(texts: list[str], system: str | None) -> None:
        turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
        if system is not None and pieces.before is not None:
            turns.insert(0, Turn("system", system))
        wanted = template.render(turns, generation_prompt=True)
        assert go.render(source, turns) == pieces.render(turns) == wanted
        assert go.render(without_bos, turns) == wanted.removeprefix(BOS)

    check()


@pytest.mark.parametrize(
    ("source", "why"), [(COUNTING, "opens"), (TWICE, "2 times"), (BY_CONTENT, "sample conversation")]
)
def test_what_has_no_fixed_pieces_is_refused(source: str, why: str, tokenizer: ChatTokenizer) -> None:
    tokenizer.chat_template = source
    with pytest.raises(ExportError, match=why) as caught:
        derive_pieces(make_template("model", tokenizer))
    assert caught.value.remedy
    assert caught.value.exit_code == 6


def field(text: str, name: str) -> list[str]:
    """The values of a Modelfile's instruction, read by its rules: bare, quoted, or in triple quotes."""
    found = re.findall(rf'^{name} (?:"""(.*?)"""|"([^"\n]*)"|([^"\n]+))$', text, re.MULTILINE | re.DOTALL)
    return ["".join(parts) for parts in found]


def test_the_modelfile(tokenizer: ChatTokenizer) -> None:
    template = template_for("llama3", tokenizer)
    system = 'You are "kind".\nAlways.'
    text, notes = modelfile(template, 512, OllamaSettings(temperature=0.25, top_p=0.8, system=system))
    assert field(text, "FROM") == ["./model.gguf"]
    assert field(text, "PARAMETER stop") == list(template.stop_strings)
    assert field(text, "PARAMETER temperature") == ["0.25"]
    assert field(text, "PARAMETER top_p") == ["0.8"]
    assert field(text, "PARAMETER num_ctx") == ["512"]
    assert field(text, "SYSTEM") == [system]
    turns = [Turn("user", "Hello?"), Turn("assistant", "Yes."), Turn("user", "Why?")]
    wanted = template.render(turns, generation_prompt=True).removeprefix(BOS)
    assert go.render(field(text, "TEMPLATE")[0], turns) == wanted
    assert any("trims" in note for note in notes)


def test_what_a_modelfile_cannot_say(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ExportError, match="no system message"):
        modelfile(template_for("no system", tokenizer), 512, OllamaSettings(system="Be kind."))
    with pytest.raises(ExportError, match="three double quotes"):
        modelfile(template_for("llama3", tokenizer), 512, OllamaSettings(system='say """'))


def test_the_folder(tiny_llama: Path, tmp_path: Path) -> None:
    done = export_ollama(tiny_llama, tmp_path / "exports" / "ollama", quantize="q8_0")
    assert sorted(path.name for path in done.folder.iterdir()) == ["Modelfile", "model.gguf"]
    assert done.gguf.path.stat().st_size == done.gguf.size
    assert done.gguf.kept_f16
    assert done.command.startswith("ollama create ")
    reader = gguf.GGUFReader(done.gguf.path)
    # The file puts the beginning-of-text token, so the template must not.
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert BOS not in (done.folder / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("parrot", "parrot"),
        ("My Runs (2)", "my-runs-2"),
        ("Café_1.5", "cafe_1.5"),
        ("..hidden", "hidden"),
        ("日本", "luthier-model"),
        ("a/b:c", "a-b-c"),
        ("x" * 99 + "!", "x" * 80),
    ],
)
def test_the_name_is_one_that_ollama_takes(run: str, name: str) -> None:
    assert model_name(run) == name
    assert re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,79}", name)


def test_the_command_is_one_for_a_shell() -> None:
    folder = Path("/tmp/My Runs/Parrot's 1st/exports/ollama")
    words = shlex.split(OllamaExport(folder, GGUFFile(folder, 0, "f16", 0, (), ()), ()).command)
    assert words == ["ollama", "create", "parrot-s-1st", "-f", str(folder / "Modelfile")]


def test_a_refusal_leaves_nothing(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "hf")
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(COUNTING)
    with pytest.raises(ExportError):
        export_ollama(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
