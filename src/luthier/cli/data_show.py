"""`luthier data show`: rows as the model will see them, on the terminal, as a page, or as JSON.

What is shown is what `prepare` gives training: the same template, limits, split and packs. Only one thing is otherwise:
rows that cannot be used are left out here, and told of, where training would stop.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.markup import escape

from luthier.cli import console
from luthier.cli.targets import epoch_of, find_tokenizer, read_target, say_waiting
from luthier.errors import UsageError
from luthier.runs import SCHEMA_VERSION, RunDirectory, write_text

if TYPE_CHECKING:
    from luthier.data.prepare import Dataset
    from luthier.data.view_page import Heading
    from luthier.data.view_rows import At, PackView, RowView
    from luthier.recipe.schema import Recipe

__all__ = ["ShowOptions", "show"]

_ROWS, _ROWS_OF_A_PAGE = 3, 50
_PACKS, _PACKS_OF_A_PAGE = 1, 4


@dataclass(frozen=True)
class ShowOptions:
    """The options of the command.

    Attributes:
        model: instead of the recipe's.
        sets: changes of the recipe, KEY=VALUE.
        rows: how many rows (or packs) are shown; None: 3 (or 1), on a page 50 (or 4).
        row: only this one, as `Example.row` counts.
        at: only that at FILE:LINE.
        split: rows of this side only.
        packed: the packs of the first optimizer step.
        tokens: every token by itself, with its id.
        html: write a page there.
        as_json: one JSON document on stdout.
    """

    model: str | None = None
    sets: Sequence[str] = ()
    rows: int | None = None
    row: int | None = None
    at: str | None = None
    split: Literal["train", "eval", "test"] | None = None
    packed: bool = False
    tokens: bool = False
    html: Path | None = None
    as_json: bool = False


@dataclass(frozen=True)
class _Looked:
    """What was prepared, and what of it is shown. `packs` are the first of `step_packs` in the step."""

    dataset: Dataset
    rows: tuple[RowView, ...]
    packs: tuple[PackView, ...] = ()
    step_packs: int = 0

    @property
    def weighted(self) -> bool:
        """Whether there are tokens that are trained with a weight below 1."""
        every = (*self.rows, *(document for pack in self.packs for document in pack.documents))
        return any(row.lightly for row in every)


def show(target: str, options: ShowOptions) -> None:
    """Show rows of `target`: a recipe, a run directory, a data file or folder, or the name of bundled data."""
    _check(options)
    recipe = read_target(target, options.model, options.sets)
    looked = _look(_prepared(recipe, target, options), options)
    if options.html is not None:
        from luthier.data.view_page import page

        write_text(options.html, page(looked.dataset, _heading(target, looked.dataset), looked.rows, looked.packs))
        console.say(f"wrote {escape(str(options.html))}; open it in a browser")
    if options.as_json:
        console.print_json(_document(looked))
    elif options.html is None:
        _print(looked, options)


def _check(options: ShowOptions) -> None:
    chosen = [name for name, value in (("--row", options.row), ("--at", options.at)) if value is not None]
    if len(chosen) == 2:
        raise UsageError("--row and --at both name a row", "give one of them")
    if chosen and (options.packed or options.split or options.rows is not None):
        raise UsageError(f"{chosen[0]} names the row; --rows, --split and --packed choose others", "leave them out")
    if options.packed and options.split not in (None, "train"):
        raise UsageError(f"only what is trained on is packed, not --split {options.split}", "leave out --split")
    if options.html is not None and not options.html.parent.is_dir():
        raise UsageError(f"there is no folder {options.html.parent} for the page", "make it, or choose another place")
    if options.rows is not None and options.rows < 1:
        raise UsageError("--rows must be 1 or more", "--rows 3")


def _prepared(recipe: Recipe, target: str, options: ShowOptions) -> Dataset:
    """The recipe's data as training has it, cut to the length that training will choose."""
    from luthier.data.prepare import limit_length, prepare

    skipping = recipe.model_copy(update={"on_bad_row": "skip"})
    base, tokenizer = find_tokenizer(recipe.model)
    with console.counting("reading the data") as advance:
        dataset = prepare(skipping, tokenizer, progress=advance, waiting=say_waiting)
    dataset = limit_length(dataset, _max_length(recipe, dataset, base, packed=options.packed))
    if dataset.report.rejected:
        stops = "; training stops at them" if recipe.on_bad_row == "stop" else ""
        count = f"{dataset.report.rejected:,} of {dataset.report.rows:,} rows cannot be used"
        console.say(f"[yellow]{count}[/]{stops}: luthier data check {escape(target)}")
    return dataset


def _max_length(recipe: Recipe, dataset: Dataset, base: Path, *, packed: bool) -> int:
    """As the plan chooses it; it is asked for this alone, since no machine is needed to look at rows."""
    from luthier.data.split import SIDES
    from luthier.model.config import read_config
    from luthier.plan.rows import Lengths, choose_max_length

    asked, longest = recipe.train.max_length, dataset.report.longest
    if not (base / "config.json").is_file():
        return longest if asked == "auto" else asked
    lengths = Lengths.of(length for side in SIDES for length in dataset.split(side).lengths.tolist())
    return choose_max_length(recipe, read_config(base), lengths, packed or recipe.train.packing is True).value


def _look(dataset: Dataset, options: ShowOptions) -> _Looked:
    from luthier.data import view_rows

    if options.packed and options.html is None:
        return _packs(dataset, _PACKS if options.rows is None else options.rows)
    found: list[At]
    if options.row is not None:
        found = view_rows.at_row(dataset, options.row)
    elif options.at is not None:
        found = view_rows.at_place(dataset, options.at)
    else:
        usual = _ROWS if options.html is None else _ROWS_OF_A_PAGE
        found = view_rows.spread_over(dataset, usual if options.rows is None else options.rows, options.split)
    rows = tuple(view_rows.row_view(dataset, at) for at in found)
    return replace(_packs(dataset, _PACKS_OF_A_PAGE), rows=rows) if options.packed else _Looked(dataset, rows)


def _packs(dataset: Dataset, most: int) -> _Looked:
    """The first packs of the first optimizer step."""
    from luthier.data.batches import Batches
    from luthier.data.view_rows import pack_view
    from luthier.plan.schedule import choose_batch_size

    recipe, capacity = dataset.recipe, dataset.report.max_length
    if recipe.train.packing is False:
        raise UsageError("the recipe says train.packing: false", "--set train.packing=true shows what it would do")
    if recipe.train.packing != True:  # noqa: E712  "auto" is true as well
        console.say("[dim]without train.packing: true the recipe packs nothing; this is what it would do[/]")
    train = dataset.train
    size = choose_batch_size(recipe, epoch_of(train, recipe.seed, capacity)).value
    first = recipe.train.longest_first
    units = Batches(train, size, size, recipe.seed, capacity=capacity, longest_first=first).units(0)
    packs = [pack_view(dataset, number, unit.tolist(), capacity) for number, unit in enumerate(units[:most])]
    return _Looked(dataset, (), tuple(packs), len(units))


def _print(looked: _Looked, options: ShowOptions) -> None:
    from luthier.cli.pieces import Screen

    for note in _notes(looked.dataset):
        console.say(f"[dim]{escape(note)}[/]")
    screen = Screen(console.output, tokens=options.tokens)
    screen.legend(weighted=looked.weighted)
    for row in looked.rows:
        screen.row(row)
    for pack in looked.packs:
        screen.pack(pack, looked.step_packs)


def _notes(dataset: Dataset) -> tuple[str, ...]:
    """The report's, but for what it says of a run's files: looking makes none."""
    return tuple(note for note in dataset.report.notes if RunDirectory(Path()).rejected.name not in note)


def _heading(target: str, dataset: Dataset) -> Heading:
    from luthier.data.view_page import Heading

    recipe, report = dataset.recipe, dataset.report
    model = recipe.model if not os.path.isabs(recipe.model) else Path(recipe.model).name
    learned = {"completions": "every answer", "last": "the last answer of a row", "all": "all of the text"}
    less = f"; the rest with weight {recipe.prompt_loss_weight:g}" if recipe.prompt_loss_weight else ""
    sources = [f"{Path(one.path).name}: {one.rows:,} rows read as {one.format}" for one in report.sources]
    facts = [
        ("model", model),
        ("template", report.template),
        ("end of turn", report.end_of_turn),
        ("learned", learned[recipe.train_on] + less),
        ("longest row", f"{report.longest:,} tokens (max_length {report.max_length:,})"),
        ("data", "\n".join(sources[:10]) + (f"\nand {len(sources) - 10} more" if len(sources) > 10 else "")),
    ]
    counted = {"cannot be used": report.rejected, "left out": report.excluded_rows, "cut at the end": report.truncated}
    facts += [(name, f"{count:,} rows") for name, count in counted.items() if count]
    return Heading(Path(target).name or target, tuple(facts), _notes(dataset))


def _document(looked: _Looked) -> dict[str, object]:
    report = looked.dataset.report
    document: dict[str, object] = {
        "schema": SCHEMA_VERSION,
        "model": looked.dataset.recipe.model,
        "template": report.template,
        "end_of_turn": report.end_of_turn,
        "max_length": report.max_length,
        "rejected": report.rejected,
        "rows": [_row(row) for row in looked.rows],
    }
    if looked.packs:
        document["packs_in_step"] = looked.step_packs
        document["packs"] = [
            {
                "capacity": pack.capacity,
                "tokens": pack.tokens,
                "filled": round(pack.filled, 4),
                "documents": [_row(row) for row in pack.documents],
            }
            for pack in looked.packs
        ]
    return document


def _row(row: RowView) -> dict[str, object]:
    return {
        "file": row.source.file,
        "line": row.source.line,
        "row": row.example.row,
        "side": row.side,
        "tokens": row.tokens,
        "trained": row.trained,
        "trained_less": row.lightly,
        "trained_share": round(row.share, 4),
        "whole": row.whole,
        "begin": row.begin,
        "end": row.end,
        "weight": row.weight,
        "ids": row.example.ids.tolist(),
        "labels": row.example.labels.tolist(),
        "pieces": [
            {
                "start": piece.start,
                "ids": list(piece.ids),
                "text": piece.text,
                "kind": piece.kind,
                "weight": piece.weight,
                "starts": piece.starts,
            }
            for piece in row.pieces
        ],
    }
