"""The values that travel through the data stage: a conversation on the way in, an example on the way out.

Every format of file becomes a `Conversation`; nothing after formats.py knows what the file looked like. Every template
turns a conversation into an `Example`; nothing after prepare.py knows what the text looked like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["IGNORED", "ROLES", "Conversation", "Example", "Ids", "Role", "Source", "Turn", "Weights"]

IGNORED = -100
"""The label of a token that is not trained (the value PyTorch's cross entropy ignores)."""

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Ids: TypeAlias = NDArray[np.int32]
Weights: TypeAlias = NDArray[np.float32]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


_NO_FIELDS: Mapping[str, str] = MappingProxyType({})


# Named tuples, not dataclasses: a frozen dataclass takes several times as long to make, and there are millions.
class Source(NamedTuple):
    """Where a row stands. `line` counts from 1; where a file has no lines (Parquet, a list in JSON) it is the row."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Turn(NamedTuple):
    """One speaker's part. `train` says whether the model learns to write it; only assistant turns can be trained."""

    role: Role
    content: str
    train: bool = False


class Conversation(NamedTuple):
    """A row in the form that every template reads.

    `fields` are the row's text fields by the format's own names: what a template such as `Q: {question}` takes its
    words from, and what evaluation tasks compare with. `plain` marks a row of format `text`: one trained turn that is
    the whole document, written without any template.
    """

    turns: tuple[Turn, ...]
    source: Source
    fields: Mapping[str, str] = _NO_FIELDS
    plain: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tokenised row.

    `ids` and `labels` are int32 arrays of the same length; `labels[i]` is `ids[i]` where token i is trained and -100
    elsewhere (not shifted: batches.py shifts). `row` counts from 0 over all files of the recipe in their order.
    `fields` are kept for held-out rows (eval and test), where tasks need them; training rows carry none.
    `weights` (float32, one a token) say how much each label counts in the loss; None: all that have one count 1.
    `answer` counts the tokens before the last answer; None: it begins where the last trained span does.
    """

    ids: Ids
    labels: Ids
    row: int
    fields: Mapping[str, str] = field(default_factory=dict)
    weights: Weights | None = None
    answer: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labelled(self) -> int:
        """How many tokens are trained: the first of a document cannot be, since nothing comes before it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))

    @property
    def answer_start(self) -> int:
        """The index of the first token of the last answer; `ids[:answer_start]` is the prompt that it answers."""
        if self.answer is not None:
            return self.answer
        trained = self.labels != IGNORED
        starts = np.flatnonzero(trained & ~np.concatenate(([False], trained[:-1])))
        return int(starts[-1]) if len(starts) else len(self.ids)
