"""What the stages show a person: the data, the plan, base against tuned, the files. Tables go to stdout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.markup import escape

from luthier.cli import console
from luthier.runs import RunDirectory

if TYPE_CHECKING:
    from luthier.cli.preparing import Prepared
    from luthier.plan.plan import Plan

__all__ = ["data", "data_notes", "data_table", "ending", "evaluation", "files", "full_plan", "plan"]

_WIDEST = 120


def data(prepared: Prepared) -> None:
    """The rows by side, and whatever was done to them."""
    data_table(prepared)
    data_notes(prepared)


def data_table(prepared: Prepared) -> None:
    """The rows by side."""
    report = prepared.dataset.report
    shown = console.table("data", "side", ">rows", ">tokens", ">trained", ">median", ">longest", ">cut")
    for name, split in report.splits.items():
        if split.rows:
            cells = (split.rows, split.tokens, split.labelled, split.median, split.longest, split.truncated)
            shown.add_row(name, *(f"{cell:,}" for cell in cells))
    console.messages.print(shown)


def data_notes(prepared: Prepared) -> None:
    """How the rows were read, and whatever was done to them."""
    report = prepared.dataset.report
    for source in report.sources:
        how = f"{_rows(source.rows)} read as {source.format} ({source.recognised})"
        weight = f", each seen {source.weight:g} times an epoch" if source.weight != 1 else ""
        console.say(f"[dim]{escape(Path(source.path).name)}: {escape(how)}{weight}[/]")
    if report.truncated:
        cut = f"{report.truncated:,} rows are longer than {report.max_length:,} tokens and are cut at their end"
        console.say(f"[yellow]{cut}[/]: they do not teach the model to stop")
    if report.pieces:
        console.say(f"[dim]rows longer than {report.max_length:,} tokens are cut into {report.pieces:,} parts[/]")
    if report.excluded:
        first = report.excluded[0]
        place = escape(f"{first.file}:{first.line}")
        words = f"{_rows(report.excluded_rows)} {'is' if report.excluded_rows == 1 else 'are'} left out"
        console.say(f"[yellow]{words}[/], the first at {place}: {first.reason}")
    if report.duplicates.exact or report.duplicates.near:
        same = f"{_rows(report.duplicates.exact)} say word for word what an earlier one says"
        nearly = f"{report.duplicates.near:,} more say it nearly"
        console.say(f"[dim]{same}, {nearly} (luthier data check shows which)[/]")
    for note in report.notes:
        console.say(f"[dim]{escape(note)}[/]")


def _rows(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")


def plan(prepared: Prepared) -> None:
    """What was decided, in a few lines; the reasons are the plan command's to tell."""
    from luthier.plan.explain import memory_lines, shown_value, summary, time_lines

    made = prepared.plan
    console.say(f"\n[bold]plan[/]    {escape(summary(made))}")
    width = min(console.messages.width, _WIDEST)
    for line in (*memory_lines(made, width), *time_lines(made, width)):
        console.messages.print(line)
    words = [f"[dim]{one.setting.split('.')[-1]}[/] {escape(shown_value(one.value))}" for one in made.decisions]
    console.messages.print("  ".join(words))
    console.say("[dim]why each is what it is: luthier plan, or plan.json in the run directory[/]\n")


def full_plan(made: Plan, *, why: bool) -> None:
    """The whole plan, on stdout: memory, time, and the table of decisions, with `why` in full."""
    from luthier.plan.explain import memory_lines, plan_table, summary, time_lines

    out = console.output
    out.print(f"[bold]plan[/]    {escape(summary(made))}")
    width = min(out.width, _WIDEST)
    for line in (*memory_lines(made, width), *time_lines(made, width)):
        out.print(line)
    out.print()
    out.print(plan_table(made, why=why))
    if not why:
        out.print("[dim]reasons in full, sources, and what was rejected: --why; all of it: --json[/]")


def _mapping(value: object) -> Mapping[str, object]:
    return cast(Mapping[str, object], value)


def _listed(value: object) -> list[Mapping[str, object]]:
    return cast("list[Mapping[str, object]]", value)


def evaluation(document: Mapping[str, object]) -> None:
    """Scores of base and tuned, and the same questions answered by both."""
    base, tuned = _mapping(document["base"]), _mapping(document["tuned"])
    shown = console.table(f"{document['rows']} {document['split']} rows, never trained on", "", ">base", ">tuned")
    for figure in ("loss", "perplexity"):
        shown.add_row(figure, f"{base[figure]:.3f}", f"{tuned[figure]:.3f}")
    for task in _listed(document["tasks"]):
        before, after = _mapping(task["base"]), _mapping(task["tuned"])
        for figure, value in after.items():
            form = ".1f" if figure == "mean_tokens" else ".0%"
            shown.add_row(f"{task['name']}: {figure.replace('_', ' ')}", f"{before[figure]:{form}}", f"{value:{form}}")
        if task["retained"] is not None:
            shown.add_row(f"{task['name']}: kept of what the base knew", "", f"{task['retained']:.0%}")
    console.output.print(shown)
    console.output.print()
    samples = _listed(document["samples"])
    if samples:
        answers = console.table("the same questions, before and after", "question", "base", "tuned")
        for sample in samples:
            answers.add_row(*(_short(str(sample[key])) for key in ("prompt", "base", "tuned")))
        console.output.print(answers)


def _short(text: str, most: int = 240) -> str:
    """A long answer's beginning: a table is to be looked at; eval.json holds all of it."""
    text = " ".join(text.split())
    return escape(text if len(text) <= most else text[:most].rstrip() + " …")


def _size(path: Path) -> str:
    every = path.rglob("*") if path.is_dir() else (path,)
    total = float(sum(file.stat().st_size for file in every if file.is_file()))
    for unit in ("B", "kB", "MB"):
        if total < 1000:
            return f"{total:.0f} {unit}"
        total /= 1000
    return f"{total:.1f} GB"


FILES = (
    ("recipe.yaml", "what was asked for"),
    ("plan.json", "what was decided, and why"),
    ("data/data.json", "the rows, how they were read and split"),
    ("events.jsonl", "every step: loss, learning rate, gradient norm, speed, memory"),
    ("adapter", "the tuned adapter, in PEFT's layout"),
    ("eval.json", "base against tuned"),
    ("exports/hf", "the merged model, for transformers and vLLM"),
    ("exports/gguf", "for llama.cpp"),
    ("exports/ollama", "for Ollama, with its Modelfile"),
    ("exports/ollama-adapter", "for Ollama, base and adapter apart"),
    ("exports/mlx", "for mlx-lm"),
    ("exports/mlx-adapter", "the adapter, for mlx-lm"),
)


def ending(run: RunDirectory, document: Mapping[str, object]) -> None:
    """After a whole run: is it better, where is it, what next."""
    if document["evaluation"] is not None:
        console.output.print()
        evaluation(_mapping(document["evaluation"]))
    files(run)


def files(run: RunDirectory) -> None:
    """What lies in the run directory, and what to type next."""
    shown = console.table(f"{run.path}", "file", ">size", "what it is")
    for name, about in FILES:
        path = run.path / name
        if path.exists():
            shown.add_row(name, _size(path), about)
    console.output.print()
    console.output.print(shown)
    next_words = console.table("what next", "type", "to")
    next_words.add_row(f"luthier chat {run.path}", "talk with it")
    next_words.add_row(f'luthier generate {run.path} -p "…"', "ask it one thing (--base: ask the base)")
    if run.export("ollama").exists():
        next_words.add_row(f"ollama create mine -f {run.export('ollama') / 'Modelfile'}", "have it in Ollama")
    next_words.add_row("luthier init --data rows.jsonl --out recipe.yaml", "tune on your own rows")
    console.output.print()
    console.output.print(next_words)
