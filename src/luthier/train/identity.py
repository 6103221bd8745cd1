"""What makes a run this run, and in what it may change when it is gone on with.

A resumed run computes what the uninterrupted one would have, so everything that bears on the numbers must be as it was.
What only says how the run is kept, watched and stopped may change (`on_nonfinite` too: the numbers are the same up to
the first step that is not finite, where one run stops and the other leaves it out); and `steps` may grow: what is done
stays as it is, and the learning rate follows the new length from there on. That is another run than one of that length
from the start, unless the schedule is constant, so it is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import orjson
from pydantic import JsonValue

from luthier.data.conversation import Example, Source
from luthier.plan.settings import MAY_CHANGE, Settings

__all__ = ["WATCHED", "Changes", "Identity", "TrainingRows", "changes", "identify", "settings_digest"]

WATCHED = (*MAY_CHANGE, "eval_every", "save_every")
"""Settings that the updates do not depend on, as long as every step is finite."""

_PROVED = ("micro_batch", "checkpointing")
"""What the proof may choose anew before the first step."""


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
    """What makes a run this run: every resolved setting, the base model's name, and a digest of the tokens it sees.

    `weights`: what tells the base's files from others of that name (model/fingerprint.py); None: not known.
    """

    base: str
    data: str
    settings: Mapping[str, JsonValue]
    weights: str | None = None


@dataclass(frozen=True)
class Changes:
    """What is otherwise now than it was: `refused` makes it another run, `allowed` does not."""

    refused: tuple[str, ...]
    allowed: tuple[str, ...]


def identify(settings: Settings, dataset: TrainingRows, base: str, weights: str | None = None) -> Identity:
    """The identity of a run with these settings on this data, which its digest stands for."""
    as_json: dict[str, JsonValue] = orjson.loads(orjson.dumps(asdict(settings)))
    return Identity(base=base, data=dataset.digest, settings=as_json, weights=weights)


def settings_digest(settings: Mapping[str, object]) -> str:
    """SHA-256 of settings by name, as plan.json and state.json have them, whatever their order."""
    return hashlib.sha256(orjson.dumps(dict(settings), option=orjson.OPT_SORT_KEYS)).hexdigest()


def changes(then: Identity, now: Identity, *, untrained: bool = False) -> Changes:
    """What differs, one line each. `untrained`: no step is done yet, so what the proof may still take back (how a
    batch is cut, what is recomputed) is nobody's past."""
    refused, allowed = list[str](), list[str]()
    for name in sorted({*then.settings, *now.settings}):
        before, after = then.settings.get(name), now.settings.get(name)
        if before == after or (untrained and name in _PROVED):
            continue
        said = f"{name}: {_shown(before)} then, {_shown(after)} now"
        if name in WATCHED:
            allowed.append(said)
        elif name == "steps" and isinstance(before, int) and isinstance(after, int) and after > before:
            constant = now.settings.get("schedule") == "constant"
            allowed.append(said + ("" if constant else " (the learning rate follows the new length from here on)"))
        else:
            refused.append(said)
    if then.base != now.base:
        refused.append(f"model: {then.base} then, {now.base} now")
    elif then.weights != now.weights and then.weights is not None and now.weights is not None:
        refused.append(f"model: the files of {now.base} are not those that the run was begun with")
    if then.data != now.data:
        refused.append("data: the tokens or labels of the rows are not those the run was begun with")
    return Changes(tuple(refused), tuple(allowed))


def _shown(value: JsonValue) -> str:
    return "not set" if value is None else str(value)
