"""A folder that `ollama create` takes: the GGUF file and a Modelfile that asks in the trained form.

FROM ./model.gguf     the merged model; or FROM ./base.gguf and ADAPTER ./adapter.gguf, the two apart
TEMPLATE              the trained chat template in Go's template language (go_template.py)
PARAMETER             stop for every stop token; the recipe's `ollama`, whose defaults are those of `luthier chat`, for
                      Ollama's own would punish repetition and cut the choice of tokens without being asked
SYSTEM                the system message, if the recipe has one
LICENSE               the base's licence files, or the licence's name where there are none
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

from luthier.data.render import Template, make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ExportError
from luthier.export.gguf import About, GGUFFile, Quantize, begins_with_bos, write_gguf
from luthier.export.gguf_adapter import write_gguf_adapter
from luthier.export.go_template import Pieces, derive_pieces, go_source
from luthier.model.config import read_config
from luthier.runs import atomic_folder, write_text

__all__ = [
    "ADAPTER_NAME",
    "BASE_NAME",
    "OllamaExport",
    "OllamaSettings",
    "create_line",
    "export_ollama",
    "export_ollama_adapter",
    "install",
    "model_name",
    "modelfile",
]

GGUF_NAME, BASE_NAME, ADAPTER_NAME = "model.gguf", "base.gguf", "adapter.gguf"
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
DEFAULT_CONTEXT = 8192
"""Ollama's own default is shorter than what most models were trained for; more than this costs memory few expect."""


@dataclass(frozen=True)
class OllamaSettings:
    """What the Modelfile sets; `recipe.ollama` says what each means. `context` None: the model's own, 8192 at most.

    `licenses` are texts, `adapter` whether the adapter stands beside the base.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    context: int | None = None
    system: str = ""
    licenses: tuple[str, ...] = ()
    adapter: bool = False


@dataclass(frozen=True)
class OllamaExport:
    """The folder, its GGUF file, and what to know."""

    folder: Path
    gguf: GGUFFile
    notes: tuple[str, ...]


def _words(folder: Path) -> list[str]:
    """The command that creates the model, which is called after the run in whose exports the folder lies."""
    name = model_name(folder.resolve().parent.parent.name)
    return ["ollama", "create", name, "-f", str(folder / "Modelfile")]


def create_line(folder: Path) -> str:
    """What to type in a shell to have Ollama take what was exported to `folder`."""
    return shlex.join(_words(folder))


def model_name(text: str) -> str:
    """`text` as a name that Ollama takes: a-z, 0-9, `-`, `_` and `.`, a letter or digit first, 80 characters at most.

    Accents are dropped, and anything else becomes a hyphen; "luthier-model" where nothing is left.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9._-]+", "-", plain).lstrip("-_.")[:80].rstrip("-_.") or "luthier-model"


def _quoted(text: str) -> str:
    """A value in a Modelfile, which knows no escapes: in triple quotes whatever it holds, but those themselves."""
    if '"""' in text:
        raise ExportError(f"a Modelfile cannot hold three double quotes in a row: {text[:60]!r}", "leave them out")
    return f'"""{text}"""'


def modelfile(template: Template, max_positions: int, settings: OllamaSettings) -> tuple[str, tuple[str, ...]]:
    """(the text of the Modelfile, what to know about it).

    Raises ExportError where the chat template has no equivalent in Go's template language.
    """
    pieces = derive_pieces(template)
    if settings.system and pieces.before is None:
        raise ExportError("the chat template takes no system message", "leave the system message out")
    source = go_source(pieces, str(template.tokenizer.special["bos_token"]) if begins_with_bos(template) else "")
    if settings.context is not None and settings.context > max_positions:
        raise ExportError(
            f"a context of {settings.context:,} tokens is more than the model has: {max_positions:,}",
            "set ollama.context in the recipe to that or less, or to auto",
        )
    lines = [f"FROM ./{BASE_NAME}", f"ADAPTER ./{ADAPTER_NAME}"] if settings.adapter else [f"FROM ./{GGUF_NAME}"]
    lines += [f"TEMPLATE {_quoted(source)}"]
    lines += [f"PARAMETER stop {_stop(text)}" for text in template.stop_strings]
    lines += [
        f"PARAMETER temperature {settings.temperature:g}",
        f"PARAMETER top_p {settings.top_p:g}",
        f"PARAMETER top_k {settings.top_k}",
        f"PARAMETER min_p {settings.min_p:g}",
        f"PARAMETER repeat_penalty {settings.repeat_penalty:g}",
        f"PARAMETER num_ctx {settings.context or min(max_positions, DEFAULT_CONTEXT)}",
    ]
    if settings.system:
        lines.append(f"SYSTEM {_quoted(settings.system)}")
    lines += [f"LICENSE {_quoted(text)}" for text in settings.licenses]
    return "\n".join(lines) + "\n", _notes(template, pieces)


def _stop(text: str) -> str:
    if any(sign in text for sign in '"\n'):
        return _quoted(text)
    return f'"{text}"'


def _notes(template: Template, pieces: Pieces) -> tuple[str, ...]:
    notes: list[str] = []
    if pieces.before is None:
        notes.append("the chat template takes no system message; Ollama will leave one out")
    if "strftime_now" in template.chat_template_source:
        notes.append("the chat template writes the date; the Modelfile holds the one that was trained")
    if "answer" in pieces.forms.values():
        notes.append("the chat template leaves out the reasoning of earlier answers, and so does the Modelfile")
    if "answer" in pieces.forms.values() or pieces.paired is not None:
        notes.append("Ollama refuses a message of more than 100,000 bytes with this template")
    return tuple(notes)


def export_ollama(
    folder: Path,
    out: Path,
    *,
    quantize: Quantize = "q8_0",
    settings: OllamaSettings | None = None,
    about: About | None = None,
) -> OllamaExport:
    """Write the GGUF file and the Modelfile of the merged model in `folder` to the folder `out`, atomically.

    Raises ExportError where model, tokenizer or template have no equivalent.
    """
    template = make_template("model", load_tokenizer(folder))
    chosen, more = _licensed(folder, settings or OllamaSettings(), about)
    text, notes = modelfile(template, read_config(folder).max_positions, chosen)
    with atomic_folder(out) as beside:
        written = write_gguf(folder, beside / GGUF_NAME, quantize, about)
        write_text(beside / "Modelfile", text)
    return OllamaExport(out, replace(written, path=out / GGUF_NAME), (*notes, *more, *written.notes))


def export_ollama_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    quantize: Quantize = "q8_0",
    settings: OllamaSettings | None = None,
    about: About | None = None,
) -> OllamaExport:
    """The same of a base and its adapter apart: Ollama keeps the base once for all adapters that are made on it.

    The adapter's folder says how it was trained to be asked. Raises ExportError as `export_ollama`, and where adapter
    and base do not belong together.
    """
    template = make_template("model", load_tokenizer(adapter))
    chosen, more = _licensed(base, replace(settings or OllamaSettings(), adapter=True), about)
    text, notes = modelfile(template, read_config(base).max_positions, chosen)
    with atomic_folder(out) as beside:
        write_gguf_adapter(base, adapter, beside / ADAPTER_NAME, "" if about is None else about.name)
        # Of the base alone, so that it is the same file, and the same blob in Ollama, whatever run it goes with.
        written = write_gguf(base, beside / BASE_NAME, quantize, replace(about or About(), name=""), template=template)
        write_text(beside / "Modelfile", text)
    return OllamaExport(out, replace(written, path=out / BASE_NAME), (*notes, *more, *written.notes))


def _licensed(folder: Path, settings: OllamaSettings, about: About | None) -> tuple[OllamaSettings, tuple[str, ...]]:
    """The settings with the licences of the model in `folder`, and what to know about them."""
    if settings.licenses:
        return settings, ()
    files = [folder / name for name in LICENSES if (folder / name).is_file()]
    texts = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in files}
    unquotable = [name for name, text in texts.items() if '"""' in text]
    notes = tuple(f"{name} holds three double quotes in a row, so it is not in the Modelfile" for name in unquotable)
    found = tuple(text for name, text in texts.items() if name not in unquotable)
    if not found and about is not None and about.license:
        found = (about.license,)
    return replace(settings, licenses=found), notes


def install(folder: Path) -> str:
    """Run `ollama create` on what was exported to `folder`; the name that `ollama run` knows the model by.

    Raises ExportError where Ollama is not on this machine or refuses; what was exported stays.
    """
    program, words = shutil.which("ollama"), _words(folder)
    if program is None:
        raise ExportError(
            f"ollama is not on this machine, so {folder} was written and not installed",
            f"install it from https://ollama.com, or where it is, type: {create_line(folder)}",
        )
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if done.returncode != 0:
        said = "\n".join(f"  {line}" for line in (done.stderr or done.stdout).strip().splitlines()[-5:])
        raise ExportError(
            f"ollama create ended with exit code {done.returncode}:\n{said}",
            f"see that Ollama runs (`ollama serve`), then type: {create_line(folder)}",
        )
    return words[2]
