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
from luthier.export.merge import Merged, MergeDtype, merge

__all__ = ["CardFigure", "ModelCard", "base_license", "card_text", "export_huggingface"]


@dataclass(frozen=True)
class CardFigure:
    """One line of base against tuned, on rows that were not trained on."""

    name: str
    base: float
    tuned: float


@dataclass(frozen=True)
class ModelCard:
    """What the README says. `base` is the recipe's name for it; `facts` are (setting, value) of the plan."""

    name: str
    base: str
    data: str
    license: str = ""
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)
    figures: Sequence[CardFigure] = field(default_factory=tuple)


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


def card_text(card: ModelCard) -> str:
    """The README.md of a tuned model."""
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if "/" in card.base and not Path(card.base).exists():  # a hub id, not a folder of this machine
        front |= {"base_model": card.base, "base_model_relation": "finetune"}
    if card.license:
        front["license"] = card.license
    front["tags"] = ["luthier", "lora"]
    base = card.base if not Path(card.base).is_absolute() else Path(card.base).name
    lines = [
        *("---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {card.name}", ""),
        f"`{base}`, tuned by LoRA with Luthier on {card.data} and merged into the unquantised base.",
        *("", "| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in card.facts), ""),
    ]
    if card.figures:
        lines += ["Held-out rows, base against tuned:", "", "| | base | tuned |", "|---|---|---|"]
        lines += [f"| {figure.name} | {figure.base:.4g} | {figure.tuned:.4g} |" for figure in card.figures]
        lines += [""]
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


def export_huggingface(
    base: Path, adapter: Path, out: Path, template: Template, card: ModelCard, *, dtype: MergeDtype = "auto"
) -> Merged:
    """Merge and write the folder with its card. Raises what `merge` raises."""
    return merge(base, adapter, out, template, dtype=dtype, card=card_text(card))
