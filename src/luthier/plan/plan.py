"""The plan as a value, and as the document `plan.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from luthier.hardware.device import GIB, Device
from luthier.plan.decision import Decision
from luthier.plan.footprint import Memory, Phase
from luthier.plan.settings import Settings
from luthier.plan.timing import TimePlan
from luthier.plan.work import Work
from luthier.runs import SCHEMA_VERSION

__all__ = ["Plan", "as_document"]


@dataclass(frozen=True)
class Plan:
    """What will be done and why.

    trainable_parameters: the adapter's. total_parameters: base (a tied head once) and adapter together. work: what
    memory and time were predicted for. margin: the share of usable memory that is left free. devices: how many of
    `device` are used.
    """

    settings: Settings
    decisions: tuple[Decision[object], ...]
    device: Device
    trainable_parameters: int
    total_parameters: int
    work: Work
    memory: Memory
    time: TimePlan
    margin: float
    devices: int = 1

    def decision(self, setting: str) -> Decision[object]:
        """The decision on one setting, by its name in the recipe. KeyError where there is none."""
        for one in self.decisions:
            if one.setting == setting:
                return one
        raise KeyError(setting)


def as_document(plan: Plan) -> dict[str, object]:
    """`plan.json`: plain values only, so it can be written as JSON as it is."""
    return {
        "schema": SCHEMA_VERSION,
        "decisions": [_plain(asdict(one)) for one in plan.decisions],
        "settings": _plain(asdict(plan.settings)),
        "device": _plain(asdict(plan.device)),
        "devices": plan.devices,
        "trainable_parameters": plan.trainable_parameters,
        "total_parameters": plan.total_parameters,
        "memory": _memory(plan),
        "time": _plain(asdict(plan.time)),
    }


def _memory(plan: Plan) -> dict[str, object]:
    """Bytes by phase and part; of each device, but for `host` and `disk`."""
    memory = plan.memory
    return {
        "phases": {one.name: _phase(one) for one in memory.phases},
        "host": _phase(memory.host),
        "disk": _phase(memory.disk),
        "peak": memory.peak.name,
        "peak_bytes": memory.peak.bytes,
        "peak_gib": round(memory.peak.gib, 4),
        "usable_gib": round(plan.device.usable_gib, 4),
        "usable_bytes": int(plan.device.usable_gib * GIB),
        "margin": plan.margin,
    }


def _phase(phase: Phase) -> dict[str, object]:
    parts = [{"name": part.name, "bytes": part.bytes, "note": part.note} for part in phase.parts]
    return {"bytes": phase.bytes, "gib": round(phase.gib, 4), "parts": parts}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
