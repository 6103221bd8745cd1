"""Whether a run is what it was: its files to the byte, and its losses when steps are taken again.

Files are held against the manifests that were written with them (manifest.py). Steps are repeated from a checkpoint
with the data, settings, kernels and threads of the run, and loss and gradient norm held against events.jsonl. On a CPU
of the same kind with the same torch they are the same to the last bit; elsewhere within TOLERANCE, for there sums are
added in another order, or in one that is nobody's to choose.
Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import orjson
import torch

from luthier.errors import TrainingError
from luthier.kernels import only_math
from luthier.model.decoder import Decoder
from luthier.plan.settings import Settings
from luthier.runs import RunDirectory
from luthier.train.checkpoint import load_checkpoint, made_with, read_state
from luthier.train.checkpoints import Checkpoints, Pointer, name_of
from luthier.train.identity import TrainingRows
from luthier.train.making import make_batches, make_trainee
from luthier.train.manifest import MANIFEST, Fault, Kind, check, digest, read, strangers
from luthier.train.step import take_step

__all__ = [
    "TOLERANCE",
    "FileCheck",
    "LoggedStep",
    "Repeated",
    "changed_settings",
    "check_files",
    "check_strangers",
    "choose_start",
    "logged_steps",
    "repeat",
]

TOLERANCE = 2.0**-7
"""Relative, of losses and norms where they are not the same to the last bit: a rounding of bf16."""


@dataclass(frozen=True)
class FileCheck:
    """One file of a run, by its path in the run directory. `fault` is None where it is as it was written."""

    file: str
    bytes: int
    fault: Fault | None


@dataclass(frozen=True)
class LoggedStep:
    """What events.jsonl says of a step, and of the sitting that took it: torch's version, threads, processor ("" and 0
    where the log does not say)."""

    loss: float
    grad_norm: float
    learning_rate: float
    torch: str = ""
    threads: int = 0
    processor: str = ""


@dataclass(frozen=True)
class Repeated:
    """A step taken again. `same`: to the last bit where that is to be (`exact`), else within TOLERANCE."""

    step: int
    logged: LoggedStep
    loss: float
    grad_norm: float
    same: bool
    exact: bool


def check_files(run: RunDirectory) -> list[FileCheck]:
    """Every file of the run that something says what it was: checkpoints, LATEST and BEST, the adapter, the event log.

    Reads all of them.
    """
    checkpoints = Checkpoints(run.checkpoints)
    found: list[FileCheck] = []
    for step in reversed(checkpoints.steps()):
        found += _folder(run.path, checkpoints.path(step), "checkpoint", step)
    whole = {step for step in checkpoints.steps() if (name := name_of(step)) and not _faulty(found, name)}
    due: dict[Pointer, int | None] = {"LATEST": max(whole, default=None), "BEST": _best(checkpoints, whole)}
    found += [
        _pointer(run.path, checkpoints, which, whole, step)
        for which, step in due.items()
        if step is not None or (checkpoints.folder / which).exists()
    ]
    if run.adapter.is_dir():
        found += _folder(run.path, run.adapter, "adapter", None)
    elif _has_ended(run):
        fault = Fault("adapter", "is missing", "the adapter that the event log tells of", "no such folder")
        found.append(FileCheck("adapter", 0, fault))
    if run.events.is_file():
        found.append(_events(run.path, run.events))
    return found


def check_strangers(run: RunDirectory) -> list[str]:
    """A line for each folder of the run with files that its manifest does not name."""
    checkpoints, lines = Checkpoints(run.checkpoints), list[str]()
    for folder in (*(checkpoints.path(step) for step in reversed(checkpoints.steps())), run.adapter):
        try:
            others = strangers(folder)
        except ValueError:  # its manifest is not whole, which `check_files` says
            continue
        if others:
            place = folder.relative_to(run.path).as_posix()
            lines.append(f"{place} holds what luthier did not write there, and does not open: {others}")
    return lines


def _faulty(found: list[FileCheck], name: str) -> bool:
    return any(one.fault is not None and f"/{name}/" in f"/{one.file}" for one in found)


def _folder(run: Path, folder: Path, kind: Kind, step: int | None) -> list[FileCheck]:
    place = folder.relative_to(run).as_posix()
    faults = {fault.file: fault for fault in check(folder, kind, step)}
    if MANIFEST in faults:
        return [FileCheck(f"{place}/{MANIFEST}", 0, faults[MANIFEST])]
    files = read(folder).files
    own = FileCheck(f"{place}/{MANIFEST}", (folder / MANIFEST).stat().st_size, None)
    return [*(FileCheck(f"{place}/{name}", record.bytes, faults.get(name)) for name, record in files.items()), own]


def _best(checkpoints: Checkpoints, whole: set[int]) -> int | None:
    """The whole checkpoint of the lowest held-out loss in the newest one's history; of equals the earlier."""
    if not whole:
        return None
    ranked = read_state(checkpoints.path(max(whole))).progress.ranked
    return next((step for step, _ in ranked if step in whole), None)


def _pointer(run: Path, checkpoints: Checkpoints, which: Pointer, whole: set[int], due: int | None) -> FileCheck:
    path = checkpoints.folder / which
    place, size = path.relative_to(run).as_posix(), path.stat().st_size if path.is_file() else 0
    step = checkpoints.pointer(which)
    if step in whole:
        if due in (step, None):
            return FileCheck(place, size, None)
        what = "newest" if which == "LATEST" else "best"
        fault = Fault(which, f"names another than the {what} checkpoint", name_of(due), name_of(step))
        return FileCheck(place, size, fault)
    found = "no such file" if not path.exists() else "no checkpoint's name" if step is None else name_of(step)
    return FileCheck(place, size, Fault(which, "names no whole checkpoint", "the name of one", found))


def _events(run: Path, path: Path) -> FileCheck:
    """Every line but a last one that was cut short is an event: a killed process may leave such a one."""
    place, size = path.relative_to(run).as_posix(), path.stat().st_size
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and _event(line) is None:
                fault = Fault(place, f"line {number} is not an event", "a JSON object with `event` and `step`", "none")
                return FileCheck(place, size, fault)
    return FileCheck(place, size, None)


def _has_ended(run: RunDirectory) -> bool:
    """Whether the log says that the run came to its end, and has not gone on since."""
    if not run.events.is_file():
        return False
    with run.events.open("rb") as file:
        return any((event := _event(line)) is not None and event["event"] == "end" for line in file)


def _event(line: bytes) -> Mapping[str, object] | None:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    is_event = isinstance(found, dict) and isinstance(found.get("event"), str) and isinstance(found.get("step"), int)
    return cast("dict[str, object]", found) if is_event else None


def logged_steps(run: RunDirectory) -> dict[int, LoggedStep]:
    """The steps in events.jsonl; lines that are none are passed over (`check_files` names them)."""
    found: dict[int, LoggedStep] = {}
    sitting = _sitting({})
    if not run.events.is_file():
        return found
    with run.events.open("rb") as file:
        for line in file:
            event = _event(line)
            if event is None:
                continue
            if event["event"] == "start":
                sitting = _sitting(event)
            if event["event"] != "step":
                continue
            figures = [event.get(name) for name in ("loss", "grad_norm", "learning_rate")]
            if all(isinstance(figure, (int, float)) for figure in figures):
                loss, grad_norm, rate = cast("list[float]", figures)
                found[cast(int, event["step"])] = LoggedStep(loss, grad_norm, rate, *sitting)
    return found


def _sitting(start: Mapping[str, object]) -> tuple[str, int, str]:
    """torch, threads and processor of a sitting, as its first event has them."""
    torch_version, threads, processor = (start.get(name) for name in ("torch", "threads", "processor"))
    return (
        torch_version if isinstance(torch_version, str) else "",
        threads if isinstance(threads, int) else 0,
        processor if isinstance(processor, str) else "",
    )


def choose_start(run: RunDirectory, logged: Mapping[int, LoggedStep], steps: int) -> int | None:
    """The step to repeat from: of the newest whole checkpoint with so many logged steps after it, or 0, the beginning.

    None where not even the first steps are logged.
    """
    checkpoints = Checkpoints(run.checkpoints)
    for start in (*checkpoints.steps(), 0):
        follow = all(start + number in logged for number in range(1, steps + 1))
        if follow and (start == 0 or not checkpoints.faults(start)):
            return start
    return None


def repeat(
    decoder: Decoder,
    dataset: TrainingRows,
    settings: Settings,
    run: RunDirectory,
    start: int,
    logged: Mapping[int, LoggedStep],
    told: Callable[[Repeated], None],
) -> None:
    """Take the logged steps after `start` again, as far as `logged` goes on without a gap; tell of each.

    The learning rate is the logged one: a run that was given more steps has had two schedules.

    Args:
        decoder: the base, without a LoRA.
        dataset: the run's rows.
        settings: the run's.
        run: read only.
        start: the step of a whole checkpoint, or 0.
        logged: what is to be held against.
        told: is given each step as it is done.

    Raises:
        TrainingError: a step cannot be taken, or the checkpoint is not this run's.
    """
    folder = Checkpoints(run.checkpoints).path(start)
    torch.manual_seed(settings.seed)
    now = made_with(decoder.device)
    with only_math(settings.attention), _threads_as_before():
        trainee = make_trainee(decoder, settings)
        if start:
            load_checkpoint(folder, trainee)
        batches, done = make_batches(dataset, settings), start
        while (expected := logged.get(done + 1)) is not None:
            if expected.threads:  # sums are cut by them
                torch.set_num_threads(expected.threads)
            for group in trainee.optimizer.param_groups:
                group["lr"] = expected.learning_rate
            result = take_step(trainee, batches.step(done), settings.clip)
            done += 1
            figures = (result.loss, result.grad_norm)
            alike = expected.torch in ("", now.torch) and expected.processor in ("", now.processor)
            exact = alike and decoder.device.type == "cpu"
            same = _same(figures, (expected.loss, expected.grad_norm), exact=exact)
            told(Repeated(done, expected, *figures, same, exact))


def _same(found: tuple[float, float], logged: tuple[float, float], *, exact: bool) -> bool:
    if exact:
        return found == logged
    return all(abs(now - then) <= TOLERANCE * abs(then) for now, then in zip(found, logged, strict=True))


@contextmanager
def _threads_as_before() -> Iterator[None]:
    """Put their number back at the end."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def changed_settings(run: RunDirectory, plan_sha256: str) -> str | None:
    """What to say where plan.json, or else recipe.yaml, is not what the newest checkpoint was made with: as after a run
    has gone on with other settings."""
    checkpoints = Checkpoints(run.checkpoints)
    for step in checkpoints.steps():
        try:
            state = read_state(checkpoints.path(step))
        except TrainingError:
            continue
        if state.plan_sha256 != plan_sha256:
            return f"plan.json has other settings than {name_of(step)} was made with"
        if state.recipe_sha256 is not None and run.recipe.is_file() and digest(run.recipe) != state.recipe_sha256:
            return f"recipe.yaml is not as it was when {name_of(step)} was made"
        return None
    return None
