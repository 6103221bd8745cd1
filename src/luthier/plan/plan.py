"""The plan as a value, and as the document `plan.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from luthier.hardware.device import Device
from luthier.plan.decision import Decision
from luthier.plan.settings import Settings
from luthier.runs import SCHEMA_VERSION

__all__ = ["Plan", "as_document"]


@dataclass(frozen=True)
class Plan:
    """What will be done and why.

    trainable_parameters: the adapter's. total_parameters: base (a tied head once) and adapter together.
    """

    settings: Settings
    decisions: tuple[Decision[object], ...]
    device: Device
    trainable_parameters: int
    total_parameters: int

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
        "trainable_parameters": plan.trainable_parameters,
        "total_parameters": plan.total_parameters,
    }


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
