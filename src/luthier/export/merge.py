"""Base + adapter -> a model of its own, in the base's layout.

    W' = W + s B A        per adapted projection, summed in fp32 and rounded once to the output dtype

The output is 16-bit in the base's own dtype: fp16 of an fp16 base, else bf16.

W is taken from the base's files as they are, never from weights that were quantised for training: merging into rounded
weights and rounding again loses what the adapter learned. One shard is in memory at a time. Tensors without an adapter
are copied, bit for bit where the dtype stays, as it does for a 16-bit base.

The folder gets the template that was trained as its chat template, and the template's stop tokens as those of
`generate`, so that whoever loads it asks in the trained form and the answer ends.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.data.render import Template
from luthier.errors import ExportError, FileError
from luthier.guard.documents import read_object
from luthier.guard.header import Header, StoredTensor, check_safetensors
from luthier.guard.inside import check_folder
from luthier.model.adapter import PREFIX, WEIGHTS, read_adapter_config
from luthier.model.config import ModelConfig, read_config
from luthier.model.locate import INDEX, weight_files
from luthier.model.lora import merge_delta
from luthier.runs import atomic_folder, write_json, write_text

__all__ = ["DTYPES", "MergeDtype", "Merged", "StoredDtype", "merge", "write_tokenizer"]

StoredDtype = Literal["bf16", "fp16", "fp32"]
MergeDtype = Literal["auto", "bf16", "fp16", "fp32"]
"""What a merge can be asked for: `auto` is the base's own 16-bit dtype, and bf16 for an fp32 base."""

DTYPES: Mapping[StoredDtype, tuple[torch.dtype, str]] = {
    "bf16": (torch.bfloat16, "bfloat16"),
    "fp16": (torch.float16, "float16"),
    "fp32": (torch.float32, "float32"),
}
"""Name -> torch's dtype and what config.json calls it."""

COPIED = (
    *("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)
"""Files of the base that go along as they are: its tokenizer, and its licence, which binds the merged model too."""

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Merged:
    """A folder that was written: `merged` projections got their update, of `tensors` in `files` weight files.

    `notes` say what is not as the caller may expect.
    """

    folder: Path
    dtype: StoredDtype
    tensors: int
    merged: int
    files: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Update:
    """The two factors of one projection."""

    A: Tensor
    B: Tensor


class _OverflowError(ExportError):
    """A finite value has no finite counterpart in the dtype of the merge."""


def merge(
    base: Path, adapter: Path, out: Path, template: Template, *, dtype: MergeDtype = "auto", card: str = ""
) -> Merged:
    """Write base + adapter to the folder `out`, atomically; `card` is its README.md where there is one.

    `template` is the one that was trained. With `auto` a merge that leaves fp16's range is written in bf16, and the
    notes say so. Raises ExportError where adapter and base do not belong together, listing every tensor, where a file
    cannot be read, and where a merged value does not fit the dtype asked for.
    """
    headers = _headers(weight_files(base))
    updates, scaling = _read_adapter(adapter)
    _check(base, headers, updates)
    chosen = _own_dtype(headers) if dtype == "auto" else dtype
    try:
        return _write(base, out, template, updates, scaling, chosen, card)
    except _OverflowError as error:
        if dtype != "auto" or chosen != "fp16":
            raise
        note = f"the base is fp16 and the merged model bf16: {error.message}"
    return replace(_write(base, out, template, updates, scaling, "bf16", card), notes=(note,))


def _write(
    base: Path,
    out: Path,
    template: Template,
    updates: Mapping[str, _Update],
    scaling: float,
    dtype: StoredDtype,
    card: str,
) -> Merged:
    config = read_config(base)
    files = weight_files(base)
    total_tensors = total_bytes = 0
    weight_map: dict[str, str] = {}
    with atomic_folder(out) as folder:
        for file in files:
            shard, metadata = _merged_shard(file, config, updates, scaling, DTYPES[dtype][0])
            save_file(shard, folder / file.name, metadata=metadata)
            total_tensors += len(shard)
            total_bytes += sum(tensor.nbytes for tensor in shard.values())
            weight_map |= dict.fromkeys(shard, file.name)
        if (base / INDEX).is_file():
            write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        _write_config(base, folder, template, DTYPES[dtype][1])
        write_tokenizer(base, folder, template)
        if card:
            write_text(folder / "README.md", card)
    return Merged(out, dtype, total_tensors, len(updates), len(files))


def _read_adapter(folder: Path) -> tuple[dict[str, _Update], float]:
    """(weight name in the base -> its two factors, s)."""
    spec, _ = read_adapter_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise ExportError(f"{folder} has no {WEIGHTS}", "train again, or give the folder of a whole adapter")
    try:
        check_safetensors(path)
        stored = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, FileError, OSError) as error:
        raise ExportError(f"{path} cannot be read: {error}", "train again, or save the adapter again") from error
    owners = {name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX) for name in stored}
    whole = {owner for owner in owners if owner + A_SUFFIX in stored and owner + B_SUFFIX in stored}
    if stray := sorted(name for name in stored if name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX) not in whole):
        raise ExportError(f"{path} holds tensors that are no pair of LoRA factors:\n" + _listed(stray),
                          "save the adapter again; only plain LoRA can be merged")  # fmt: skip
    updates = {f"{owner}.weight": _Update(stored[owner + A_SUFFIX], stored[owner + B_SUFFIX]) for owner in whole}
    return updates, spec.scaling


def _listed(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


@contextmanager
def _readable(file: Path) -> Iterator[Header]:
    """Around the reading of one of the base's weight files, with its header: ExportError where it is not whole."""
    try:
        yield check_safetensors(file)
    except (SafetensorError, FileError, OSError) as error:
        remedy = "fetch the base again: the file is damaged, or its download was not completed"
        raise ExportError(f"{file} cannot be read: {error}", remedy) from error


def _headers(files: tuple[Path, ...]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        with _readable(file) as header:
            found |= header.tensors
    return found


def _own_dtype(headers: Mapping[str, StoredTensor]) -> StoredDtype:
    """The 16-bit dtype of the base's files (config.json may say another); of both kinds the one with more elements."""
    half, brain = (
        sum(math.prod(stored.shape) for stored in headers.values() if stored.dtype == kind) for kind in ("F16", "BF16")
    )
    return "fp16" if half > brain else "bf16"


def _check(base: Path, headers: Mapping[str, StoredTensor], updates: Mapping[str, _Update]) -> None:
    problems = [f"{name}: the base has no such weight" for name in sorted(updates) if name not in headers]
    for name, update in sorted(updates.items()):
        made = (*update.B.shape[:1], *update.A.shape[1:])  # of tensors with one dimension too
        if name in headers and (headers[name].shape != made or update.A.shape[:1] != update.B.shape[1:]):
            problems.append(f"{name}: {headers[name].shape} in the base, {made} in the adapter")
    if problems:
        raise ExportError(
            f"the adapter does not fit the base in {base}, {len(problems)} problem(s):\n" + _listed(problems),
            "give the base that the adapter was trained on (adapter_config.json names it)",
        )


def _merged_shard(
    file: Path, config: ModelConfig, updates: Mapping[str, _Update], scaling: float, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    with _readable(file), safe_open(file, framework="pt") as shard:
        metadata = dict(shard.metadata() or {}) | {"format": "pt"}
        for name in shard.keys():  # noqa: SIM118  (not a dict)
            # A tied head is the embedding; a copy of it that an old base carries is read by nobody.
            if config.tied and name == "lm_head.weight":
                continue
            stored, update = shard.get_tensor(name), updates.get(name)
            if update is not None:
                summed = stored.float() + merge_delta(update.A, update.B, scaling)
                tensors[name] = _rounded(name, summed, dtype)
            else:
                tensors[name] = _rounded(name, stored, dtype) if stored.is_floating_point() else stored
    return tensors, metadata


def _rounded(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`; the same tensor where it is in it already."""
    rounded = values.to(dtype)
    if rounded is not values and not bool(torch.isfinite(rounded).all()):
        if not bool(torch.isfinite(values).all()):
            remedy = "the base or the adapter is damaged: fetch the base again, or train again"
            raise ExportError(f"{name} holds values that are not finite", remedy)
        most = values.abs().max().item()
        called = str(dtype).removeprefix("torch.")
        raise _OverflowError(f"{name} holds values up to {most:.4g}, which are not finite in {called}")
    return rounded.contiguous()


def _object(path: Path) -> dict[str, object]:
    """The JSON object at `path`, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except FileError as error:
        raise ExportError(error.message, "fetch the base again") from error


def _write_config(base: Path, folder: Path, template: Template, dtype: str) -> None:
    config = _object(base / "config.json")
    config.pop("torch_dtype", None)  # transformers' old name for the same key
    config |= {"dtype": dtype, "eos_token_id": list(template.stop_ids)}
    write_json(folder / "config.json", config)


def _write_generation(base: Path, folder: Path, template: Template) -> None:
    """generation_config.json: the base's, ending at the stop tokens of the template that was trained."""
    generation = _object(base / "generation_config.json")
    stops = list(template.stop_ids)
    generation |= {"eos_token_id": stops}
    if generation.get("bos_token_id") is None and template.tokenizer.bos_id is not None:
        generation["bos_token_id"] = template.tokenizer.bos_id
    if generation.get("pad_token_id") is None:
        # Without one transformers warns and takes the end token; it is only ever masked.
        padding = _object(base / "config.json").get("pad_token_id")
        generation["pad_token_id"] = stops[0] if padding is None else padding
    write_json(folder / "generation_config.json", generation)


def write_tokenizer(base: Path, folder: Path, template: Template) -> None:
    """Put the base's tokenizer into `folder`, with the chat template that was trained and the tokens it stops at.

    For a merged model and for an adapter alike: `load_tokenizer(folder)` then asks and stops as in training.
    """
    check_folder(base)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    settings = _object(base / "tokenizer_config.json")
    source, eos = template.chat_template_source, template.tokenizer.eos_token
    settings["chat_template"] = source  # read by older programs; transformers itself reads the .jinja file
    if not settings.get("eos_token") and eos is not None:
        settings["eos_token"] = eos
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "chat_template.jinja", source)
    _write_generation(base, folder, template)
