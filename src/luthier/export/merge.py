"""Base + adapter -> a model of its own, in the base's layout.

    W' = W + s B A        per adapted projection, summed in fp32 and rounded once to the output dtype

The output is 16-bit in the base's own dtype: fp16 of an fp16 base, else bf16.

W is taken from the base's files as they are, also after QLoRA. The adapter was trained against the NF4-rounded W then;
`How.onto_quantised` takes these rounded weights instead (unpacked, so the model is no smaller), for all projections of
the layers, adapted or not. Which of the two is better on held-out rows is measured (losses.py), not believed.

One tensor is in memory at a time, under a file mapping of its own, so what a merge needs does not grow with the shards.
Tensors without an adapter are copied, bit for bit where the dtype stays, as it does for a 16-bit base.

The folder gets the template that was trained as its chat template, and the template's stop tokens as those of
`generate`, so that whoever loads it asks in the trained form and the answer ends.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from luthier.data.render import Template
from luthier.errors import ExportError, FileError
from luthier.export.factors import Factors, read_factors, readable
from luthier.export.origin import note_merge
from luthier.export.room import check_room
from luthier.export.unmerge import record
from luthier.guard.documents import read_object
from luthier.guard.header import Header, StoredTensor
from luthier.guard.inside import check_folder
from luthier.model.load import is_ignored
from luthier.model.locate import INDEX
from luthier.model.lora import merge_delta, projections
from luthier.model.tensor_file import Slot, write_streamed
from luthier.runs import atomic_folder, write_json, write_text

__all__ = ["DTYPES", "PLAIN", "How", "MergeDtype", "Merged", "StoredDtype", "merge", "write_tokenizer"]

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


@dataclass(frozen=True)
class How:
    """What else a merge may be asked for.

    `onto_quantised`: merge into the NF4-rounded weights; it is the compute dtype of the training, in which they were
    rounded. None: into the base's own. `reversible`: keep beside the weights what unmerge.py needs.
    """

    onto_quantised: StoredDtype | None = None
    reversible: bool = False


PLAIN = How()
"""Into the base's own weights, and no more."""


@dataclass(frozen=True)
class Merged:
    """A folder that was written: `merged` projections got their update, of `tensors` in `files` weight files.

    `notes` say what is not as the caller may expect; `onto` is `16-bit` or `nf4`, the weights that were added to.
    """

    folder: Path
    dtype: StoredDtype
    tensors: int
    merged: int
    files: int
    notes: tuple[str, ...] = ()
    onto: str = "16-bit"


class _OverflowError(ExportError):
    """A finite value has no finite counterpart in the dtype of the merge."""


@dataclass(frozen=True)
class _Job:
    """One merge: base and adapter, checked against each other."""

    base: Path
    factors: Factors
    projections: frozenset[str]
    how: How

    def written(self, header: Header) -> dict[str, StoredTensor]:
        """The tensors of a file that go along: all but those that nobody reads, as the copy of a tied head."""
        return {
            name: stored
            for name, stored in header.tensors.items()
            if not is_ignored(name, self.factors.empty.config.tied)
        }


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    template: Template,
    *,
    dtype: MergeDtype = "auto",
    card: str = "",
    how: How = PLAIN,
) -> Merged:
    """Write base + adapter to the folder `out`, atomically; `card` is its README.md where there is one.

    `template` is the one that was trained. With `auto` a merge that leaves fp16's range is written in bf16, and the
    notes say so. Raises ExportError where adapter and base do not belong together, listing every tensor, where a file
    cannot be read, and where a merged value does not fit the dtype asked for; FitError where the disk has no room.
    """
    factors = read_factors(adapter, base)
    job = _Job(base, factors, frozenset(f"{name}.weight" for name, _ in projections(factors.empty)), how)
    chosen = _own_dtype(factors.headers) if dtype == "auto" else dtype
    _check_room(job, out, chosen)
    notes: tuple[str, ...] = ()
    try:
        made = _write(job, adapter, out, template, chosen, card)
    except _OverflowError as error:
        if dtype != "auto" or chosen != "fp16":
            raise
        notes = (f"the base is fp16 and the merged model bf16: {error.message}",)
        made = _write(job, adapter, out, template, "bf16", card)
    return replace(made, notes=notes)


def _check_room(job: _Job, out: Path, dtype: StoredDtype) -> None:
    width, kept = DTYPES[dtype][0].itemsize, 0
    for file, header in job.factors.headers.items():
        kept += sum(math.prod(stored.shape) * width for stored in job.written(header).values())
        kept += file.stat().st_size * job.how.reversible  # what it comes to is known when it is written; at most this
    check_room(out, kept, "the merged model")


def _write(job: _Job, adapter: Path, out: Path, template: Template, dtype: StoredDtype, card: str) -> Merged:
    total_tensors = total_bytes = 0
    weight_map: dict[str, str] = {}
    onto = "16-bit" if job.how.onto_quantised is None else "nf4"
    with atomic_folder(out) as folder:
        for file, header in job.factors.headers.items():
            slots = _merge_file(job, file, header, folder / file.name, DTYPES[dtype][0])
            total_tensors += len(slots)
            total_bytes += sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in slots.values())
            weight_map |= dict.fromkeys(slots, file.name)
            if job.how.reversible:
                record(job.base, folder, file.name)
        if (job.base / INDEX).is_file():
            write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        _write_config(job.base, folder, template, DTYPES[dtype][1])
        write_tokenizer(job.base, folder, template)
        note_merge(folder, job.base, adapter, onto)
        if card:
            write_text(folder / "README.md", card)
    return Merged(out, dtype, total_tensors, len(job.factors.pairs), len(job.factors.headers), onto=onto)


def _own_dtype(headers: Mapping[Path, Header]) -> StoredDtype:
    """The 16-bit dtype of the base's files (config.json may say another); of both kinds the one with more elements."""
    every = [stored for header in headers.values() for stored in header.tensors.values()]
    half, brain = (sum(math.prod(stored.shape) for stored in every if stored.dtype == kind) for kind in ("F16", "BF16"))
    return "fp16" if half > brain else "bf16"


def _merge_file(job: _Job, file: Path, header: Header, out: Path, dtype: torch.dtype) -> dict[str, Slot]:
    """Write one of the base's weight files merged; what it holds."""
    slots = {name: Slot(dtype, stored.shape) for name, stored in job.written(header).items()}

    def make(name: str) -> Tensor:
        with readable(file), safe_open(file, framework="pt") as shard:
            return _merged(job, name, shard.get_tensor(name), dtype)

    write_streamed(out, slots, make, dict(header.metadata) | {"format": "pt"})
    return slots


def _merged(job: _Job, name: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
    rounds = job.how.onto_quantised
    if rounds is not None and name in job.projections:
        from luthier.model.quantize import round_to_nf4  # bitsandbytes takes a second to import

        stored = round_to_nf4(stored.to(DTYPES[rounds][0]))
    pair = job.factors.pairs.get(name.removesuffix(".weight"))
    if pair is not None:
        return _rounded(name, merge_delta(pair.A, pair.B, job.factors.spec.scaling).add_(stored), dtype)
    return _rounded(name, stored, dtype)


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
