"""The export stage: the merged model in exports/hf, and from it what other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from luthier.cli import console
from luthier.errors import UsageError
from luthier.runs import RunDirectory, read_json

if TYPE_CHECKING:
    from luthier.cli.stages import Prepared
    from luthier.export.gguf import About, GGUFFile
    from luthier.export.huggingface import CardFigure, ModelCard

__all__ = ["export"]

Quantize = Literal["f16", "q8_0"]
KINDS: dict[str, Quantize | None] = {"hf": None, "gguf": "f16", "ollama": "q8_0"}
"""Kind -> the type of its weights where the user does not say."""


def export(prepared: Prepared, run: RunDirectory, kind: str, quantize: str | None) -> dict[str, object]:
    """Write one export of the run and say what was written. gguf and ollama merge first where that was not done."""
    if kind not in KINDS:
        raise UsageError(f"there is no export {kind!r}", f"known: {', '.join(KINDS)}")
    if quantize is not None and (kind == "hf" or quantize not in ("f16", "q8_0")):
        raise UsageError(f"--quantize {quantize} is not for {kind}", "f16 or q8_0, for gguf and ollama")
    chosen = cast("Quantize | None", quantize) or KINDS[kind]
    if kind == "hf" or chosen is None:
        return _merge(prepared, run)
    if not (run.export("hf") / "config.json").is_file():
        _merge(prepared, run)
    with console.waiting(f"writing {kind} ({chosen})"):
        return _gguf(prepared, run, chosen) if kind == "gguf" else _ollama(prepared, run, chosen)


def _merge(prepared: Prepared, run: RunDirectory) -> dict[str, object]:
    from luthier.export.huggingface import export_huggingface

    out, template = run.export("hf"), prepared.dataset.template
    with console.waiting("merging the adapter into the base, in 16-bit"):
        merged = export_huggingface(prepared.base, run.adapter, out, template, _card(prepared, run))
    return {"kind": "hf", "path": str(out), "dtype": merged.dtype, "tensors": merged.tensors, "merged": merged.merged}


def _gguf(prepared: Prepared, run: RunDirectory, quantize: Quantize) -> dict[str, object]:
    from luthier.export.gguf import write_gguf

    path = run.export("gguf") / f"model-{quantize}.gguf"
    return _file("gguf", path, write_gguf(run.export("hf"), path, quantize, _about(prepared, run)))


def _ollama(prepared: Prepared, run: RunDirectory, quantize: Quantize) -> dict[str, object]:
    from luthier.export.ollama import export_ollama

    made = export_ollama(run.export("hf"), run.export("ollama"), quantize=quantize, about=_about(prepared, run))
    return {**_file("ollama", made.folder, made.gguf), "notes": list(made.notes), "command": made.command}


def _file(kind: str, path: Path, written: GGUFFile) -> dict[str, object]:
    for note in written.notes:
        console.say(f"[dim]{note}[/]")
    facts = {"quantize": written.quantize, "bytes": written.size, "tensors": written.tensors}
    return {"kind": kind, "path": str(path), **facts, "notes": list(written.notes)}


def _about(prepared: Prepared, run: RunDirectory) -> About:
    from luthier.export.gguf import About
    from luthier.export.huggingface import base_license

    return About(run.path.resolve().name, prepared.recipe.model, base_license(prepared.base))


def _card(prepared: Prepared, run: RunDirectory) -> ModelCard:
    from luthier.export.huggingface import ModelCard, base_license
    from luthier.plan.explain import shown_value

    sources = prepared.dataset.report.sources
    rows = sum(source.rows for source in sources)
    return ModelCard(
        name=run.path.resolve().name,
        base=prepared.recipe.model,
        # File names, not paths: a card travels, and where things lay on this machine is nobody's business.
        data=f"{rows} rows of {', '.join(dict.fromkeys(Path(source.path).name for source in sources))}",
        license=base_license(prepared.base),
        facts=[(one.setting, shown_value(one.value)) for one in prepared.plan.decisions if one.setting in _ON_CARD],
        figures=_figures(run),
    )


_ON_CARD = (
    *("adapter.rank", "adapter.alpha", "adapter.targets", "quantize", "train.steps", "train.batch_size"),
    *("train.learning_rate", "train.schedule", "train.precision", "seed"),
)


def _figures(run: RunDirectory) -> list[CardFigure]:
    """Base against tuned, where it was measured before the merge."""
    from luthier.export.huggingface import CardFigure

    if not run.evaluation.is_file():
        return []
    found = cast("dict[str, dict[str, float]]", read_json(run.evaluation))
    return [CardFigure(name, found["base"][name], found["tuned"][name]) for name in ("loss", "perplexity")]
