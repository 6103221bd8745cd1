"""Memory as a value: what is held in each phase of a run, part by part. The formulas are in memory.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from luthier.hardware.device import GIB

__all__ = ["Memory", "Part", "Phase", "PhaseName"]

PhaseName: TypeAlias = Literal["load", "train", "evaluate", "host", "disk"]


@dataclass(frozen=True)
class Part:
    """One thing that takes memory. `note` says how its size comes about, with numbers."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """What is held at once at the fullest moment of one phase."""

    name: PhaseName
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def gib(self) -> float:
        return self.bytes / GIB


@dataclass(frozen=True)
class Memory:
    """phases: on each device (load, train, evaluate). host: RAM of the machine beside the devices (of a CPU run it is
    the merge alone, for there the device is the host). disk: what the run writes, at most."""

    phases: tuple[Phase, ...]
    host: Phase
    disk: Phase

    @property
    def peak(self) -> Phase:
        """The phase that needs most on a device."""
        return max(self.phases, key=lambda phase: phase.bytes)

    def phase(self, name: PhaseName) -> Phase:
        """The device's phase of this name. KeyError where there is none."""
        for one in self.phases:
            if one.name == name:
                return one
        raise KeyError(name)
