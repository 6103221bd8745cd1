"""Checkpoints: everything a run needs to go on as if it had not stopped. safetensors and JSON, no pickle.

    checkpoints/last/, checkpoints/best/
        adapter/                 the adapter in PEFT's layout (fp32): loads in PEFT as it is
        optimizer.safetensors    the optimizer's tensors, `<parameter>/<moment>`
        rng.safetensors          the states of torch's random generators: `cpu`, and `cuda` there
        state.json               step, figures so far, loss scale, and what the run is (settings, data, base)

A checkpoint is written beside its place and renamed: at every moment the old one or the new one is there, whole. The
learning rate and the position in the data follow from `step` alone, so they are not stored. A run is continued only
by the run it is: `load_checkpoint` refuses, with the differences, when settings, data or base have changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import orjson
import torch
from pydantic import JsonValue, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from luthier.data.conversation import Example, Source
from luthier.errors import TrainingError, UsageError
from luthier.model.adapter import load_adapter, save_adapter
from luthier.plan.settings import Settings
from luthier.runs import SCHEMA_VERSION, atomic_folder, read_json, write_json
from luthier.train.optimizer import load_state, state_tensors
from luthier.train.step import Trainee

__all__ = [
    "Identity",
    "Progress",
    "TrainingRows",
    "check_identity",
    "generator_states",
    "identify",
    "load_checkpoint",
    "read_progress",
    "restore_generators",
    "save_checkpoint",
]


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` updates applied, and what was measured on the way.

    `tokens` real tokens trained on; `seconds` of training and evaluation, over all sittings; `evaluated` the last step
    with a held-out loss (None before the first); `best_*` the lowest held-out loss of the steps after 0.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated: int | None = None
    first_eval: float | None = None
    last_eval: float | None = None
    best_eval: float | None = None
    best_step: int | None = None


class TrainingRows(Protocol):
    """What training takes of a data.prepare.Dataset: its rows, and where each stands in the user's files."""

    @property
    def train(self) -> Sequence[Example]: ...
    @property
    def eval(self) -> Sequence[Example]: ...
    @property
    def places(self) -> Sequence[Source]: ...
    @property
    def digest(self) -> str: ...


@dataclass(frozen=True)
class Identity:
    """What makes a run this run: every resolved setting, the base model's name, and a digest of the tokens it sees."""

    base: str
    data: str
    settings: Mapping[str, JsonValue]


@dataclass(frozen=True)
class _State:
    """`state.json`."""

    schema: int
    progress: Progress
    identity: Identity
    loss_scale: Mapping[str, float | int] | None


_STATE = TypeAdapter(_State)


def identify(settings: Settings, dataset: TrainingRows, base: str) -> Identity:
    """The identity of a run with these settings on this data, which its digest stands for."""
    as_json: dict[str, JsonValue] = orjson.loads(orjson.dumps(asdict(settings)))
    return Identity(base=base, data=dataset.digest, settings=as_json)


def save_checkpoint(folder: Path, trainee: Trainee, progress: Progress, identity: Identity) -> None:
    """Write a whole checkpoint to `folder`, taking the place of an older one only when complete."""
    with atomic_folder(folder) as beside:
        save_adapter(trainee.decoder, beside / "adapter", base=identity.base)
        save_file(state_tensors(trainee.optimizer, trainee.parameters), beside / "optimizer.safetensors")
        save_file(generator_states(trainee.decoder.device), beside / "rng.safetensors")
        scale = None if trainee.scaler is None else trainee.scaler.state_dict()
        write_json(beside / "state.json", _State(SCHEMA_VERSION, progress, identity, scale))


def load_checkpoint(folder: Path, trainee: Trainee, identity: Identity) -> Progress:
    """Put the state in `folder` into `trainee` and torch's generators; returns how far it was.

    Raises UsageError, listing the differences, when it is not of the run `identity` says, and TrainingError when it is
    damaged.
    """
    check_identity(folder, identity)
    state = _read_state(folder)
    load_adapter(trainee.decoder, folder / "adapter")
    try:
        moments = load_file(folder / "optimizer.safetensors")
        generators = load_file(folder / "rng.safetensors")
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, str(error)) from error
    load_state(trainee.optimizer, trainee.parameters, moments)
    if trainee.scaler is not None and state.loss_scale is not None:
        trainee.scaler.load_state_dict(dict(state.loss_scale))
    restore_generators(trainee.decoder.device, generators)
    return state.progress


def check_identity(folder: Path, identity: Identity) -> None:
    """Raise UsageError, listing the differences, when the checkpoint in `folder` is not of the run `identity` says."""
    differences = _differences(_read_state(folder).identity, identity)
    if differences:
        listed = "\n".join(f"  {difference}" for difference in differences)
        raise UsageError(
            f"{folder}: the run that was begun is not the one asked for now:\n{listed}",
            "give the run's own recipe.yaml and data (and no other --set), or train into another directory (--out)",
        )


def read_progress(folder: Path) -> Progress:
    """How far the checkpoint in `folder` was. Raises TrainingError when it is damaged."""
    return _read_state(folder).progress


def _read_state(folder: Path) -> _State:
    try:
        state = _STATE.validate_python(read_json(folder / "state.json"))
    except (OSError, orjson.JSONDecodeError, ValidationError) as error:
        raise _damaged(folder, str(error)) from error
    if state.schema != SCHEMA_VERSION:
        raise _damaged(folder, f"its schema is {state.schema}, and this version of luthier reads {SCHEMA_VERSION}")
    return state


def _damaged(folder: Path, what: str) -> TrainingError:
    return TrainingError(
        f"{folder}: not a checkpoint that can be continued: {what}", "train again, into another directory (--out)"
    )


def _differences(then: Identity, now: Identity) -> list[str]:
    found = [
        f"{name}: {then.settings.get(name)} then, {now.settings.get(name)} now"
        for name in sorted({*then.settings, *now.settings})
        if then.settings.get(name) != now.settings.get(name)
    ]
    if then.base != now.base:
        found.append(f"model: {then.base} then, {now.base} now")
    if then.data != now.data:
        found.append("data: the tokens or labels of the rows are not those the run was begun with")
    return found


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's random generators: the CPU's, and that of the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_generators(device: torch.device, states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `generator_states` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps":
        torch.mps.set_rng_state(states["mps"])
