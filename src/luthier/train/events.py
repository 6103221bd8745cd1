"""What happened, as typed values: one line of `events.jsonl` each, and one call of a listener each.

The loop makes events; `EventLog` writes them to the run directory, a `Listener` (the terminal display, a tracker, a
test) is told them. Field names are a public interface: add, never rename.

Units: `time` is seconds since 1970 (UTC); `seconds` a duration; `loss` nats per labelled token; `tokens` real tokens
of the step's documents (prompts and answers; there is no padding); memory in GiB (2^30 bytes).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast

import orjson

from luthier.errors import TrainingError, is_disk_full
from luthier.guard.secrets import printable
from luthier.plan.proof import Proof
from luthier.runs import file_mode, write_text

__all__ = [
    "EndEvent",
    "EvalEvent",
    "Event",
    "EventLog",
    "InterruptEvent",
    "Listener",
    "ProgressEvent",
    "ProofEvent",
    "SaveEvent",
    "StartEvent",
    "StepEvent",
    "WarningEvent",
    "forget_after",
    "newest_steps",
    "tell",
]


def _clean(event: object, name: str) -> None:
    """Take secrets and control characters out of a text of a new event: it goes to the log, the terminal, a tracker."""
    object.__setattr__(event, name, printable(getattr(event, name)))


@dataclass(frozen=True, kw_only=True)
class StartEvent:
    """The loop begins at `step` (0, or where a resumed run goes on) of `steps`.

    `torch` (its version), `threads` and `processor`: what the last bits of this sitting's sums depend on.
    """

    event: Literal["start"] = "start"
    step: int
    time: float = field(default_factory=time.time)
    steps: int
    train_rows: int
    eval_rows: int
    trainable_parameters: int
    torch: str = ""
    threads: int = 0
    processor: str = ""


@dataclass(frozen=True, kw_only=True)
class ProofEvent:
    """The largest micro-batch was taken forward and backward before the first step (proof.py, plan/proof.py).

    `tokens` of it, in `documents`, the longest of `longest`. `measured_gib`: CUDA's peak of allocated memory, the
    process's peak resident set on a CPU. `measured_seconds` of one pass. `error` and `error_seconds` are measured /
    predicted - 1; None, with `predicted_*`, where nobody predicted.
    """

    event: Literal["proof"] = "proof"
    step: int
    time: float = field(default_factory=time.time)
    tokens: int
    longest: int
    documents: int
    micro_batch: int
    checkpointing: int
    measured_gib: float
    reserved_gib: float
    predicted_gib: float | None
    error: float | None
    measured_seconds: float
    predicted_seconds: float | None
    error_seconds: float | None

    @classmethod
    def of(cls, proof: Proof, step: int) -> ProofEvent:
        """The event that tells of `proof`, taken at this step."""
        memory, seconds = proof.predicted_gib, proof.predicted_seconds
        return cls(
            step=step,
            tokens=proof.load.tokens,
            longest=proof.load.longest,
            documents=proof.load.documents,
            micro_batch=proof.micro_batch,
            checkpointing=proof.checkpointing,
            measured_gib=proof.measured_gib,
            reserved_gib=proof.reserved_gib,
            predicted_gib=memory,
            error=proof.measured_gib / memory - 1 if memory else None,
            measured_seconds=proof.measured_seconds,
            predicted_seconds=seconds,
            error_seconds=proof.measured_seconds / seconds - 1 if seconds else None,
        )


@dataclass(frozen=True)
class ProgressEvent:
    """How far something is that takes long between two events: told to listeners, not written down.

    `done` of `total` passes of the proof, whose micro-batch has `tokens`, or of the held-out rows.
    """

    doing: Literal["proof", "evaluation"]
    step: int
    done: int
    total: int
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One optimizer step was applied; `step` counts from 1. `grad_norm` is the global L2 norm before clipping.

    `epoch` is how many times the training rows have been seen. On CUDA the memory figures are the step's peaks; on
    MPS what is held now; on a CPU all three are the process's resident set.
    """

    event: Literal["step"] = "step"
    step: int
    time: float = field(default_factory=time.time)
    loss: float
    learning_rate: float
    grad_norm: float
    epoch: float
    tokens: int
    tokens_per_second: float
    seconds: float
    memory_active_gib: float
    memory_allocated_gib: float
    memory_reserved_gib: float


@dataclass(frozen=True, kw_only=True)
class EvalEvent:
    """The held-out loss after `step` updates; `best` says whether it is the lowest of the trained steps so far."""

    event: Literal["eval"] = "eval"
    step: int
    time: float = field(default_factory=time.time)
    loss: float
    perplexity: float
    tokens: int
    seconds: float
    best: bool


@dataclass(frozen=True, kw_only=True)
class SaveEvent:
    """A checkpoint is complete on disk, `seconds` after its snapshot was taken: `checkpoint` is its folder's name.

    `step` is the checkpoint's, which may lie before that of the event ahead of it. `best`: BEST names it, for its
    held-out loss is the lowest of the checkpoints that are there.
    """

    event: Literal["save"] = "save"
    step: int
    time: float = field(default_factory=time.time)
    checkpoint: str
    best: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class WarningEvent:
    """Something a user should know that does not stop the run.

    `kind`: "skip" for a step whose loss or gradient was not finite and that was left out (`train.on_nonfinite`),
    "spike" for a loss far above those before (spikes.py), "disk" for a disk without room, else "". `rows`: of "skip"
    and "spike", the rows of the batch, by their number in the data; the message names file and line.
    """

    event: Literal["warning"] = "warning"
    step: int
    time: float = field(default_factory=time.time)
    message: str
    kind: Literal["", "skip", "spike", "disk"] = ""
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _clean(self, "message")


@dataclass(frozen=True, kw_only=True)
class InterruptEvent:
    """The run was stopped after `step` updates; the newest checkpoint is of that step.

    `reason` says why: the signal, `the stop file F`, `train.max_time of T`. `signal`: its name, "" where it was none.
    """

    event: Literal["interrupt"] = "interrupt"
    step: int
    time: float = field(default_factory=time.time)
    signal: str
    reason: str = ""

    def __post_init__(self) -> None:
        _clean(self, "reason")


@dataclass(frozen=True, kw_only=True)
class EndEvent:
    """All steps are done. `adapter_from` and `adapter_step` say which checkpoint became the run's adapter: the best, or
    where nothing was held out the last."""

    event: Literal["end"] = "end"
    step: int
    time: float = field(default_factory=time.time)
    seconds: float
    tokens: int
    first_eval: float | None
    last_eval: float | None
    best_eval: float | None
    adapter_from: Literal["best", "last"]
    adapter_step: int


Event = StartEvent | ProofEvent | StepEvent | EvalEvent | SaveEvent | WarningEvent | InterruptEvent | EndEvent


class Listener(Protocol):
    """Is told each event as it happens, in order. `close` comes last, also when the run fails or is interrupted."""

    def on_start(self, event: StartEvent) -> None: ...
    def on_proof(self, event: ProofEvent) -> None: ...
    def on_progress(self, event: ProgressEvent) -> None: ...
    def on_step(self, event: StepEvent) -> None: ...
    def on_eval(self, event: EvalEvent) -> None: ...
    def on_save(self, event: SaveEvent) -> None: ...
    def on_warning(self, event: WarningEvent) -> None: ...
    def on_interrupt(self, event: InterruptEvent) -> None: ...
    def on_end(self, event: EndEvent) -> None: ...
    def close(self) -> None: ...


def tell(listener: Listener, event: Event) -> None:
    """Call the method of `listener` that is for this kind of event."""
    match event:
        case StartEvent():
            listener.on_start(event)
        case ProofEvent():
            listener.on_proof(event)
        case StepEvent():
            listener.on_step(event)
        case EvalEvent():
            listener.on_eval(event)
        case SaveEvent():
            listener.on_save(event)
        case WarningEvent():
            listener.on_warning(event)
        case InterruptEvent():
            listener.on_interrupt(event)
        case EndEvent():
            listener.on_end(event)


class EventLog:
    """Appends events to `events.jsonl`, each line with the system as it is written, so that it can be followed.

    A number that JSON does not have (an infinite perplexity) is written as null. Lines that find no room on the disk
    are kept and written, in order, as soon as there is some: half a line never stands in the file.
    """

    def __init__(self, file: int) -> None:
        self._file, self._waiting = file, bytearray()

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[EventLog]:
        """A log that appends to `path`, closed when the block ends."""
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(path, flags, file_mode(path.parent))
        try:
            yield cls(file)
        finally:
            os.close(file)

    def write(self, event: Event) -> bool:
        """Append one line; False where it has to wait, because the disk has no room."""
        self._waiting += orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)
        try:
            self._append()
        except OSError as error:
            if not is_disk_full(error):
                raise
            return False
        return True

    def settle(self) -> None:
        """Write what waits and flush the file to the disk, so that no checkpoint is ahead of its log.

        Raises OSError where there is no room still.
        """
        self._append()
        os.fsync(self._file)

    def _append(self) -> None:
        """Write what waits, all of it or nothing."""
        whole, done = os.fstat(self._file).st_size, 0
        try:
            while done < len(self._waiting):
                done += os.write(self._file, self._waiting[done:])
        except OSError:
            os.ftruncate(self._file, whole)
            raise
        self._waiting.clear()


def newest_steps(path: Path, count: int) -> list[bytes]:
    """The lines of the last `count` steps in an event log, of all sittings; nothing where there is none."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return list(deque((line for line in file if line.startswith(b'{"event":"step"')), maxlen=count))


def forget_after(path: Path, step: int, evaluated: int | None) -> None:
    """Drop from the log what a run resumed after `step` updates will do again, so that each happens once in it.

    That is everything of later steps, evaluations after the step `evaluated` (None: all), and the end. A last line
    without its newline is what a killed process leaves; it is dropped too. Raises TrainingError, naming the line, when
    any other line is not an event.
    """
    if not path.exists():
        return
    *lines, _torn = path.read_bytes().split(b"\n")
    kept: list[str] = []
    for number, line in enumerate(lines, start=1):
        happened, at = _kind_and_step(line, path, number)
        last = step if happened != "eval" else -1 if evaluated is None else min(step, evaluated)
        if at <= last and happened != "end":
            kept.append(line.decode() + "\n")
    write_text(path, "".join(kept))


_FIGURE = (int, float)
_READ_AGAIN: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "step": {"tokens": int, "loss": _FIGURE, "seconds": _FIGURE},
    "proof": {
        **dict.fromkeys(("tokens", "longest", "documents", "micro_batch", "checkpointing"), int),
        **dict.fromkeys(("measured_gib", "reserved_gib", "measured_seconds"), _FIGURE),
        **dict.fromkeys(("predicted_gib", "predicted_seconds"), (int, float, type(None))),
    },
}
"""What spikes.py and measured.py take from the log of a run that goes on."""


def _kind_and_step(line: bytes, path: Path, number: int) -> tuple[str, int]:
    remedy = "move the run directory away and train again, or remove the line"
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise TrainingError(f"{path}:{number}: not an event: {error}", remedy) from error
    if not isinstance(found, dict) or not isinstance(found.get("event"), str) or not isinstance(found.get("step"), int):
        raise TrainingError(f"{path}:{number}: not an event: it has no `event` and `step`", remedy)
    event = cast("dict[str, object]", found)
    kind = str(event["event"])
    for name, needed in _READ_AGAIN.get(kind, {}).items():
        if name not in event or not isinstance(event[name], needed):
            raise TrainingError(f"{path}:{number}: not an event of kind {kind}: its `{name}` is no number", remedy)
    if kind == "step" and cast(float, event["seconds"]) <= 0:
        raise TrainingError(f"{path}:{number}: not an event of kind {kind}: its `seconds` are none", remedy)
    return kind, cast(int, event["step"])
