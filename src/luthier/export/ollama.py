"""A folder that `ollama create` takes: the GGUF file and a Modelfile that asks in the trained form.

FROM ./model.gguf
TEMPLATE  the trained chat template in Go's template language (go_template.py)
PARAMETER stop … for every stop token, temperature, top_p, num_ctx
SYSTEM    the system message, if the recipe has one
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from luthier.data.conversation import Turn
from luthier.data.render import Template, make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ExportError
from luthier.export.gguf import About, GGUFFile, Quantize, begins_with_bos, write_gguf
from luthier.export.go_template import derive_pieces, go_source
from luthier.model.config import read_config
from luthier.runs import atomic_folder, write_text

__all__ = ["OllamaExport", "OllamaSettings", "export_ollama", "model_name", "modelfile"]

GGUF_NAME = "model.gguf"
DEFAULT_CONTEXT = 8192
"""Ollama's own default is shorter than what most models were trained for; more than this costs memory few expect."""


@dataclass(frozen=True)
class OllamaSettings:
    """What the Modelfile sets. `context` None: the model's own, 8192 tokens at most."""

    temperature: float = 0.7
    top_p: float = 0.9
    context: int | None = None
    system: str = ""


@dataclass(frozen=True)
class OllamaExport:
    """The folder, its GGUF file, and what to know; `command` creates the model in Ollama."""

    folder: Path
    gguf: GGUFFile
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        """What to type in a shell; the model is called after the run in whose exports the folder lies."""
        name = model_name(self.folder.resolve().parent.parent.name)
        return f"ollama create {name} -f {shlex.quote(str(self.folder / 'Modelfile'))}"


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
    context = settings.context or min(max_positions, DEFAULT_CONTEXT)
    lines = [f"FROM ./{GGUF_NAME}", f"TEMPLATE {_quoted(source)}"]
    lines += [f"PARAMETER stop {_stop(text)}" for text in template.stop_strings]
    lines += [
        f"PARAMETER temperature {settings.temperature:g}",
        f"PARAMETER top_p {settings.top_p:g}",
        f"PARAMETER num_ctx {context}",
    ]
    if settings.system:
        lines.append(f"SYSTEM {_quoted(settings.system)}")
    return "\n".join(lines) + "\n", _notes(template, pieces.before is not None)


def _stop(text: str) -> str:
    if any(sign in text for sign in '"\n'):
        return _quoted(text)
    return f'"{text}"'


def _notes(template: Template, takes_system: bool) -> tuple[str, ...]:
    notes: list[str] = []
    padded = [Turn("user", "  padded\n")]
    if "  padded\n" not in template.render(padded, generation_prompt=True):
        notes.append("the chat template trims messages; Ollama's template language cannot, so send them trimmed")
    if not takes_system:
        notes.append("the chat template takes no system message; Ollama will leave one out")
    if "strftime_now" in template.chat_template_source:
        notes.append("the chat template writes the date; the Modelfile holds that of its export")
    if "### Input:" in template.chat_template_source:
        notes.append("questions with an Alpaca `### Input:` part get the preamble of those without in Ollama")
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
    text, notes = modelfile(template, read_config(folder).max_positions, settings or OllamaSettings())
    with atomic_folder(out) as beside:
        written = write_gguf(folder, beside / GGUF_NAME, quantize, about)
        write_text(beside / "Modelfile", text)
    placed = GGUFFile(out / GGUF_NAME, written.size, written.quantize, written.tensors, written.kept_f16, written.notes)
    return OllamaExport(out, placed, (*notes, *written.notes))
