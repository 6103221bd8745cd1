"""One pass over the rows as they stand in the files: every text check on every row that is used, and what is counted.

Rows are read, looked at and forgotten. What stays is bounded, but for two hashes a row, with which repeats.py compares
them. A row that was rejected when the data was prepared is passed over: it is reported with the reason for that.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from luthier.data.audit.answers import Openings, Speakers
from luthier.data.audit.findings import Sighting, Tally
from luthier.data.audit.languages import SAMPLED
from luthier.data.audit.repeats import hash_of, prompt_hash
from luthier.data.audit.texts import TEXT_CHECKS, row_text, template_tokens
from luthier.data.conversation import Conversation
from luthier.data.dataset import Dataset
from luthier.data.prepare import rejected_rows
from luthier.data.problems import BadRow
from luthier.errors import DataError

__all__ = ["Survey", "survey", "used_rows"]

Progress = Callable[[int, int], None]
_TOLD_EVERY = 512


@dataclass
class Survey:
    """What the pass gathers.

    Attributes:
        tallies: of each text check, the rows it found something in.
        prompts: a hash of what stands before the last answer of each row.
        answers: a hash of the last answer of each row.
        sample: some rows' texts, evenly spaced.
    """

    tallies: dict[str, Tally] = field(default_factory=lambda: {check.name: Tally() for check in TEXT_CHECKS})
    openings: Openings = field(default_factory=Openings)
    speakers: Speakers = field(default_factory=Speakers)
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    answers: array[int] = field(default_factory=lambda: array("Q"))
    sample: list[str] = field(default_factory=list)

    @property
    def prompt_hashes(self) -> NDArray[np.uint64]:
        """`prompts` as numpy has it."""
        return np.frombuffer(self.prompts, dtype=np.uint64)

    @property
    def answer_hashes(self) -> NDArray[np.uint64]:
        """`answers` as numpy has it."""
        return np.frombuffer(self.answers, dtype=np.uint64)


def used_rows(dataset: Dataset) -> Iterator[tuple[int, Conversation]]:
    """Every row that is in the store, in its order, read again from its file, with its number within that file."""
    rejected = rejected_rows(dataset.sources, dataset.store)
    following = next(rejected, None)
    for source in dataset.sources:
        for number, found in enumerate(source.rows()):
            here = following is not None and (following.file, following.row) == (source.path, number)
            if here:
                following = next(rejected, None)
            if not here and not isinstance(found, BadRow):
                yield number, found


def survey(dataset: Dataset, progress: Progress | None = None) -> Survey:
    """Look at every row of a dataset.

    Raises:
        DataError: the files are no longer what they were when the data was prepared, a moment ago.
    """
    total = len(dataset.store.rows)
    spacing = -(-total // SAMPLED)
    tokens = template_tokens(dataset.template.tokenizer.controls)
    made = Survey()
    for row, (number, conversation) in enumerate(used_rows(dataset)):
        seen = row_text(conversation, tokens)
        for check in TEXT_CHECKS:
            if text := check.find(seen):
                made.tallies[check.name].add(Sighting(conversation.source, number, text))
        for answer in seen.answers:
            made.openings.add(answer)
        made.speakers.add(conversation)
        made.prompts.append(prompt_hash(conversation))
        made.answers.append(hash_of(seen.answers[-1]))
        if row % spacing == 0:
            made.sample.append(seen.text)
        if progress is not None and row % _TOLD_EVERY == 0:
            progress(row, total)
    if made.speakers.rows != total:
        raise DataError("the files changed while they were being read", "run it again when nothing writes to them")
    if progress is not None:
        progress(total, total)
    return made
