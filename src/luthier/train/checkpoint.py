"""One checkpoint: everything a run needs to go on as if it had not stopped. safetensors and JSON, no pickle.

    step-000100/
        adapter/                 the adapter in PEFT's layout (fp32): loads in PEFT as it is
        optimizer.safetensors    the optimizer's tensors, `<parameter>/<moment>`
        rng.safetensors          the states of torch's random generators: `cpu`, and that of the device
        state.json               step, figures so far, loss scale, and what the run is (settings, data, base)
        manifest.json            size and SHA-256 of each of these (manifest.py)

A snapshot is a copy of all that, taken between two steps; writing it can then take its time while training goes on.

The learning rate and the position in the data follow from `step` alone, so they are not loaded: state.json says them
for whoever reads it (`follows`). torch's generators are all that a run draws from: the order of the rows comes from
generators made anew for every epoch (data/epochs.py), and nothing draws from Python's `random` or from numpy's global
generator (a test holds both still).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from luthier.errors import TrainingError
from luthier.guard.header import check_safetensors
from luthier.model.adapter import load_adapter, lora_spec, write_adapter
from luthier.model.lora import LoRASpec
from luthier.model.tensor_file import write_tensors
from luthier.runs import write_json
from luthier.train.identity import Identity, settings_digest
from luthier.train.manifest import MANIFEST, SCHEMA, Manifest, faults, read, seal
from luthier.train.optimizer import load_state, state_tensors
from luthier.train.step import Trainee

__all__ = [
    "Follows",
    "MadeWith",
    "Progress",
    "Snapshot",
    "State",
    "generator_states",
    "load_checkpoint",
    "made_with",
    "read_state",
    "restore_generators",
    "take_snapshot",
    "write_checkpoint",
]

STATE, OPTIMIZER, GENERATORS = "state.json", "optimizer.safetensors", "rng.safetensors"
_LONGEST_STATE = 2**26


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` updates applied, and what was measured on the way.

    `tokens` real tokens trained on; `seconds` of training and evaluation, over all sittings; `evaluated` the last step
    with a held-out loss (None before the first); `best_*` the lowest held-out loss of the steps after 0; `history` all
    of them, as (step, loss); `skipped` how many of the steps were left out for a loss that was not finite.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated: int | None = None
    first_eval: float | None = None
    last_eval: float | None = None
    best_eval: float | None = None
    best_step: int | None = None
    history: tuple[tuple[int, float], ...] = ()
    skipped: int = 0

    @property
    def ranked(self) -> list[tuple[int, float]]:
        """(step, held-out loss) of the steps after 0, the best first; of equals the earlier, the best when it came."""
        return sorted(((step, loss) for step, loss in self.history if step > 0), key=lambda one: (one[1], one[0]))


@dataclass(frozen=True)
class Follows:
    """What follows from `step` and the settings, for whoever reads state.json; it is not loaded.

    The next update takes `batch_size` units from `unit` of `epoch` on (both from 0; a unit is a row, with packing a
    pack), at `learning_rate`.
    """

    epoch: int
    unit: int
    units_per_epoch: int
    learning_rate: float


@dataclass(frozen=True)
class MadeWith:
    """What the last bits of a sum depend on. `card`: the GPU's name; "" where none computes."""

    torch: str
    threads: int
    processor: str
    card: str = ""


@dataclass(frozen=True)
class State:
    """`state.json`. `recipe_sha256` is of recipe.yaml as the sitting began (None: there was none), `plan_sha256` of the
    settings in plan.json (identity.py's `settings_digest`)."""

    schema: int
    progress: Progress
    follows: Follows
    identity: Identity
    recipe_sha256: str | None
    plan_sha256: str
    made_with: MadeWith
    loss_scale: Mapping[str, float | int] | None


@dataclass(frozen=True)
class Snapshot:
    """A run's state between two steps, copied to the host: training may go on and it stays as it is."""

    state: State
    spec: LoRASpec
    masters: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    generators: Mapping[str, torch.Tensor]

    @property
    def step(self) -> int:
        """Updates done."""
        return self.state.progress.step


_STATE = TypeAdapter(State)


def made_with(device: torch.device) -> MadeWith:
    """As it is now, in this process, where `device` computes."""
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return MadeWith(torch.__version__, torch.get_num_threads(), processor, card)


def take_snapshot(
    trainee: Trainee, progress: Progress, identity: Identity, follows: Follows, recipe_sha256: str | None
) -> Snapshot:
    """Copy the state of `trainee` and of torch's generators. To be called between two steps."""

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", copy=True)

    decoder = trainee.decoder
    state = State(
        schema=SCHEMA,
        progress=progress,
        follows=follows,
        identity=identity,
        recipe_sha256=recipe_sha256,
        plan_sha256=settings_digest(identity.settings),
        made_with=made_with(decoder.device),
        loss_scale=None if trainee.scaler is None else trainee.scaler.state_dict(),
    )
    # On a CPU these are the live tensors, and so are the paged optimizer's on a GPU: its memory is the host's too.
    moments = state_tensors(trainee.optimizer, trainee.parameters)
    return Snapshot(
        state=state,
        spec=lora_spec(decoder),
        masters={name: copied(leaf) for name, leaf in trainee.parameters.items()},
        moments={name: copied(moment) for name, moment in moments.items()},
        generators=generator_states(decoder.device),
    )


def write_checkpoint(folder: Path, snapshot: Snapshot) -> None:
    """Write a whole checkpoint into `folder`, which is empty, each file flushed to disk, the manifest last."""
    adapter = folder / "adapter"
    adapter.mkdir(mode=0o700)
    write_adapter(adapter, snapshot.spec, snapshot.masters, snapshot.state.identity.base)
    write_tensors(folder / OPTIMIZER, snapshot.moments)
    write_tensors(folder / GENERATORS, snapshot.generators)
    write_json(folder / STATE, snapshot.state)
    seal(folder, "checkpoint", snapshot.step)


def load_checkpoint(folder: Path, trainee: Trainee) -> None:
    """Put the state in `folder`, a checkpoint that was found whole, into `trainee` and torch's generators.

    Raises:
        FileError: a file of tensors is not one, whatever its manifest says.
        ModelError: the adapter is not of this decoder.
        TrainingError: anything else is not what this run's checkpoint has.
    """
    state = read_state(folder)
    for name in ("adapter/adapter_model.safetensors", OPTIMIZER, GENERATORS):
        check_safetensors(folder / name)
    try:
        moments, generators = load_file(folder / OPTIMIZER), load_file(folder / GENERATORS)
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, str(error)) from error
    if state.progress.step > state.progress.skipped and not moments:  # the optimizer has none before its first update
        raise _damaged(folder, f"{OPTIMIZER} is empty")
    load_adapter(trainee.decoder, folder / "adapter")
    load_state(trainee.optimizer, trainee.parameters, moments)
    _load_scale(folder, trainee, state)
    try:
        restore_generators(trainee.decoder.device, generators)
    except (KeyError, RuntimeError, TypeError) as error:
        raise _damaged(folder, f"{GENERATORS} does not hold the states of this device's generators: {error}") from error


def _load_scale(folder: Path, trainee: Trainee, state: State) -> None:
    scaler, scale = trainee.scaler, state.loss_scale
    if scaler is None and scale is None:
        return
    if scaler is None or scale is None or set(scale) != set(scaler.state_dict()):
        raise _damaged(folder, f"the loss scale in {STATE} is not one of a run in this precision")
    scaler.load_state_dict(dict(scale))


def read_state(folder: Path) -> State:
    """`state.json` of the checkpoint in `folder`, held against its manifest.

    Raises TrainingError where it is damaged.
    """
    try:
        manifest = read(folder)
        if manifest.schema != SCHEMA:
            raise _damaged(folder, f"its schema is {manifest.schema}, and this version of luthier reads {SCHEMA}")
        own = {name: record for name, record in manifest.files.items() if name == STATE}
        if not own or own[STATE].bytes > _LONGEST_STATE:
            raise _damaged(folder, f"{MANIFEST} names no {STATE} of a usual size")
        if found := faults(folder, Manifest(manifest.schema, manifest.kind, manifest.step, own)):
            raise _damaged(folder, str(found[0]))
        state = _STATE.validate_python(orjson.loads((folder / STATE).read_bytes()))
    except (OSError, ValueError) as error:  # ValidationError and JSONDecodeError are ValueErrors
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise _damaged(folder, f"{STATE}: {what}" if isinstance(error, ValidationError) else str(what)) from error
    if state.schema != SCHEMA:
        raise _damaged(folder, f"its schema is {state.schema}, and this version of luthier reads {SCHEMA}")
    if state.progress.step != manifest.step:
        raise _damaged(folder, f"{STATE} is of step {state.progress.step}, {MANIFEST} of step {manifest.step}")
    return state


def _damaged(folder: Path, what: str) -> TrainingError:
    return TrainingError(
        f"{folder}: not a checkpoint that can be continued: {what}",
        "remove that folder to go on from the checkpoint before it, or train again into another directory (--out)",
    )


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's random generators: the CPU's, and that of the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_generators(device: torch.device, states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `generator_states` gave. Raises KeyError, RuntimeError or TypeError where it is not that."""
    restore: dict[str, Callable[[torch.Tensor], None]] = {"cpu": torch.set_rng_state}
    if device.type == "cuda":
        restore["cuda"] = lambda state: torch.cuda.set_rng_state(state, device)
    if device.type == "mps":
        restore["mps"] = torch.mps.set_rng_state
    for name, put_back in restore.items():
        put_back(states[name])
