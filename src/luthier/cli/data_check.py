"""`luthier data check`: what is wrong with the data, worst first, with where it stands and what to do about it.

The whole report goes to stdout. Everything in it is measured by `luthier.data.audit`; here it is only laid out.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from luthier.cli import console
from luthier.cli.targets import UNTRAINED_REMEDY, find_tokenizer, is_recipe, read_target, say_waiting, untrained_names
from luthier.errors import DataError

if TYPE_CHECKING:
    from luthier.data.audit import Audit, Finding, Sighting
    from luthier.data.audit.checks import Figures
    from luthier.data.audit.lengths import Lengths
    from luthier.data.conversation import Source
    from luthier.data.dataset import Dataset
    from luthier.data.problems import RowProblem
    from luthier.recipe.schema import Recipe

__all__ = ["check", "report"]

_BAD_ROWS = 20
_EVIDENCE = 3
_FILES = 8
_OPENINGS = 5
_KINDS = 6
_SAME = 5
_MARGIN = 9
_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def check(target: str, model: str | None, sets: list[str] | None, as_json: bool) -> None:
    """Audit a recipe's data, or a file, folder, bundled set or hub data set by itself.

    Ends with exit code 3 where training would stop at the data.
    """
    from luthier.data.audit import Finding, Told, as_document, audit
    from luthier.model.config import read_config

    recipe = read_target(target, model, sets or ())
    base, tokenizer = find_tokenizer(recipe.model)
    with console.counting("looking at the data") as advance:
        told = Told(  # two passes over the same rows, one bar
            preparing=lambda done, total: advance(done, 2 * total),
            reading=lambda done, total: advance(total + done, 2 * total),
            waiting=say_waiting,
        )
        positions = read_config(base).max_positions if (base / "config.json").is_file() else None
        made = audit(recipe, tokenizer, told, positions)
    if made.dataset is not None and (names := untrained_names(base, made.dataset.template)):
        reason = (
            f"the model was never trained on {', '.join(names)}, which the template writes, and LoRA does not train "
            "them: it would hardly learn to stop"
        )
        finding = Finding("untrained-tokens", "warning", reason, UNTRAINED_REMEDY)
        made = replace(made, findings=(finding, *made.findings))
    if as_json:
        console.print_json(as_document(made))
    else:
        report(made, recipe, target)
        if not is_recipe(target) and model is None:
            console.say("[dim]tokens are counted by sprig's tokenizer; --model NAME counts by another model's[/]")
    if made.failed:
        raise typer.Exit(DataError.exit_code)


def report(made: Audit, recipe: Recipe, target: str) -> None:
    """Everything the audit found, for a person to read."""
    place = _namer([source.path for source in made.sources])
    _print_files(made, place)
    console.output.print()
    for finding in made.findings:
        console.output.print(_finding(finding, made.problems, place))
    if made.findings:
        console.output.print()
    if made.dataset is not None and made.figures is not None:
        _print_figures(made.dataset, made.figures, recipe)
    _print_end(made, target)


Namer = Callable[["Source", int | None], str]


def _namer(paths: Sequence[str]) -> Namer:
    """Names places as briefly as can be: from here where the file lies here, by its name alone where that is enough."""
    names = Counter(Path(path).name for path in set(paths))

    def name(source: Source, column: int | None = None) -> str:
        here = os.path.relpath(source.file)
        shown = here if not here.startswith("..") else source.file
        if names[Path(source.file).name] == 1 and len(shown) > 30:
            shown = Path(source.file).name
        return f"{shown}:{source.line}" + ("" if column is None else f":{column}")

    return name


def _print_files(made: Audit, place: Namer) -> None:
    from luthier.data.conversation import Source

    counts = {} if made.dataset is None else {one.path: one.rows for one in made.dataset.report.sources}
    for source in made.sources[:_FILES]:
        name = place(Source(source.path, 0), None).removesuffix(":0")
        rows = f"{counts[source.path]:,} rows " if source.path in counts else ""
        how = f"{rows}read as {source.format} ({source.recognised})"
        console.output.print(f"[bold]{escape(name)}[/]  {escape(how)}")
    if len(made.sources) > _FILES:
        console.output.print(f"[dim]and {len(made.sources) - _FILES:,} files more, {made.rows:,} rows in all[/]")


def _finding(finding: Finding, problems: Sequence[RowProblem], place: Namer) -> Table:
    """The severity on the left; beside it what is so, the rows, and what to do."""
    body: list[RenderableType] = [Text(finding.reason, style="" if finding.severity == "note" else "bold")]
    if finding.check == "bad-rows":
        bad = problems[: finding.rows]
        chosen = _chosen(bad)
        body.append(_places(_bad_rows(chosen, place)))
        if more := finding.rows - len(chosen):
            body.append(_indented(f"… and {more:,} more (--json names them); {_kinds(bad, finding.rows)}"))
    elif finding.evidence:
        body.append(_places([_sighting(one, place) for one in finding.evidence[:_EVIDENCE]]))
        if finding.rows > _EVIDENCE:
            body.append(_indented(f"… and {finding.rows - _EVIDENCE:,} more (--json names them)"))
    if finding.remedy:
        body.append(Text(f"→ {finding.remedy}", style="green"))
    return _beside(Text(finding.severity, style=_COLOURS[finding.severity]), Group(*body))


def _beside(left: RenderableType, right: RenderableType) -> Table:
    """A word in the margin, and what it is about."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=_MARGIN)
    grid.add_column(overflow="fold")
    grid.add_row(left, right)
    return grid


Seen = tuple[str, Text]
"""A place, and what is to be seen there."""


def _places(seen: Iterable[Seen]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for where, what in seen:
        grid.add_row(Text(f"  {where}"), what)
    return grid


def _sighting(one: Sighting, place: Namer) -> Seen:
    shown = Text(f"as {place(one.other, None)}  " if one.other is not None else "")
    return place(one.source, None), shown.append(one.text, style="dim")


def _bad_rows(shown_rows: Sequence[RowProblem], place: Namer) -> Iterator[Seen]:
    """Where each is, what is wrong with it, and, once, what to do about it."""
    from luthier.data.conversation import Source

    told: set[str] = set()
    for one in shown_rows:
        shown = Text(one.reason)
        if one.remedy and one.remedy not in told:
            told.add(one.remedy)
            shown.append(f" → {one.remedy}", style="green")
        yield place(Source(one.file, one.line), one.column), shown


def _indented(words: str) -> Padding:
    return Padding(Text(words, style="dim"), (0, 0, 0, 2))


def _kinds(bad: Sequence[RowProblem], count: int) -> str:
    """How many there are of each kind."""
    kinds = Counter(_kind(one) for one in bad).most_common(_KINDS)
    of = "in all" if len(bad) == count else f"of the first {len(bad):,}"
    return f"{of} " + "; ".join(f"{number:,} × {kind}" for kind, number in kinds)


def _kind(problem: RowProblem) -> str:
    """The reason without what differs from row to row: numbers and what is quoted."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", problem.reason))


def _chosen(bad: Sequence[RowProblem]) -> list[RowProblem]:
    """At most twenty: the first of every kind, then more of each, in the order of the files."""
    each = max(_SAME, _BAD_ROWS // max(1, len({_kind(one) for one in bad})))
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, int]] = []
    for index, one in enumerate(bad):
        kind = _kind(one)
        if seen[kind] < each:
            ranked.append((seen[kind], index))
        seen[kind] += 1
    return [bad[index] for index in sorted(index for _, index in sorted(ranked)[:_BAD_ROWS])]


def _print_figures(dataset: Dataset, figures: Figures, recipe: Recipe) -> None:
    sides = console.table("", "side", ">rows", ">tokens", ">trained", ">median", ">longest")
    for name, split in dataset.report.splits.items():
        if split.rows:
            numbers = (f"{split.rows:,}", f"{split.tokens:,}", f"{split.labelled_share:.0%}")
            sides.add_row(name, *numbers, f"{split.median:,}", f"{split.longest:,}")
    console.output.print(sides)
    console.output.print()
    _print_lengths(figures.lengths)
    _print_cuts(figures.lengths, recipe)
    for name, words in _lines(figures):
        console.output.print(_beside(Text(name, style="bold"), Text(words)))
    console.output.print()


def _print_lengths(lengths: Lengths) -> None:
    most_rows = f", 99 in 100 up to {lengths.quantiles[99]:,}" if lengths.quantiles[99] < lengths.longest else ""
    words = f"tokens a row: median {lengths.quantiles[50]:,}{most_rows}, longest {lengths.longest:,}"
    console.output.print(_beside(Text("lengths", style="bold"), Text(words)))
    most = max(bar.rows for bar in lengths.bars)
    room = min(60, console.output.width - 32)
    for bar in lengths.bars:
        span = f"from {bar.start:,}" if bar.stop is None else f"{bar.start:,}–{bar.stop - 1:,}"
        if bar.stop == bar.start + 1:
            span = f"{bar.start:,}"
        cells = "█" * (bar.rows * room // most) or ("▏" if bar.rows else "")
        console.output.print(Text(f"{span:>20}  ").append(cells, style="cyan").append(f" {bar.rows:,}"))


def _print_cuts(lengths: Lengths, recipe: Recipe) -> None:
    """What each limit would cut, up to the first that cuts nothing."""
    from luthier.data.audit.findings import share_in_words

    own = recipe.train.max_length
    first_whole = next((i for i, cut in enumerate(lengths.cuts) if not cut.rows), len(lengths.cuts) - 1)
    shown = console.table("", "max_length", ">rows cut", ">of all", ">trained tokens lost", ">no answer left")
    for cut in lengths.cuts[: first_whole + 1]:
        mine = " (the recipe's)" if cut.max_length == own else ""
        lost = share_in_words(cut.labelled_lost, lengths.labelled)
        numbers = (f"{cut.rows:,}", share_in_words(cut.rows, lengths.rows), lost, f"{cut.emptied:,}")
        shown.add_row(f"{cut.max_length:,}{mine}", *numbers)
    if first_whole == 0:
        words = f"no row is longer than {lengths.cuts[0].max_length:,} tokens"
        console.output.print(_beside("", Text(words, style="dim")))
    else:
        console.output.print()
        console.output.print(shown)
    console.output.print()


def _lines(figures: Figures) -> Iterator[tuple[str, str]]:
    """What remains to be said, a line each."""
    from luthier.data.audit.findings import excerpt, rows_in_words, share_in_words

    speakers, openings = figures.speakers, figures.openings
    yield "turns", _turns(figures)
    common = [one for one in openings.most_common()[:_OPENINGS] if one[1] >= 0.01 * openings.answers]
    begin = ", ".join(f"“{excerpt(opening)}” {share_in_words(count, openings.answers)}" for opening, count in common)
    if speakers.plain < speakers.rows:
        most = f"; most begin with {begin}" if begin else ""
        yield "answers", f"{figures.different_answers:,} different ones{most}"
    sampled = sum(figures.languages.values())
    spoken = ", ".join(f"{name} {share_in_words(rows, sampled)}" for name, rows in list(figures.languages.items())[:6])
    yield "languages", f"{spoken} (guessed from {rows_in_words(sampled)})"


def _turns(figures: Figures) -> str:
    from luthier.data.audit.findings import share_in_words

    speakers = figures.speakers
    if speakers.plain == speakers.rows:
        return "none: all rows are plain text"
    same = speakers.turns == speakers.longest * speakers.rows
    mean = f"{speakers.turns / speakers.rows:.1f} a row, at most {speakers.longest:,}"
    words = [f"{speakers.longest} in every row" if same else mean]
    for count, what in ((speakers.with_system, "a system turn"), (speakers.with_tool, "a tool's turn")):
        if count:
            words.append(f"{share_in_words(count, speakers.rows)} of the rows with {what}")
    if speakers.untrained_answers:
        words.append(f"{speakers.untrained_answers:,} answers not trained")
    return "; ".join(words)


def _print_end(made: Audit, target: str) -> None:
    counted = Counter(finding.severity for finding in made.findings)
    named = [_counted(counted[kind], kind) for kind in ("error", "warning", "note") if counted[kind]]
    if made.failed:
        verdict = f"[bold red]Training would stop at this data[/]: {', '.join(named)}. Correct the rows and check again"
        skip = made.dataset is not None and made.rejected
        verdict += ", or train without them: `on_bad_row: skip`." if skip else "."
    elif counted["warning"]:
        verdict = f"[yellow]This data can be trained on, but look at the warnings first[/]: {', '.join(named)}."
    else:
        verdict = "[bold green]Nothing is wrong with this data.[/]"
        verdict += f" {', '.join(named)} for you to judge." if named else ""
    console.output.print(verdict)
    if made.dataset is not None:
        name = escape(target)
        following = f"luthier plan {name}" if is_recipe(target) else f"luthier init --data {name} --out recipe.yaml"
        console.output.print(f"[dim]to see the rows as the model will:[/] luthier data show {name}", soft_wrap=True)
        then = f"[dim]and then:[/] luthier data check {name}" if made.failed else f"[dim]to go on:[/] {following}"
        console.output.print(then, soft_wrap=True)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
