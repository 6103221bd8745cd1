"""A run in figures, from its event log: how long a step took, how many tokens went through, what the proof came to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel

from luthier.plan.proof import Load, Measured, Proof
from luthier.train.events import newest_steps

__all__ = ["last_step_seconds", "measured"]


class _Step(BaseModel):
    seconds: float
    tokens: int


class _Proof(BaseModel):
    tokens: int
    longest: int
    documents: int
    micro_batch: int
    checkpointing: int
    measured_gib: float
    reserved_gib: float
    measured_seconds: float
    predicted_gib: float | None
    predicted_seconds: float | None


def last_step_seconds(events: Path) -> float | None:
    """How long the newest step of all sittings in `events` took; None where there is none."""
    newest = newest_steps(events, 1)
    return _Step.model_validate_json(newest[0]).seconds if newest else None


def measured(events: Path, peaks: Mapping[str, float]) -> Measured:
    """The figures of all sittings in `events`; `peaks` (GiB by phase) are of this one.

    What is predicted is an average step, so step_seconds is the mean; without the first, which warms up.
    """
    steps: list[_Step] = []
    proof: Proof | None = None
    for line in events.read_bytes().splitlines():
        if line.startswith(b'{"event":"step"'):
            steps.append(_Step.model_validate_json(line))
        elif line.startswith(b'{"event":"proof"'):
            found = _Proof.model_validate_json(line)
            load = Load(found.tokens, found.longest, found.documents)
            proof = Proof(load, **found.model_dump(exclude={"tokens", "longest", "documents"}))
    seconds = sum(step.seconds for step in steps)
    return Measured(
        peaks=dict(peaks),
        step_seconds=fmean(step.seconds for step in steps[1:] or steps) if steps else None,
        tokens_per_second=sum(step.tokens for step in steps) / seconds if steps else None,
        proof=proof,
    )
