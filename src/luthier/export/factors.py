"""An adapter's two factors for every projection, held against its base: merges and adapter exports start from them.

Legend: r rank, I inputs and O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from luthier.errors import ExportError, FileError
from luthier.export.origin import other_base
from luthier.guard.header import Header, check_safetensors
from luthier.model.adapter import PREFIX, WEIGHTS, read_adapter_config
from luthier.model.decoder import Decoder
from luthier.model.load import check_weights
from luthier.model.locate import weight_files
from luthier.model.lora import LoRASpec, lora_shapes

__all__ = ["Factors", "Pair", "read_factors", "readable"]

_SHOWN = 200
"""How many problems are listed; the rest is counted."""

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


class Pair(NamedTuple):
    """A (r, I) and B (O, r) of one projection, as they are stored; the update is s B A."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Factors:
    """`pairs` by the projection's name in the base, such as `model.layers.0.self_attn.q_proj`; of the base the headers
    of its weight files, and a decoder without weights (`empty`)."""

    spec: LoRASpec
    pairs: Mapping[str, Pair]
    headers: Mapping[Path, Header]
    empty: Decoder


def read_factors(adapter: Path, base: Path) -> Factors:
    """The PEFT adapter in the folder `adapter`, for the model in the folder `base`.

    Raises ExportError where a file cannot be read, and where the two do not belong together, listing every tensor.
    """
    headers = _headers(weight_files(base))
    pairs, spec = _read_adapter(adapter)
    _check(base, adapter, headers, pairs, spec)
    empty = check_weights(base)
    _check_missing(adapter, pairs, empty, spec)
    return Factors(spec, pairs, headers, empty)


def _read_adapter(folder: Path) -> tuple[dict[str, Pair], LoRASpec]:
    """(projection's name -> its two factors, what the adapter says of itself)."""
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
    return {owner: Pair(stored[owner + A_SUFFIX], stored[owner + B_SUFFIX]) for owner in sorted(whole)}, spec


def _listed(lines: list[str]) -> str:
    shown = lines[:_SHOWN] + [f"and {len(lines) - _SHOWN:,} more"] * (len(lines) > _SHOWN)
    return "\n".join(f"  {line}" for line in shown)


@contextmanager
def readable(file: Path) -> Iterator[Header]:
    """Around the reading of one of the base's weight files, with its header: ExportError where it is not whole."""
    try:
        yield check_safetensors(file)
    except (SafetensorError, FileError, OSError) as error:
        remedy = "fetch the base again: the file is damaged, or its download was not completed"
        raise ExportError(f"{file} cannot be read: {error}", remedy) from error


def _headers(files: tuple[Path, ...]) -> dict[Path, Header]:
    found: dict[Path, Header] = {}
    for file in files:
        with readable(file) as header:
            found[file] = header
    return found


def _check(
    base: Path, adapter: Path, headers: Mapping[Path, Header], pairs: Mapping[str, Pair], spec: LoRASpec
) -> None:
    """That base and adapter belong together, by shapes and by what the adapter says of its base's files."""
    shapes = {name: stored.shape for header in headers.values() for name, stored in header.tensors.items()}
    problems: list[str] = []
    for owner, pair in sorted(pairs.items()):
        name = f"{owner}.weight"
        made = (*pair.B.shape[:1], *pair.A.shape[1:])  # of tensors with one dimension too
        if name not in shapes:
            problems.append(f"{name}: the base has no such weight")
        elif shapes[name] != made or pair.A.shape[:1] != pair.B.shape[1:]:
            problems.append(f"{name}: {shapes[name]} in the base, {made} in the adapter")
        elif pair.A.shape[0] != spec.rank:
            problems.append(f"{name}: rank {pair.A.shape[0]} in its tensors, {spec.rank} in adapter_config.json")
    if another := other_base(adapter, base):
        problems.append(f"the files: {another}")
    if problems:
        raise ExportError(
            f"the adapter does not fit the base in {base}, {len(problems)} problem(s):\n" + _listed(problems),
            "give the base that the adapter was trained on (adapter_config.json names it)",
        )


def _check_missing(adapter: Path, pairs: Mapping[str, Pair], empty: Decoder, spec: LoRASpec) -> None:
    owners = sorted({name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX) for name in lora_shapes(empty, spec)})
    if missing := [f"{name}: adapted by adapter_config.json" for name in owners if name not in pairs]:
        raise ExportError(
            f"{adapter / WEIGHTS} lacks {len(missing)} of the {len(owners)} pairs that adapter_config.json says it "
            "has:\n" + _listed(missing),
            "save the adapter again: a part of it was lost",
        )
