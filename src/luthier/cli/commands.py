"""Every command of `luthier`: its options and help. What a command does stands in `stages`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from luthier.cli import console, data_commands, serve_command
from luthier.cli.options import Json, Sets
from luthier.errors import UsageError
from luthier.runs import RunDirectory

if TYPE_CHECKING:
    from luthier.cli.preparing import Prepared
    from luthier.recipe.schema import Recipe

__all__ = ["register"]

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (luthier init writes one).")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Tuned = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, an adapter, or a merged model's folder.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="RUN", help="The run directory (default: runs/ and the name of the recipe)."),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the newest checkpoint of the run directory, also with more steps and what else may change.",
    ),
]
Temperature = Annotated[float, typer.Option(min=0.0, max=5.0, help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from the likeliest tokens of this total.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from this many likeliest tokens; 0: from all.")]
MinP = Annotated[
    float, typer.Option("--min-p", min=0.0, max=1.0, help="Draw from tokens at least this share of the likeliest.")
]
Stops = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text. Repeatable.")]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", min=0.01, max=10.0, help="Above 1: tokens seen already count less.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Stop after this many tokens, whatever happens.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed and settings give the same answer.")]
System = Annotated[str | None, typer.Option("--system", help="A system message before the conversation.")]
BaseOnly = Annotated[bool, typer.Option("--base", help="Ask the base model instead, without the adapter.")]

Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Hold what was written against the run.")]
VerifyAgain = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify", help="--verify: only verify what was exported before. --no-verify: only export."
    ),
]


def register(app: typer.Typer) -> None:
    """Add every command to `app`, in the order in which people meet them."""
    for before in (demo, init, presets, doctor, plan):
        app.command()(before)
    app.add_typer(data_commands.app, name="data")
    for function in (train, run, evaluate, verify, merge, export, generate, chat, serve_command.serve):
        app.command(name="eval" if function is evaluate else function.__name__)(function)


def _load(recipe: Path, sets: list[str] | None) -> Recipe:
    from luthier.recipe.load import load_recipe

    return load_recipe(recipe, sets or ())


def _asked(recipe: Path, out: Path | None, sets: list[str] | None) -> tuple[Recipe, RunDirectory]:
    """The recipe, and the run directory it goes to."""
    return _load(recipe, sets), RunDirectory(Path("runs") / recipe.stem if out is None else out)


def _prepared(recipe: Recipe, directory: RunDirectory, resume: bool) -> Prepared:
    """What the recipe means here. Hold the directory meanwhile."""
    from luthier.cli import preparing
    from luthier.cli.pins import pins_of
    from luthier.cli.resuming import check_free, check_stop_file
    from luthier.cli.working import stage

    with stage("the data was read"):
        check_free(directory, recipe, resume=resume)  # before the data is read: it takes a while
        check_stop_file(recipe)
        pins = pins_of(directory, resume=True) if resume else None
        return preparing.prepare(recipe, pins=pins, folder=directory.path)


def _exported(document: dict[str, object], as_json: bool) -> None:
    if as_json:
        console.print_json(document)
    else:
        console.say(f"wrote {escape(str(document['path']))}")
        if "command" in document:
            console.say(f"next: {escape(str(document['command']))}")


def demo(
    out: Annotated[Path | None, typer.Option("--out", metavar="RUN", help="Where to; runs/demo if left out.")] = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Tune the bundled model to talk like a pirate, on this machine, and show before and after. A minute or two."""
    from luthier.cli import demo as script

    script.run(out, resume, as_json)


def init(
    data: Annotated[
        str | None, typer.Option(help="Your rows: a file, a folder, a data set on the hub, or pirate or tales.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base: a hub id, a folder, or sprig.")] = None,
    preset: Annotated[str | None, typer.Option(help="Start from a preset (luthier presets lists them).")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write here instead of to stdout.")] = None,
) -> None:
    """Write a recipe with every setting explained."""
    from luthier.errors import UsageError
    from luthier.recipe.init import commented_recipe
    from luthier.runs import write_text

    text = commented_recipe(None if data is None else _named_from(data, out), model, preset)
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise UsageError(f"{out} is there already", "choose another name with --out, or remove it first")
    write_text(out, text)
    name = escape(str(out))
    console.say(f"wrote {name}. Next: luthier plan {name}, then luthier run {name}")


def _named_from(data: str, out: Path | None) -> str:
    """What a recipe at `out` calls the data: its paths are taken from where it lies. Refuses what is not there."""
    import os

    from luthier.errors import UsageError
    from luthier.recipe.places import reads_as_hub_set
    from luthier.recipe.schema import BUNDLED_DATA

    if data in BUNDLED_DATA:
        return data
    if not os.path.exists(data):
        if reads_as_hub_set(data):
            return data
        raise UsageError(f"there is no file {data}", "name your rows; luthier data check looks at them")
    return data if out is None or os.path.isabs(data) else os.path.relpath(data, out.parent)


def presets(as_json: Json = False) -> None:
    """List the bundled recipes."""
    from luthier.recipe.init import list_presets

    found = list_presets()
    if as_json:
        console.print_json([{"name": name, "about": about} for name, about in found.items()])
        return
    shown = console.table("", "preset", "what it is for")
    for name, about in found.items():
        shown.add_row(name, about)
    console.output.print(shown)
    console.say("start from one: luthier init --preset NAME --data rows.jsonl --out recipe.yaml")


def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure what this machine computes in a second; takes three.")
    ] = False,
    machines: Annotated[
        bool, typer.Option("--machines", help="List the machines that luthier plan --hardware knows.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what this machine has, which versions, what is missing, and the command that mends it."""
    from luthier.cli import doctor as shown

    shown.run(machines=machines, calibrate=calibrate, as_json=as_json)


def plan(
    recipe: RecipeFile,
    hardware: Annotated[
        str | None, typer.Option(metavar="NAME", help="Plan for this machine instead, e.g. t4, 4xa100-40g.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="PER_HOUR", min=0.0, help="What the machine costs an hour.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of the usable memory, what stays free; 0.08 if left out.")
    ] = None,
    why: Annotated[
        bool, typer.Option("--why", "-v", help="Every reason in full, its source, what was rejected.")
    ] = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe will do on this machine or another, what it takes and why, before any weights are loaded."""
    from luthier.cli import planning

    planning.run(recipe, sets, hardware, price, margin, why, as_json)


def train(
    recipe: RecipeFile, out: Out = None, resume: Resume = False, sets: Sets = None, as_json: Json = False
) -> None:
    """Tune an adapter as the recipe says."""
    from luthier.cli import show, stages
    from luthier.cli.resuming import goes_on
    from luthier.cli.working import working

    asked, directory = _asked(recipe, out, sets)
    with working(directory.path, "luthier train", resumes=True):
        resume = goes_on(directory, asked, resume=resume)
        prepared = _prepared(asked, directory, resume)
        show.data(prepared)
        result, _ = stages.train(prepared, directory, resume=resume)
    if as_json:
        console.print_json(stages.train_document(result, directory))
    else:
        name = escape(str(directory.path))
        console.say(f"next: luthier eval {name}, or luthier chat {name}")


def run(recipe: RecipeFile, out: Out = None, resume: Resume = False, sets: Sets = None, as_json: Json = False) -> None:
    """Do all of it: plan, data, train, evaluate, merge, export."""
    from luthier.cli import show, stages
    from luthier.cli.resuming import goes_on
    from luthier.cli.working import working

    asked, directory = _asked(recipe, out, sets)
    with working(directory.path, "luthier run", resumes=True):
        resume = goes_on(directory, asked, resume=resume)
        document = stages.run_all(_prepared(asked, directory, resume), directory, resume=resume)
    if as_json:
        console.print_json(document)
    else:
        show.ending(directory, document)


def evaluate(run: RunFolder, as_json: Json = False) -> None:
    """Hold base against tuned on rows that were not trained on."""
    from luthier.cli import preparing, show, stages
    from luthier.cli.pins import pins_of
    from luthier.cli.working import stage, working

    directory, recipe = stages.reopen(run)
    with working(directory.path, "luthier eval", resumes=False):
        with stage("the data was read"):
            prepared = preparing.prepare(recipe, pins=pins_of(directory, resume=False), folder=directory.path)
        document = stages.evaluate(prepared, directory)
    if as_json:
        console.print_json(document)
    else:
        show.evaluation(document)


def verify(
    run: RunFolder,
    steps: Annotated[
        int, typer.Option("--steps", min=0, max=1000, help="Take this many steps again; 0: look at the files only.")
    ] = 3,
    as_json: Json = False,
) -> None:
    """Hold a run's files against what was written, and steps taken again from a checkpoint against its log."""
    from luthier.cli import verifying

    verifying.run(run, steps, as_json)


def merge(
    run: RunFolder,
    onto_quantised: Annotated[
        bool,
        typer.Option(
            "--onto-quantised",
            help="After QLoRA: merge into the 4-bit base's rounded weights, which the adapter was trained against.",
        ),
    ] = False,
    reversible: Annotated[
        bool, typer.Option("--reversible", help="Keep what --undo needs to give the base's bytes back.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Write the base back from the merged model, byte for byte.")] = (
        False
    ),
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Merge the adapter into the unquantised base, in 16-bit, as a folder that transformers loads; and verify it."""
    from luthier.cli import merging

    _exported(merging.run(run, onto_quantised, reversible, undo, verify), as_json)


def export(
    run: RunFolder,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="KIND", help="hf, gguf, ollama, mlx; ollama-adapter, mlx-adapter: without merging."
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="gguf (f16 if left out) and ollama (q8_0): f32, f16, bf16, q8_0, q5_0, q4_0, q6_k, q5_k_m or q4_k_m; "
            "mlx (16-bit): 8 or 4.",
        ),
    ] = None,
    split: Annotated[bool, typer.Option("--split", help="A gguf of more than 2 GB in parts of at most that.")] = False,
    install: Annotated[bool, typer.Option("--install", help="Have it in Ollama right away (ollama create).")] = False,
    verify: VerifyAgain = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="With --to hf: upload it to the hub, once it is verified.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="ollama.KEY=VALUE", help="What the Modelfile sets; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the tuned model for transformers, llama.cpp, Ollama or mlx-lm, and verify it in that program."""
    from luthier.cli import merging
    from luthier.cli.exporting import Wanted

    if verify and (push or install or split or sets):
        raise UsageError("--verify writes nothing anew, so it goes with --to alone", "an export verifies by itself")
    if to is None or verify:
        found = merging.verify_again(run, to, quantize, asked=bool(verify))
        if as_json:
            console.print_json(found)
        return
    wanted = Wanted(to, quantize, split, install)
    _exported(merging.export_one(run, wanted, sets or (), verify=verify is None, push_to=push), as_json)


def generate(
    run: Tuned,
    prompt: Annotated[
        list[str],
        typer.Option("--prompt", "-p", help="What to ask; - reads it from standard input. Repeatable: all at once."),
    ],
    system: System = None,
    base: BaseOnly = False,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    min_p: MinP = 0.0,
    stop: Stops = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", min=0, max=20, help="With --json: each token's logprob and this many alternatives."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt as it comes, or several at once."""
    from luthier.cli import talk
    from luthier.generate.sampling import SamplingSpec

    spec = SamplingSpec(temperature, top_p, top_k, repetition_penalty, seed, min_p)
    limits = talk.Limits(spec, max_tokens, tuple(stop or ()), logprobs)
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs has no place in plain text", "add --json")
    asked = talk.read_prompts(prompt)
    talk.answer_once(talk.open_target(run, base_only=base), asked, system, limits, as_json)


def chat(
    run: Tuned,
    system: System = None,
    base: BaseOnly = False,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    max_tokens: MaxTokens = 512,
    seed: Seed = 0,
    min_p: MinP = 0.0,
    stop: Stops = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned model side by side, each turn.")] = False,
) -> None:
    """Talk with the tuned model. /help lists what else it does, Ctrl-C stops an answer."""
    from luthier.cli import chat as conversation
    from luthier.cli import talk
    from luthier.generate.sampling import SamplingSpec

    spec = SamplingSpec(temperature, top_p, top_k, repetition_penalty, seed, min_p)
    limits = talk.Limits(spec, max_tokens, tuple(stop or ()))
    if base and compare:
        raise UsageError("--base and --compare do not go together", "--compare shows the base's answers too")
    voice = talk.open_target(run, base_only=base, adapted=compare)
    conversation.converse(voice, system, limits, compare=compare)
