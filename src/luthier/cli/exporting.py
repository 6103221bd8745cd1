"""The export stage: the merged model in exports/hf, and from it, or from base and adapter, what other programs read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.markup import escape

from luthier.cli import console
from luthier.cli.working import stage
from luthier.errors import UsageError
from luthier.export.gguf_types import QUANTIZE, SPLIT_BYTES, Quantize, quantize_named
from luthier.runs import RunDirectory

if TYPE_CHECKING:
    from luthier.export.gguf import About, GGUFFile
    from luthier.export.merge import How
    from luthier.recipe.schema import Recipe

__all__ = ["KINDS", "Wanted", "export", "install"]


@dataclass(frozen=True)
class _Kind:
    """An export: the types of weights that it can have, the one that it has where the user does not say ("": those of
    the merged model), and whether it is made of the merged model."""

    types: tuple[str, ...]
    default: str
    merged: bool = True


KINDS: dict[str, _Kind] = {
    "hf": _Kind((), ""),
    "gguf": _Kind(QUANTIZE, "f16"),
    "ollama": _Kind(QUANTIZE, "q8_0"),
    "ollama-adapter": _Kind(QUANTIZE, "q8_0", merged=False),
    "mlx": _Kind(("4", "8"), ""),
    "mlx-adapter": _Kind(("4", "8"), "", merged=False),
}


@dataclass(frozen=True)
class Wanted:
    """What is asked for. Raises UsageError for a kind or a type that there is not, and for options of other kinds.

    Attributes:
        quantize: the type of the weights; None: the kind's own.
        split: a gguf of more than 2 GB in parts.
        install: have Ollama take what was written for it.
        how: of the merge, for hf alone.
    """

    kind: str
    quantize: str | None = None
    split: bool = False
    install: bool = False
    how: How | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"there is no export {self.kind!r}", f"known: {', '.join(KINDS)}")
        if self.split and self.kind != "gguf":
            why = "; Ollama reads one file" if self.kind.startswith("ollama") else ""
            raise UsageError(f"--split is for gguf{why}", "leave it out")
        if self.install and not self.kind.startswith("ollama"):
            raise UsageError("--install is for ollama and ollama-adapter", "leave it out")
        _ = self.type

    @property
    def type(self) -> str:
        """The type of the weights; "": as they are."""
        types = KINDS[self.kind].types
        if self.quantize is None:
            return KINDS[self.kind].default
        if not types:
            raise UsageError(f"--quantize is not for {self.kind}, which is written in 16-bit", "leave it out")
        if types == QUANTIZE:
            return quantize_named(self.quantize)
        if self.quantize not in types:
            raise UsageError(f"there is no --quantize {self.quantize} for {self.kind}", " or ".join(types))
        return self.quantize


def export(run: RunDirectory, recipe: Recipe, base: Path, wanted: Wanted) -> dict[str, object]:
    """Write one export of the run and say what was written.

    Those that are made of the merged model merge first where that was not done, or was done with an adapter that has
    changed since.
    """
    from luthier.export.origin import is_merged_from

    kind, chosen = wanted.kind, wanted.type
    if kind == "hf":
        return _merge(run, recipe, base, wanted.how)
    if KINDS[kind].types == QUANTIZE:
        _check_quantiser(cast("Quantize", chosen))
    if KINDS[kind].merged and not is_merged_from(run.export("hf"), run.adapter):
        _merge(run, recipe, base)
    with console.waiting(f"writing {kind} ({chosen or '16-bit'})"), stage(f"{kind} was written"):
        if kind == "gguf":
            return _gguf(run, recipe, base, wanted)
        if kind.startswith("mlx"):
            return _mlx(run, base, kind, chosen)
        return _ollama(run, recipe, base, wanted)


def _check_quantiser(quantize: Quantize) -> None:
    """Say before the merge, which may take minutes, that llama.cpp's quantiser is missing."""
    from luthier.export.gguf_quantize import check_quantiser

    check_quantiser(quantize)


def _merge(run: RunDirectory, recipe: Recipe, base: Path, how: How | None = None) -> dict[str, object]:
    from luthier.cli.card import model_card
    from luthier.data.render import make_template
    from luthier.data.tokenizer import load_tokenizer
    from luthier.export.huggingface import export_huggingface
    from luthier.export.merge import How

    how = How() if how is None else how
    into = "the base, in 16-bit" if how.onto_quantised is None else "the base as it was quantised, in 16-bit"

    out = run.export("hf")
    # What was trained lies beside the adapter: an export needs neither the rows nor this machine's plan.
    template = make_template("model", load_tokenizer(run.adapter))
    with console.waiting(f"merging the adapter into {into}"), stage("the adapter was merged"):
        merged = export_huggingface(base, run.adapter, out, template, model_card(run, recipe, base), how=how)
    _say_notes(merged.notes)
    facts = {
        "dtype": merged.dtype,
        "onto": merged.onto,
        "tensors": merged.tensors,
        "merged": merged.merged,
        "notes": list(merged.notes),
    }
    return {"kind": "hf", "path": str(out), **facts}


def _gguf(run: RunDirectory, recipe: Recipe, base: Path, wanted: Wanted) -> dict[str, object]:
    from luthier.export.gguf import write_gguf

    quantize, split = cast("Quantize", wanted.type), SPLIT_BYTES if wanted.split else 0
    path = run.export("gguf") / f"model-{quantize}.gguf"
    written = write_gguf(run.export("hf"), path, quantize, _about(run, recipe, base), split=split)
    _say_notes(written.notes)
    return {**_file("gguf", written.path, written), "parts": [str(part) for part in written.parts]}


def _ollama(run: RunDirectory, recipe: Recipe, base: Path, wanted: Wanted) -> dict[str, object]:
    from luthier.export import ollama

    asked = recipe.ollama
    settings = ollama.OllamaSettings(
        asked.temperature,
        asked.top_p,
        asked.top_k,
        asked.min_p,
        asked.repeat_penalty,
        asked.context if isinstance(asked.context, int) else None,
        asked.system,
    )
    about, out, quantize = _about(run, recipe, base), run.export(wanted.kind), cast("Quantize", wanted.type)
    if KINDS[wanted.kind].merged:
        made = ollama.export_ollama(run.export("hf"), out, quantize=quantize, settings=settings, about=about)
    else:
        made = ollama.export_ollama_adapter(base, run.adapter, out, quantize=quantize, settings=settings, about=about)
    _say_notes(made.notes)
    facts = {**_file(wanted.kind, made.folder, made.gguf), "notes": list(made.notes), "installed": False}
    return {**facts, "command": ollama.create_line(made.folder)}


def install(made: dict[str, object]) -> dict[str, object]:
    """Have Ollama take what `export` has `made` for it. Raises ExportError where it is not here, or refuses."""
    from luthier.export import ollama

    with console.waiting("installing in Ollama"), stage("it was installed"):
        name = ollama.install(Path(str(made["path"])))
    return {**made, "installed": True, "command": f"ollama run {name}"}


def _mlx(run: RunDirectory, base: Path, kind: str, quantize: str) -> dict[str, object]:
    from luthier.data.render import make_template
    from luthier.data.tokenizer import load_tokenizer
    from luthier.export.affine import Bits
    from luthier.export.mlx import write_mlx
    from luthier.export.mlx_adapter import write_mlx_adapter

    bits = cast("Bits | None", int(quantize) if quantize else None)
    template, out = make_template("model", load_tokenizer(run.adapter)), run.export(kind)
    facts: dict[str, object] = {"kind": kind, "path": str(out), "quantize": quantize or None}
    if kind == "mlx":
        made = write_mlx(run.export("hf"), out, template, bits)
        _say_notes(made.notes)
        more = {"bytes": made.size, "tensors": made.tensors, "notes": list(made.notes), "command": made.command}
        return facts | more
    adapter = write_mlx_adapter(base, run.adapter, out, template, bits)
    _say_notes(adapter.notes)
    notes = list(adapter.notes)
    return facts | {"base": str(adapter.base), "tensors": adapter.tensors, "notes": notes, "command": adapter.command}


def _file(kind: str, path: Path, written: GGUFFile) -> dict[str, object]:
    facts = {"quantize": written.quantize, "bytes": written.size, "tensors": written.tensors}
    return {"kind": kind, "path": str(path), **facts, "notes": list(written.notes)}


def _say_notes(notes: Sequence[str]) -> None:
    for note in notes:
        console.say(f"[dim]{escape(note)}[/]")


def _about(run: RunDirectory, recipe: Recipe, base: Path) -> About:
    from luthier.export.gguf import About
    from luthier.export.huggingface import base_license

    return About(run.path.resolve().name, recipe.model, base_license(base))
