"""What the schema expects at a place, in words: read off the definitions, so it cannot differ from them."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from typing import Annotated, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from luthier.recipe.document import Keys
from luthier.recipe.schema import Recipe

__all__ = ["described", "dotted", "expected", "found", "is_section", "nearest", "section_of", "settings_under", "unit"]

# What people write who come from other tools, or from the first thing that comes to mind; checked before spelling.
_ALSO_CALLED = {
    "base_model": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "dataset": "data",
    "datasets": "data",
    "chat_template": "template",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "load_in_4bit": "quantize",
    "lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "micro_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "sequence_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "cutoff_len": "train.max_length",
    "gradient_checkpointing": "train.checkpointing",
    "activation_checkpointing": "train.checkpointing",
    "attn_implementation": "train.attention",
    "flash_attention": "train.attention",
    "device": "hardware",
    "gpu": "hardware",
    "max_grad_norm": "train.clip",
    "warmup": "train.warmup_steps",
    "save_total_limit": "train.keep",
    "save_steps": "train.save_every",
    "eval_steps": "train.eval_every",
    "time_limit": "train.max_time",
}


def dotted(keys: Sequence[str | int]) -> str:
    """`("train", "steps")` -> `train.steps`."""
    return ".".join(map(str, keys))


def found(value: object) -> str:
    """A value of YAML in words, with what it is."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57]!r}…"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    kind = "list" if isinstance(value, (list, tuple)) else "mapping"
    return f"a {kind}" if value else f"an empty {kind}"


def _inner_model(annotation: object) -> type[BaseModel] | None:
    """The section that an annotation holds: itself, or the item of a tuple of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        model = _inner_model(part)
        if model is not None:
            return model
    return None


def section_of(keys: Keys) -> type[BaseModel] | None:
    """The section whose settings stand under `keys`; None where there is none."""
    model: type[BaseModel] = Recipe
    for key in keys:
        if isinstance(key, int):
            continue
        field = model.model_fields.get(key)
        inner = None if field is None else _inner_model(field.annotation)
        if inner is None:
            return None
        model = inner
    return model


def is_section(keys: Keys) -> bool:
    """Whether `keys` names a section such as `train`, not a setting nor a list of sections."""
    field = _field(keys)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def settings_under(keys: Keys) -> tuple[str, ...]:
    """The names that may stand under `keys`."""
    model = section_of(keys)
    return () if model is None else tuple(model.model_fields)


def _field(keys: Keys) -> FieldInfo | None:
    names = [key for key in keys if isinstance(key, str)]
    model = section_of(tuple(names[:-1])) if names else None
    return None if model is None else model.model_fields.get(names[-1])


def nearest(keys: Keys) -> str | None:
    """The setting that was probably meant by the unknown `keys`: of another name here, or of this name elsewhere."""
    name, here = str(keys[-1]), keys[:-1]
    if name in _ALSO_CALLED:
        return _ALSO_CALLED[name]
    elsewhere: dict[str, str] = {}
    for section in Recipe.model_fields:
        if is_section((section,)):
            elsewhere |= {key: f"{section}.{key}" for key in settings_under((section,)) if key not in elsewhere}
    elsewhere |= {key: key for key in Recipe.model_fields}
    if name in elsewhere:
        return elsewhere[name]
    near = difflib.get_close_matches(name, settings_under(here), n=1, cutoff=0.65)
    if near:
        return dotted((*here, near[0]))
    near = difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.75)
    return elsewhere[near[0]] if near else None


def unit(field: FieldInfo) -> str:
    """The unit of a setting: tokens, rows, steps; empty where it has none."""
    extra = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def expected(keys: Keys) -> str:
    """What may stand at `keys`, e.g. `a whole number from 1, or auto`."""
    if any(isinstance(key, int) for key in keys) and isinstance(keys[-1], int):
        field = _field(keys)
        parts = [] if field is None else _item_types(field.annotation)
        return _listed([_words(part, ()) for part in parts]) if parts else "another value"
    field = _field(keys)
    if field is None:  # inside a free mapping, such as `fields`
        return "a text"
    return described(field)


def _item_types(annotation: object) -> list[object]:
    if get_origin(annotation) is tuple:
        return [get_args(annotation)[0]]
    return [item for part in get_args(annotation) for item in _item_types(part)]


def described(field: FieldInfo) -> str:
    """What a setting may be, in words: its types and bounds."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "expects" in extra:
        return str(extra["expects"])
    return _words(field.annotation, tuple(field.metadata))


def _words(annotation: object, metadata: tuple[object, ...]) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _words(inner, (*metadata, *more))
    if origin in (Union, types.UnionType):
        return _listed([_words(part, metadata) for part in get_args(annotation)])
    if origin is Literal:
        return _listed([str(word) for word in get_args(annotation)])
    if origin is tuple:
        item = get_args(annotation)[0]
        words = _words(item, ())
        return "a list of " + ("texts" if words == "a text" else words)
    if origin is dict or _inner_model(annotation) is not None:
        return "a mapping"
    if annotation is type(None):
        return "null"
    if annotation is bool:
        return "true, false"
    if annotation is str:
        return "a text"
    return f"a {'whole ' if annotation is int else ''}number{_bounds(metadata)}"


def _listed(parts: Sequence[str]) -> str:
    """`a, b or c`; a part that is a list itself comes apart first."""
    flat = [piece for part in parts for piece in part.replace(" or ", ", ").split(", ")]
    return flat[0] if len(flat) == 1 else f"{', '.join(flat[:-1])} or {flat[-1]}"


def _bounds(metadata: tuple[object, ...]) -> str:
    flat: list[object] = []
    for one in metadata:
        flat.extend(one.metadata if isinstance(one, FieldInfo) else [one])
    low, high = "", ""
    for one in flat:
        if isinstance(one, annotated_types.Ge):
            low = f" from {one.ge}"
        elif isinstance(one, annotated_types.Gt):
            low = f" above {one.gt}"
        elif isinstance(one, annotated_types.Le):
            high = f" to {one.le}" if "from" in low else f" up to {one.le}"
        elif isinstance(one, annotated_types.Lt):
            high = f" below {one.lt}"
    return low + (" and" if low and "below" in high else "") + high
