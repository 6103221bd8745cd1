"""Is a Modelfile's template what the model was trained with? Go's own text/template, which Ollama runs, is asked.

A small Go program (render.go) is compiled where Go is installed, and given the template and conversations; what it
writes must be the jinja rendering, byte for byte. Go may not reach for the network meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from luthier.data.conversation import Turn
from luthier.data.render import Template
from luthier.errors import DataError, ExportError
from luthier.export.gguf import begins_with_bos

__all__ = ["ModelfileChecked", "build_renderer", "check_modelfile", "render_by_go", "template_of"]

INSTALL = "install Go (Debian: apt install golang-go; else https://go.dev/dl)"
SECONDS = 120
"""The first compilation on a machine compiles Go's own library too."""


@dataclass(frozen=True)
class ModelfileChecked:
    """What became of it; `identical` None: not checked, and `reason` says why."""

    identical: bool | None
    conversations: int = 0
    difference: str = ""
    reason: str = ""
    install: str = ""


def check_modelfile(path: Path, template: Template, questions: Sequence[str]) -> ModelfileChecked:
    """Hold the TEMPLATE of the Modelfile at `path` against `template` on conversations made of `questions`.

    Raises ExportError where Go is installed and does not compile.
    """
    if shutil.which("go") is None:
        return ModelfileChecked(
            None, reason="Go is not installed, so its template language was not asked", install=INSTALL
        )
    asked, wanted = _conversations(template, questions)
    bos = template.tokenizer.special.get("bos_token")
    if begins_with_bos(template):  # the runtime puts it there
        wanted = [text.removeprefix(str(bos)) for text in wanted]
    with tempfile.TemporaryDirectory(prefix="luthier-go-") as folder:
        found = render_by_go(build_renderer(Path(folder)), template_of(path), asked)
    for one, other in zip(wanted, found, strict=True):
        if one != other:
            at = next(i for i in range(len(one) + 1) if one[: i + 1] != other[: i + 1])
            difference = (
                f"the Modelfile's template in Go: expected {one[at : at + 60]!r}, found {other[at : at + 60]!r}"
            )
            return ModelfileChecked(False, len(asked), difference)
    return ModelfileChecked(True, len(asked))


def _conversations(template: Template, questions: Sequence[str]) -> tuple[list[list[Turn]], list[str]]:
    """Conversations of one and two questions, with and without a system message, as far as the template takes them;
    and what it writes for each."""
    asked: list[list[Turn]] = []
    wanted: list[str] = []
    for number, question in enumerate(questions):
        once = [Turn("user", question)]
        twice = [*once, Turn("assistant", "Yes.\n"), Turn("user", questions[number - 1])]
        system = Turn("system", "Be kind.")
        for turns in (once, twice, [system, *once], [system, *twice]):
            try:
                text = template.render(turns, generation_prompt=True)
            except DataError:  # the template refuses a system message, and the Modelfile has no place for one
                continue
            if turns[0] is system and system.content not in text:
                continue
            asked.append(turns)
            wanted.append(text)
    return asked, wanted


def template_of(modelfile: Path) -> str:
    """The text of its TEMPLATE. Raises ExportError where it has none."""
    found = re.search(r'^TEMPLATE """(.*?)"""', modelfile.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if found is None:
        raise ExportError(f"{modelfile} has no TEMPLATE", "export it again: luthier export RUN --to ollama")
    return found[1]


def build_renderer(folder: Path) -> Path:
    """The program, compiled in `folder`. Raises ExportError with what Go says where that fails, or takes too long."""
    source = folder / "render.go"
    source.write_text(files("luthier.export").joinpath("render.go").read_text(encoding="utf-8"), encoding="utf-8")
    go = shutil.which("go") or "go"
    environment = {**os.environ, "GO111MODULE": "off", "GOFLAGS": "", "GOTOOLCHAIN": "local", "GOPROXY": "off"}
    # A cache is kept where Go has its own, so that its library is compiled once on a machine.
    environment.setdefault("HOME", str(folder))
    try:
        done = subprocess.run(  # noqa: S603
            [go, "build", "-o", str(folder / "render"), str(source)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportError(
            f"Go did not compile: {error}", "see that `go version` works, or take Go off the PATH"
        ) from error
    if done.returncode:
        raise ExportError(
            f"Go did not compile: {done.stderr[-500:]}", "see that `go version` works, or take it off the PATH"
        )
    return folder / "render"


def render_by_go(program: Path, source: str, conversations: Sequence[Sequence[Turn]]) -> list[str]:
    """What Go writes for each conversation. Raises ExportError with what Go says where it stops with an error."""
    jobs = (
        {"Template": source, "Messages": [{"Role": turn.role, "Content": turn.content} for turn in turns]}
        for turns in conversations
    )
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    try:
        done = subprocess.run(  # noqa: S603
            [str(program)], input=lines, capture_output=True, text=True, encoding="utf-8", timeout=SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ExportError(f"Go's program did not run: {error}", "see that `go version` works") from error
    answers = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    said = next((answer["Error"] for answer in answers if answer["Error"]), None)
    if said is not None or len(answers) != len(conversations):
        raise ExportError(f"Go does not render the Modelfile's template: {said}", "export it again, and report this")
    return [str(answer["Text"]) for answer in answers]
