"""Adapters on disk, in PEFT's layout: what we write PeftModel loads, and what PEFT wrote we load.

    adapter_config.json          rank, alpha, targets, rsLoRA flag, base model
    adapter_model.safetensors    base_model.model.<projection>.lora_A.weight (r, I) and .lora_B.weight (O, r), fp32

PEFT has many kinds of adapter; a config that asks for what plain LoRA on the seven projections does not do is refused
by the name of the key, never loaded as something else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from luthier.errors import ModelError
from luthier.guard.documents import read_object
from luthier.guard.header import check_safetensors
from luthier.guard.inside import check_folder
from luthier.model.decoder import Decoder
from luthier.model.lora import LoRA, LoRASpec, add_lora, lora_parameters, lora_shapes, projections
from luthier.model.tensor_file import write_tensors
from luthier.runs import write_json

__all__ = ["load_adapter", "lora_spec", "read_adapter_config", "save_adapter", "write_adapter"]

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

PINNED = re.compile(r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}", re.ASCII)
"""A base on the hub, at one commit; PEFT has a key of its own for the commit."""

HARMLESS = (
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("use_rslora", "init_lora_weights", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("layers_pattern", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
)
"""Keys of PEFT that are read here, or that change nothing in a trained plain LoRA. Any other must be off."""

_SHOWN = 200
"""Problems of an adapter that are listed."""

PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights as they are; PiSSA, OLoRA, CorDA and LoftQ do not."""


def save_adapter(decoder: Decoder, folder: Path, *, base: str) -> None:
    """Write the decoder's LoRA into `folder`, each file atomically; `base` is the model that it belongs to.

    Other files in the folder stay. Raises ValueError where the decoder has no LoRA.
    """
    spec = lora_spec(decoder)
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, spec, {name: leaf.detach().cpu() for name, leaf in lora_parameters(decoder).items()}, base)


def write_adapter(folder: Path, spec: LoRASpec, masters: Mapping[str, torch.Tensor], base: str) -> None:
    """The same of `masters`, the decoder's LoRA by parameter (CPU, fp32), into a folder that is there."""
    repository, _, commit = base.rpartition("@") if PINNED.fullmatch(base) else (base, "", None)
    beside = folder / f".{WEIGHTS}.{os.getpid()}.tmp"
    write_tensors(beside, {f"{PREFIX}{name}": leaf for name, leaf in masters.items()}, {"format": "pt"})
    beside.replace(folder / WEIGHTS)
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": repository,
            "revision": commit,
            "r": spec.rank,
            "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
            "lora_dropout": spec.dropout,
            "target_modules": list(spec.targets),
            "use_rslora": spec.scale == "rslora",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
        },
    )


def read_adapter_config(folder: Path) -> tuple[LoRASpec, str]:
    """(what the adapter is, the name of its base model).

    Raises ModelError where it is not a plain LoRA, FileError where a file of it is damaged or not its own.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} has no {CONFIG}, so it is not an adapter", "Give the folder of a PEFT adapter.")
    check_folder(folder)
    document = read_object(path)
    _refuse_unknown(document, path)
    rank, alpha, dropout = document.get("r"), document.get("lora_alpha"), document.get("lora_dropout", 0.0)
    targets, base = document.get("target_modules"), document.get("base_model_name_or_path")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or not isinstance(dropout, (int, float)):
        raise ModelError(f"{path}: `r`, `lora_alpha` and `lora_dropout` must be numbers", "Save the adapter again.")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ModelError(f"{path}: `target_modules` must be a list of projection names, not {targets!r}",
                         "Save the adapter with a list such as [q_proj, v_proj].")  # fmt: skip
    if rank < 1 or not 0 <= dropout < 1:
        raise ModelError(
            f"{path}: `r` is {rank} and `lora_dropout` {dropout}, which cannot be", "Save the adapter again."
        )
    scale: Literal["standard", "rslora"] = "rslora" if document.get("use_rslora") else "standard"
    spec = LoRASpec(rank, float(alpha), float(dropout), tuple(targets), scale)
    name, commit = base if isinstance(base, str) else "", document.get("revision")
    if isinstance(commit, str) and PINNED.fullmatch(f"{name}@{commit}") and not Path(name).exists():
        name = f"{name}@{commit}"
    return spec, name


def _refuse_unknown(document: Mapping[str, object], path: Path) -> None:
    if document.get("peft_type") != "LORA":
        raise ModelError(f"{path}: `peft_type` is {document.get('peft_type')!r}; only LORA is implemented",
                         "Use a LoRA adapter.")  # fmt: skip
    asked = [
        f"{key}: {value!r}"
        for key, value in document.items()
        if key not in HARMLESS and value and not (key == "bias" and value == "none")
    ]
    if document.get("init_lora_weights", True) not in PLAIN_INITS:
        asked.append(f"init_lora_weights: {document['init_lora_weights']!r}")
    if asked:
        raise ModelError(
            f"{path} asks for what plain LoRA does not do: {', '.join(asked)}",
            "Merge this adapter into its base with PEFT and tune the merged model.",
        )


def lora_spec(decoder: Decoder) -> LoRASpec:
    """What the decoder's LoRA is. Raises ValueError where it has none."""
    spec = _spec_of(decoder)
    if spec is None:
        raise ValueError("this decoder has no LoRA to save")
    return spec


def _spec_of(decoder: Decoder) -> LoRASpec | None:
    return next((p.adapter.spec for _, p in projections(decoder) if isinstance(p.adapter, LoRA)), None)


def _kind(spec: LoRASpec) -> tuple[int, tuple[str, ...], float]:
    return spec.rank, spec.targets, spec.scaling


def load_adapter(decoder: Decoder, folder: Path) -> None:
    """Put the adapter in `folder` into `decoder`, adding a LoRA of its kind where there is none.

    Raises ModelError for a LoRA of another kind, and for every tensor that is missing, unexpected or misshaped;
    FileError where a file is damaged or not the folder's own. Nothing is changed then.
    """
    spec, _ = read_adapter_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}; pickled adapters (.bin) are not read",
                         "Load it with PEFT and save it again: PEFT writes safetensors.")  # fmt: skip
    present = _spec_of(decoder)
    if present is not None and _kind(present) != _kind(spec):
        raise ModelError(f"{folder} holds {spec}, the model has {present}", "Load the base model anew.")
    # By the header alone: a rank of a billion is refused before memory is taken for it.
    stored = {name: found.shape for name, found in check_safetensors(path).tensors.items()}
    if problems := _misfits(stored, lora_shapes(decoder, spec)):
        listed = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        said = f"the adapter {folder} does not fit this model:\n{listed}{more}"
        raise ModelError(said, "Use it with its own base model.")
    try:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "Save or fetch the adapter again.") from error
    if present is None:
        add_lora(decoder, spec, seed=0)
    masters = lora_parameters(decoder)
    with torch.no_grad():
        for name, tensor in tensors.items():
            masters[name].copy_(tensor)


def _misfits(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, int]]) -> list[str]:
    """What is wrong with the stored tensors (names as in the file -> shapes), one line each."""
    shapes = {name.removeprefix(PREFIX): shape for name, shape in stored.items()}
    problems = [f"{name}: missing" for name in wanted if name not in shapes]
    problems += [f"{name[:200]}: no such place in this model" for name in shapes if name not in wanted]
    problems += [
        f"{name}: {shape}, this model needs {wanted[name]}"
        for name, shape in shapes.items()
        if name in wanted and wanted[name] != shape
    ]
    again = [name for name in stored if PREFIX + name in stored]
    problems += [f"{name[:200]}: twice, with {PREFIX} before it and without" for name in again]
    return problems
