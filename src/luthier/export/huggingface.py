"""The folder that transformers, vLLM, MLX and every converter read: merged weights, tokenizer, and a model card.

The card says what was done, so that whoever gets the folder can tell: base, data, the recipe's figures, base against
tuned. Its front matter is the hub's (base_model, library, licence).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from luthier.data.render import Template
from luthier.export.merge import PLAIN, How, Merged, MergeDtype, merge

__all__ = ["CardFigure", "ModelCard", "base_license", "card_text", "export_huggingface"]


@dataclass(frozen=True)
class CardFigure:
    """One line of base against tuned, on rows that were not trained on."""

    name: str
    base: float
    tuned: float


@dataclass(frozen=True)
class ModelCard:
    """What the README says.

    `base` is the recipe's name for it, at `revision` where it came from the hub; `facts` are (setting, value) of the
    plan, `rows` (side, rows, tokens, trained tokens) of the data, `notes` what else is known of it; `recipe` is the
    recipe in YAML, without paths of the machine that it ran on.
    """

    name: str
    base: str
    data: str
    license: str = ""
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)
    figures: Sequence[CardFigure] = field(default_factory=tuple)
    revision: str = ""
    rows: Sequence[tuple[str, int, int, int]] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)
    recipe: str = ""


_LONGEST_FRONT = 2**18
_LICENSE = re.compile(r"""\nlicense:[ \t]+["']?([A-Za-z0-9][\w.+-]*)["']?[ \t]*(?:#[^\n]*)?\n""", re.ASCII)


def base_license(folder: Path) -> str:
    """The `license` in the front matter of the base's README.md, "" where it does not say."""
    path = folder / "README.md"
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        text = file.read(_LONGEST_FRONT).decode(errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return ""
    # One line of it is all that is wanted: a YAML library would build whatever somebody else's file describes.
    found = _LICENSE.search(text[3 : text.index("\n---", 4) + 1])
    return found[1] if found else ""


def card_text(card: ModelCard, *, onto_quantised: bool = False) -> str:
    """The README.md of a tuned model; `onto_quantised`: it was merged into the 4-bit base's rounded weights."""
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if "/" in card.base and not Path(card.base).exists():  # a hub id, not a folder of this machine
        front |= {"base_model": card.base, "base_model_relation": "finetune"}
    if card.license:
        front["license"] = card.license
    front["tags"] = ["luthier", "lora"]
    base = card.base if not Path(card.base).is_absolute() else Path(card.base).name
    at = f" at commit `{card.revision}`" if card.revision else ""
    into = "the unquantised base"
    if onto_quantised:
        into = "the base's weights as NF4 rounds them, which it was trained against (unpacked to 16-bit)"
    lines = [
        *("---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {card.name}", ""),
        f"`{base}`{at}, tuned by LoRA with Luthier on {card.data} and merged into {into}. {_terms(card)}",
        *("", "| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in card.facts), ""),
    ]
    lines += [*_data(card), *_evaluation(card)]
    if card.recipe:
        lines += ["<details><summary>The recipe</summary>", "", "```yaml", *card.recipe.rstrip().splitlines(), "```"]
        lines += ["", "</details>", ""]
    lines += [
        "Ask it through its chat template, which is the form it was trained in:",
        *("", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".")',
        'messages = [{"role": "user", "content": "..."}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _terms(card: ModelCard) -> str:
    """Whose licence holds: a merged model is made of its base."""
    if card.license:
        return f"The base is under the licence `{card.license}`, which binds this model too."
    return "The base does not say what licence it is under: look there before you pass this model on."


def _data(card: ModelCard) -> list[str]:
    if not card.rows:
        return []
    shown = [f"| {side} | {rows:,} | {tokens:,} | {trained:,} |" for side, rows, tokens, trained in card.rows]
    notes = [f"- {note}" for note in card.notes]
    return ["Data:", "", "| side | rows | tokens | trained or measured |", "|---|---|---|---|", *shown, "", *notes, ""]


def _evaluation(card: ModelCard) -> list[str]:
    if not card.figures:
        return []
    shown = [f"| {figure.name} | {figure.base:.4g} | {figure.tuned:.4g} |" for figure in card.figures]
    return ["Held-out rows, base against tuned:", "", "| | base | tuned |", "|---|---|---|", *shown, ""]


def export_huggingface(
    base: Path,
    adapter: Path,
    out: Path,
    template: Template,
    card: ModelCard,
    *,
    dtype: MergeDtype = "auto",
    how: How = PLAIN,
) -> Merged:
    """Merge and write the folder with its card. Raises what `merge` raises."""
    text = card_text(card, onto_quantised=how.onto_quantised is not None)
    return merge(base, adapter, out, template, dtype=dtype, card=text, how=how)
