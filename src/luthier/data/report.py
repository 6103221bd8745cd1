"""What happened to the data, as a value: shown to the user, and written to the run's data/data.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from luthier.runs import SCHEMA_VERSION

__all__ = ["SHOWN_EXCLUDED", "DataReport", "Duplicates", "Excluded", "SourceReport", "SplitReport"]

SHOWN_EXCLUDED = 20
"""How many excluded rows the document names; their count is always whole."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One file: how many rows it had and how many of them cannot be used, the format they were read as, how that was
    known, what they are for, and how often each is seen in an epoch."""

    path: str
    rows: int
    rejected: int
    format: str
    recognised: str
    split: str
    weight: float


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One side of the split. Lengths and counts are in tokens; `labelled` are those that are trained or measured.

    `truncated` rows were cut at their end; `pieces` were made of rows that were cut into several.
    """

    rows: int
    tokens: int
    labelled: int
    shortest: int
    median: int
    longest: int
    truncated: int
    pieces: int = 0

    @property
    def labelled_share(self) -> float:
        """Labelled tokens as a share of all."""
        return self.labelled / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class Excluded:
    """A row that is not used."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Rows that say the same as an earlier one: word for word, or nearly. `leaked` are held-out rows that say the same
    as a row that is trained on, or nearly: files that the recipe puts on one side each are not cut again."""

    exact: int
    near: int
    leaked: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """What `prepare` did.

    Attributes:
        template: the name that `make_template` takes to make the same template again.
        end_of_turn: the text of the token that every answer ends with; labelled in every row that is not truncated.
        max_length: the longest row in tokens, None for no limit.
        excluded_rows: how many usable rows are left out; `excluded` names the first of them.
        parted: rows in which a token would have reached over a prompt's end and was parted there.
        notes: what a reader would not expect, in sentences.
    """

    sources: tuple[SourceReport, ...]
    template: str
    end_of_turn: str
    stop_strings: tuple[str, ...]
    max_length: int | None
    splits: Mapping[str, SplitReport]
    excluded_rows: int
    excluded: tuple[Excluded, ...]
    duplicates: Duplicates
    parted: int
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        """All rows read, the excluded and the rejected ones among them."""
        return sum(source.rows for source in self.sources)

    @property
    def rejected(self) -> int:
        """Rows that cannot be used; each is in rejected.jsonl with its reason."""
        return sum(source.rejected for source in self.sources)

    @property
    def longest(self) -> int:
        """The longest row that is used, in tokens."""
        return max(split.longest for split in self.splits.values())

    @property
    def truncated(self) -> int:
        """How many used rows were cut at their end."""
        return sum(split.truncated for split in self.splits.values())

    @property
    def pieces(self) -> int:
        """How many pieces were made of rows that were cut into several."""
        return sum(split.pieces for split in self.splits.values())

    def as_document(self) -> dict[str, object]:
        """The JSON document of data/data.json."""
        splits = {
            name: {
                "rows": split.rows,
                "tokens": split.tokens,
                "labelled_tokens": split.labelled,
                "labelled_share": round(split.labelled_share, 4),
                "length": {"shortest": split.shortest, "median": split.median, "longest": split.longest},
                "truncated": split.truncated,
                "pieces": split.pieces,
            }
            for name, split in self.splits.items()
        }
        shown = [{"file": row.file, "line": row.line, "reason": row.reason} for row in self.excluded]
        return {
            "schema": SCHEMA_VERSION,
            "rows": self.rows,
            "rejected": self.rejected,
            "sources": [
                {
                    "path": source.path,
                    "rows": source.rows,
                    "rejected": source.rejected,
                    "format": source.format,
                    "recognised": source.recognised,
                    "split": source.split,
                    "weight": source.weight,
                }
                for source in self.sources
            ],
            "template": self.template,
            "end_of_turn": self.end_of_turn,
            "stop_strings": list(self.stop_strings),
            "max_length": self.max_length,
            "splits": splits,
            "excluded": {"rows": self.excluded_rows, "first": shown},
            "duplicates": {
                "exact": self.duplicates.exact,
                "near": self.duplicates.near,
                "held_out_rows_like_a_train_row": self.duplicates.leaked,
            },
            "parted_rows": self.parted,
            "notes": list(self.notes),
        }
