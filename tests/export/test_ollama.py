"""The Modelfile: its Go template, read by an interpreter of Go's language, writes what the trained template writes."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.conversation import Turn
from luthier.data.render import Template, make_template
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import ExportError
from luthier.export.gguf import About
from luthier.export.go_template import derive_pieces, go_source
from luthier.export.merge import write_tokenizer
from luthier.export.ollama import (
    OllamaSettings,
    create_line,
    export_ollama,
    export_ollama_adapter,
    install,
    model_name,
    modelfile,
)
from luthier.model.adapter import save_adapter
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora
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


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)
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
    assert field(text, "PARAMETER repeat_penalty") == ["1"]  # Ollama's own default is 1.1
    assert field(text, "PARAMETER top_k") == ["0"]
    turns = [Turn("user", "  Hello?\n"), Turn("assistant", "Yes."), Turn("user", "Why?")]
    wanted = template.render(turns, generation_prompt=True).removeprefix(BOS)
    assert go.render(field(text, "TEMPLATE")[0], turns) == wanted
    assert notes == ()


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
    assert create_line(done.folder).startswith("ollama create ")
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
    words = shlex.split(create_line(folder))
    assert words == ["ollama", "create", "parrot-s-1st", "-f", str(folder / "Modelfile")]


def test_licences_go_along(tokenizer: ChatTokenizer, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(tiny_llama, folder)
    named = export_ollama(folder, tmp_path / "named", about=About("run", "base", "apache-2.0"))
    assert field((named.folder / "Modelfile").read_text(), "LICENSE") == ["apache-2.0"]
    (folder / "LICENSE").write_text('You may "use" it.\nOnce.\n')
    (folder / "USE_POLICY.md").write_text("Be good.")
    both = export_ollama(folder, tmp_path / "both", about=About("run", "base", "apache-2.0"))
    assert field((both.folder / "Modelfile").read_text(), "LICENSE") == ['You may "use" it.\nOnce.\n', "Be good."]
    (folder / "LICENSE").write_text('a """ b')
    fewer = export_ollama(folder, tmp_path / "fewer")
    assert field((fewer.folder / "Modelfile").read_text(), "LICENSE") == ["Be good."]
    assert any("LICENSE holds three double quotes" in note for note in fewer.notes)


def test_base_and_adapter_apart(tiny_llama: Path, tmp_path: Path) -> None:
    """The adapter's folder says how it is asked: here by Alpaca's form, which is not the base's."""
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    add_lora(decoder, LoRASpec(2, 4.0, targets=("q_proj",)), seed=0)
    save_adapter(decoder, tmp_path / "adapter", base="somewhere")
    template = make_template("alpaca", load_tokenizer(tiny_llama))
    write_tokenizer(tiny_llama, tmp_path / "adapter", template)
    made = export_ollama_adapter(tiny_llama, tmp_path / "adapter", tmp_path / "run" / "exports" / "ollama-adapter")
    assert sorted(path.name for path in made.folder.iterdir()) == ["Modelfile", "adapter.gguf", "base.gguf"]
    text = (made.folder / "Modelfile").read_text()
    assert field(text, "FROM") == ["./base.gguf"]
    assert field(text, "ADAPTER") == ["./adapter.gguf"]
    turns = [Turn("user", "Add.\n\n### Input:\n1 2")]
    wanted = template.render(turns, generation_prompt=True).removeprefix(BOS)
    assert go.render(field(text, "TEMPLATE")[0], turns) == wanted
    fields = gguf.GGUFReader(made.folder / "adapter.gguf").fields
    assert fields["adapter.lora.alpha"].contents() == 4.0
    assert fields["general.type"].contents() == "adapter"
    assert create_line(made.folder).startswith("ollama create run ")


def stand_in(folder: Path, script: str) -> str:
    """A program called ollama, which cannot be installed here; the folder for PATH."""
    folder.mkdir()
    (folder / "ollama").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ollama").chmod(0o755)
    return str(folder)


def test_installing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = export_ollama(tiny_llama, tmp_path / "My run" / "exports" / "ollama")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ExportError, match="ollama is not on this machine") as caught:
        install(made.folder)
    assert create_line(made.folder) in str(caught.value.remedy)
    assert made.gguf.path.is_file()
    said = tmp_path / "said"
    monkeypatch.setenv("PATH", stand_in(tmp_path / "good", f"printf '%s\\n' \"$@\" > '{said}'"))
    assert install(made.folder) == "my-run"
    assert said.read_text().splitlines() == ["create", "my-run", "-f", str(made.folder / "Modelfile")]
    monkeypatch.setenv("PATH", stand_in(tmp_path / "bad", "echo 'could not connect to ollama' >&2; exit 1"))
    with pytest.raises(ExportError, match=r"exit code 1:\n  could not connect to ollama") as caught:
        install(made.folder)
    assert "ollama serve" in str(caught.value.remedy)


def test_a_context_beyond_the_models(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ExportError, match=r"1,024 tokens is more than the model has: 512") as caught:
        modelfile(template_for("llama3", tokenizer), 512, OllamaSettings(context=1024))
    assert "ollama.context" in str(caught.value.remedy)
    text, _ = modelfile(template_for("llama3", tokenizer), 512, OllamaSettings(context=256, min_p=0.05, top_k=40))
    assert field(text, "PARAMETER num_ctx") == ["256"]
    assert field(text, "PARAMETER min_p") == ["0.05"]
    assert field(text, "PARAMETER top_k") == ["40"]


def test_a_refusal_leaves_nothing(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "hf")
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(COUNTING)
    with pytest.raises(ExportError):
        export_ollama(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
