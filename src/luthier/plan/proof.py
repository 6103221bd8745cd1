"""The plan held against what happened: what the proof tries, what it steps down to, and how the figures compare.

Before its first step a run takes its largest micro-batch forward and backward (train/proof.py). These are the values of
that: the load that is tried, what was predicted for it, what was measured, and the ladder of settings that a run which
is out of memory goes down. Every rung gives the same mathematics: the same batches and the same gradient, in smaller
pieces (for which dropout draws other masks) or with more of it computed twice. After the run, `compared` is what
plan.json keeps under `measured`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from luthier.hardware.device import GIB, Device, DeviceKind
from luthier.plan.decision import Decision
from luthier.plan.footprint import Memory, Phase
from luthier.plan.memory import NOT_TENSORS, predict_memory
from luthier.plan.plan import Plan
from luthier.plan.settings import Settings
from luthier.plan.speed import predict_speed
from luthier.plan.work import Work

__all__ = [
    "MEASURED",
    "Adopted",
    "Expected",
    "Load",
    "Measured",
    "Proof",
    "adopt",
    "choose_proof",
    "compared",
    "expect",
    "is_proved",
    "ladder",
]

MEASURED = "measured on this machine"
"""The source of a decision that the proof took."""

AMPLE = 0.5
"""The share of the usable memory below which a prediction needs no proof on a CPU: it would have to be wrong by as much
again. Before the step by hand the largest error of 24 runs was a tenth (docs/decisions/0009)."""


@dataclass(frozen=True)
class Load:
    """One micro-batch, as far as memory and time depend on it: its tokens, those of its longest document, how many."""

    tokens: int
    longest: int
    documents: int


@dataclass(frozen=True)
class Expected:
    """What was predicted of one pass, forward and backward."""

    gib: float
    seconds: float


@dataclass(frozen=True)
class Proof:
    """What the proof came to.

    measured_gib: CUDA's peak of allocated memory, the peak of the process's resident set on a CPU, what Metal's driver
    holds on MPS. reserved_gib: what torch holds of the device, the same on a CPU. seconds: of one pass, forward and
    backward. predicted_*: None where nobody predicted.
    """

    load: Load
    micro_batch: int
    checkpointing: int
    measured_gib: float
    reserved_gib: float
    measured_seconds: float
    predicted_gib: float | None = None
    predicted_seconds: float | None = None


@dataclass(frozen=True)
class Adopted:
    """Settings that the run goes on with in place of the planned ones, the load they were proved with, and why."""

    settings: Settings
    load: Load
    reason: str


@dataclass(frozen=True)
class Measured:
    """A run in figures. peaks: GiB by phase (load, train, evaluate), of this sitting. step_seconds: the mean of all
    steps but the first. tokens_per_second: while training. tokens: of an average step. None where no step was done."""

    peaks: Mapping[str, float]
    step_seconds: float | None
    tokens_per_second: float | None
    proof: Proof | None


def is_proved(device: Device, memory: Memory) -> bool:
    """Whether a run with this prediction takes its largest micro-batch before the first step.

    On a CPU it is not where memory is ample: what it would show is known, and the first step would wait for seconds. An
    accelerator's is always taken: it costs little there, and an allocator of its own stands between it and the figures.
    """
    return device.kind != "cpu" or memory.peak.gib > AMPLE * device.usable_gib


def choose_proof(device: Device, memory: Memory) -> Decision[str]:
    """What is tried before the first step, as a line of the plan."""
    if is_proved(device, memory):
        reason = "Taken forward and backward before the first step: what does not fit then is cut smaller."
        return Decision("train.proof", "the largest micro-batch", reason, "docs/plan.md")
    reason = (
        f"{memory.peak.gib:.2g} GiB of {device.usable_gib:.3g} are needed at most: were it twice as much, it would "
        "fit, so the first step does not wait for a trial. What is used is measured in the run and told at its end."
    )
    return Decision("train.proof", "none", reason, "docs/plan.md", ("the largest micro-batch: the first step waits",))


def ladder(settings: Settings, layers: int) -> tuple[Settings, ...]:
    """What to try next, one after another, when `settings` are out of memory, for a decoder of so many layers.

    First more layers are recomputed: half of them, all but the last (which can need less than all, since the last one's
    activations are then not made a second time beside the gradients of the loss), all. Then the micro-batch is halved,
    to a divisor of the batch, down to one. The batch, and all else, stays.
    """
    rungs: list[Settings] = []
    for recomputed in sorted({-(-layers // 2), layers - 1, layers}):
        if settings.checkpointing < recomputed:
            rungs.append(replace(settings, checkpointing=recomputed))
    size = min(settings.micro_batch, settings.batch_size)
    while size > 1:
        size = max(part for part in range(1, size // 2 + 1) if settings.batch_size % part == 0)
        rungs.append(replace(settings, checkpointing=max(layers, settings.checkpointing), micro_batch=size))
    return tuple(dict.fromkeys(rungs))


def expect(plan: Plan, settings: Settings, load: Load) -> Expected:
    """What the models of memory and speed say of one micro-batch under `settings`, forward and backward."""
    work = replace(_work(plan, settings, load), step_tokens=load.tokens, micro_batches=1)
    train = predict_memory(work, settings.device).phase("train")
    parts = predict_speed(work, plan.device).parts
    seconds = sum(part for name, part in parts if name != "optimizer")  # clipping and update: no part of a pass
    return Expected(_counted(train, settings.device) / GIB, seconds)


def adopt(plan: Plan, adopted: Adopted) -> Plan:
    """The plan with the settings that the proof found, their reason, and what is then predicted."""
    settings = adopted.settings
    work = replace(
        _work(plan, settings, adopted.load),
        micro_batches=-(-settings.batch_size // (settings.micro_batch * plan.work.devices)),
    )
    values = {"train.micro_batch": settings.micro_batch, "train.checkpointing": settings.checkpointing}
    before = {"train.micro_batch": plan.settings.micro_batch, "train.checkpointing": plan.settings.checkpointing}

    def decided(one: Decision[object]) -> Decision[object]:
        if one.setting not in values or values[one.setting] == before[one.setting]:
            return one
        return Decision(one.setting, values[one.setting], adopted.reason, MEASURED, (f"{one.value}: {one.reason}",))

    speed = predict_speed(work, plan.device)
    training = speed.step_seconds * plan.time.steps
    time = replace(
        plan.time,
        step_seconds=speed.step_seconds,
        tokens_per_second=speed.tokens_per_second,
        training_seconds=training,
        total_seconds=training + plan.time.evaluation_seconds,
    )
    return replace(
        plan,
        settings=settings,
        decisions=tuple(map(decided, plan.decisions)),
        work=work,
        memory=replace(predict_memory(work, settings.device), disk=plan.memory.disk),  # exports and all
        time=time,
    )


def compared(plan: Plan, measured: Measured) -> dict[str, object]:
    """`measured` of plan.json: each figure with what was predicted, and the error: measured / predicted - 1."""
    phase, peak = max(measured.peaks.items(), key=lambda one: one[1])
    predicted = {str(one.name): _counted(one, plan.settings.device) / GIB for one in plan.memory.phases}
    document: dict[str, object] = {"phase": phase}
    document |= _figure("peak_gib", peak, max(predicted.values()))
    document["phases"] = {
        name: {"gib": gib, "predicted_gib": predicted.get(name)} for name, gib in measured.peaks.items()
    }
    document |= _figure("step_seconds", measured.step_seconds, plan.time.step_seconds)
    document |= _figure("tokens_per_second", measured.tokens_per_second, plan.time.tokens_per_second)
    document["proof"] = None if measured.proof is None else asdict(measured.proof)
    return document


def _counted(phase: Phase, device: DeviceKind) -> int:
    """Bytes of a phase as they are measured: on CUDA torch's own count, which knows its tensors only."""
    return sum(part.bytes for part in phase.parts if device != "cuda" or part.name not in NOT_TENSORS)


def _figure(name: str, measured: float | None, predicted: float | None) -> dict[str, object]:
    error = measured / predicted - 1 if measured is not None and predicted else None
    return {name: measured, f"predicted_{name}": predicted, f"error_{name}": error}


def _work(plan: Plan, settings: Settings, load: Load) -> Work:
    return replace(
        plan.work,
        tokens=load.tokens,
        longest=load.longest,
        documents=load.documents,
        recomputed=settings.checkpointing,
    )
