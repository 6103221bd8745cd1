"""What the plan knows of the rows, and the choices about them: how long, packed or not, what of them is learned.

An epoch has `units`: rows, or where they are packed, packs. All counts of batches and steps (schedule.py) are of units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from luthier.errors import UsageError
from luthier.model.config import ModelConfig
from luthier.plan import sources
from luthier.plan.decision import DEFAULT, YOURS, Decision
from luthier.recipe.schema import Recipe

__all__ = ["DataFacts", "Epoch", "Lengths", "choose_max_length", "choose_packing", "rows_as_given"]

_PACK = 2048
_THIN_TAIL = 4  # times the 99.9th percentile
_MULTIPLE = 64
_LONG_ROWS = {
    "truncate": "cut at the end",
    "error": "refused",
    "drop": "left out",
    "split": "cut into several",
}


@dataclass(frozen=True)
class Lengths:
    """How long the rows are: (tokens, how many rows have so many), ascending."""

    counts: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Lengths:
        """Of one number a row."""
        return cls(tuple(sorted(Counter(lengths).items())))

    @cached_property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(count for _, count in self.counts)

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 where there is none."""
        return self.counts[-1][0] if self.counts else 0

    def percentile(self, percent: float) -> int:
        """The least length that at least `percent` of the rows do not exceed; 0 where there is no row."""
        wanted, seen = math.ceil(round(self.rows * percent / 100, 6)), 0
        for length, count in self.counts:
            seen += count
            if seen >= wanted:
                return length
        return 0

    def longer_than(self, tokens: int) -> int:
        """How many rows have more tokens."""
        return sum(count for length, count in self.counts if length > tokens)

    def total(self, most: int) -> int:
        """Tokens of all rows, each cut at `most`."""
        return sum(count * min(length, most) for length, count in self.counts)

    def heaviest(self, rows: int, most: int) -> int:
        """Tokens of the `rows` longest rows, each cut at `most`; where there are fewer, as often as that takes."""
        if self.rows == 0:
            return 0
        laps, left = divmod(rows, self.rows)
        tokens = laps * self.total(most) if laps else 0
        for length, count in reversed(self.counts):
            if left == 0:
                break
            taken = min(left, count)
            tokens, left = tokens + taken * min(length, most), left - taken
        return tokens


@dataclass(frozen=True)
class Epoch:
    """What one epoch trains on: `rows` (one of weight 2 counts twice) of `tokens` in all; `packs`, None: not packed."""

    rows: int
    tokens: int
    packs: int | None = None

    @property
    def units(self) -> int:
        """Of what a batch is made."""
        return self.rows if self.packs is None else self.packs

    @property
    def rows_per_unit(self) -> float:
        """1, or how many rows a pack has on average."""
        return self.rows / self.units

    def named(self, count: int) -> str:
        """`1 row`, `620 packs`."""
        name = "row" if self.packs is None else "pack"
        return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"

    def __str__(self) -> str:
        """`7,473 rows`, `620 packs (7,473 rows)`."""
        rows = f"{self.rows:,} row" + ("" if self.rows == 1 else "s")
        return rows if self.packs is None else f"{self.named(self.packs)} ({rows})"


@dataclass(frozen=True)
class DataFacts:
    """What the plan needs to know of the rows.

    Attributes:
        train_rows: to train on, before `long_rows` is applied.
        eval_rows: held out.
        lengths: of all rows, on every side, before `long_rows` is applied.
        labelled_tokens: tokens of one epoch that are learned.
        epoch: (max_length, packing) -> what an epoch is when no row, and no pack, has more tokens than that and what is
            longer is dealt with as the recipe's `long_rows` says.
    """

    train_rows: int
    eval_rows: int
    lengths: Lengths
    labelled_tokens: int
    epoch: Callable[[int, bool], Epoch]


def choose_max_length(recipe: Recipe, config: ModelConfig, lengths: Lengths, packing: bool) -> Decision[int]:
    """The longest row, as far as the model reaches; a few rows that are far longer than all others do not decide it.

    Raises:
        UsageError: the user's length is beyond the model's positions.
    """
    asked, most, longest = recipe.train.max_length, config.max_positions, lengths.longest
    if asked != "auto":
        if asked > most:
            message = f"train.max_length is {asked:,}, but the model knows only {most:,} positions"
            raise UsageError(message, f"train.max_length: {most} or less, or auto")
        reason = f"As you set it; the longest row has {longest:,} tokens."
        if longest > asked:
            reason = f"As you set it; the longest row has {longest:,} tokens: {_fate(recipe, lengths, asked)}."
        return Decision("train.max_length", asked, reason, YOURS)
    reach = f"The longest row has {longest:,} tokens"
    rejected: tuple[str, ...] = ()
    chosen, source, reason = longest, "the data, counted", f"{reach}, so nothing is cut (the model reaches {most:,})."
    usual = lengths.percentile(99.9)
    rounded = -(-usual // _MULTIPLE) * _MULTIPLE
    if longest > _THIN_TAIL * usual and rounded < min(longest, most) and recipe.long_rows != "error":
        chosen, rejected = rounded, (f"{min(longest, most)}: keeps all that the model can, for a few rows' sake",)
        reason = (
            f"{reach}, but 99.9 % of all rows have at most {usual:,}, less than a quarter of that: rounded up to a "
            f"multiple of {_MULTIPLE}; {_fate(recipe, lengths, rounded)}. To keep all: train.max_length: {longest}."
        )
        source = "the data, counted; this project's rule"
    elif longest > most:
        chosen, source = most, "the model's config.json"
        reason = f"{reach}, the model only {most:,} positions: {_fate(recipe, lengths, most)}."
    if packing and chosen < _PACK:
        pack = min(_PACK, most)
        if pack > chosen:
            reason = f"A pack holds {pack:,} tokens, so that it takes several rows. The longest row has {longest:,}"
            over = _fate(recipe, lengths, pack)
            chosen, reason, rejected = pack, f"{reason}: {over}." if longest > pack else f"{reason}.", ()
            source = "this project's rule"
    return Decision("train.max_length", chosen, reason, source, rejected)


def _fate(recipe: Recipe, lengths: Lengths, most: int) -> str:
    """What happens to the rows that are longer than `most`, of which there are some."""
    count = lengths.longer_than(most)
    rows = "row is" if count == 1 else "rows are"
    return f"{count:,} {rows} longer and {'is' if count == 1 else 'are'} {_LONG_ROWS[recipe.long_rows]}"


def choose_packing(recipe: Recipe, epoch: Epoch, max_length: int) -> Decision[bool]:
    """Off unless it is asked for."""
    asked = recipe.train.packing
    if (asked is True) != (epoch.packs is not None):
        raise ValueError(f"packing is {asked}, and the facts of an epoch say {epoch.packs} packs")
    if epoch.packs is not None:
        filled = epoch.tokens / (epoch.packs * max_length)
        reason = (
            f"As you set it: {epoch}, {filled:.1%} filled; whole rows, each seen alone. batch_size and micro_batch "
            "count packs."
        )
        return Decision("train.packing", True, reason, YOURS)
    if asked is False:
        return Decision("train.packing", False, "As you set it: every row counts by itself.", YOURS)
    reason = (
        "Rows of a micro-batch are laid end to end without padding in any case, so packs would win no speed: they "
        "only even out the tokens of a step."
    )
    rejected = ("true: how many rows a step has would follow from their lengths",)
    return Decision("train.packing", False, reason, "this project's batches, which have no padding", rejected)


def rows_as_given(recipe: Recipe, lengths: Lengths, max_length: int) -> tuple[Decision[object], ...]:
    """What the recipe always says itself about rows: kept, with what is known about it."""
    return (
        _train_on(recipe),
        _prompt_loss_weight(recipe),
        _long_rows(recipe, lengths, max_length),
        _longest_first(recipe),
    )


def _train_on(recipe: Recipe) -> Decision[object]:
    if recipe.train_on == "completions":
        reason = "Every answer is learned and nothing else: what a user writes need not be imitated."
        return Decision("train_on", recipe.train_on, reason, DEFAULT)
    if recipe.train_on == "last":
        return Decision("train_on", "last", "As you set it: only the last answer of each row is learned.", YOURS)
    reason = "As you set it: all text of a row is learned, prompts as much as answers."
    return Decision("train_on", "all", reason, f"{YOURS}; {sources.PROMPT_LOSS}")


def _prompt_loss_weight(recipe: Recipe) -> Decision[object]:
    weight, setting = recipe.prompt_loss_weight, "prompt_loss_weight"
    studies = f"{sources.PROMPT_LOSS}; {sources.PROMPT_WEIGHT}"
    if weight:
        reason = f"As you set it: a token outside the answers counts {weight:g} of one inside. Held-out losses omit it."
        return Decision(setting, weight, reason, f"{YOURS}; {studies}")
    reason = (
        "Prompts do not count, which is usual. That they do can help where they are long, answers short or rows few."
    )
    rejected = ("a low weight, such as 0.1: worth a trial there",)
    return Decision(setting, weight, reason, f"a convention; {studies}", rejected)


def _long_rows(recipe: Recipe, lengths: Lengths, max_length: int) -> Decision[object]:
    policy = recipe.long_rows
    said = "As you set it" if policy != "truncate" else "Cut at the end"
    if lengths.longest <= max_length:
        reason = f"{said}, but no row is longer than {max_length:,} tokens."
    else:
        reason = f"{said}: {_fate(recipe, lengths, max_length)}."
        if policy == "truncate":
            reason += " What is cut does not teach the model to stop."
    return Decision("long_rows", policy, reason, DEFAULT if policy == "truncate" else YOURS)


def _longest_first(recipe: Recipe) -> Decision[object]:
    if not recipe.train.longest_first:
        reason = "Batches come in random order; within a step the largest micro-batch is first in any case."
        return Decision("train.longest_first", False, reason, DEFAULT)
    reason = (
        "As you set it: in the first epoch the batches with most tokens come first, so that a run that does not fit "
        "stops at once; the batches are those of the seed, and later epochs are shuffled as usual."
    )
    return Decision("train.longest_first", True, reason, YOURS)
