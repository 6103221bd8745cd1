"""Every setting of a recipe, once: its type, unit, bounds, default and help.

First stage of the house: recipe -> plan -> data -> train -> ... Everything said about a setting elsewhere (the comments
of `luthier init`, error messages, the reference in docs/) is generated from these definitions.

`auto` means that the plan decides, and says why. A setting that nothing carries out yet is not here, so a recipe that
asks for it is refused rather than accepted and ignored. How settings bear on each other stands in rules.py.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from luthier.recipe.times import DURATION

__all__ = [
    "BUNDLED_DATA",
    "BUNDLED_MODEL",
    "KNOWN_TASKS",
    "NAMED_TEMPLATES",
    "AdapterRecipe",
    "Auto",
    "DataSource",
    "EvaluateRecipe",
    "FormatName",
    "OllamaRecipe",
    "Projection",
    "Recipe",
    "SplitRecipe",
    "TrainRecipe",
]

BUNDLED_MODEL = "sprig"
BUNDLED_DATA = ("pirate", "tales")
NAMED_TEMPLATES = ("model", "alpaca", "llama3", "chatml", "mistral", "human-assistant")
"""The names of data's template table that a recipe may say; a test there holds the two equal."""
KNOWN_TASKS = ("pirate", "exact")
"""The names of evaluate's task table; a test there holds the two equal."""

Auto: TypeAlias = Literal["auto"]
# Strict: YAML has types of its own, so `"60"` (a text) and `true` are not numbers, and 1.5 is not a whole number.
Whole: TypeAlias = Annotated[int, Strict()]
Number: TypeAlias = Annotated[float, Strict()]
Text: TypeAlias = Annotated[str, Strict(), Field(min_length=1)]

SKIP = r"^skip [1-9][0-9]{0,5}$"
"""How many steps may be left out."""

Projection: TypeAlias = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FormatName: TypeAlias = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "title-content", "text"
]


class _Section(BaseModel):
    """Frozen, and closed: a key that is not defined is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class DataSource(_Section):
    """Rows from one place: a file, a folder, a data set of the Hugging Face hub, or a bundled set."""

    path: Text = Field(
        description="A file (JSONL, JSON, CSV, TSV, Parquet, text; also .gz, .zst) or a folder of such, beside this "
        "recipe or with its full path; a data set on the hub (owner/name, or hf://owner/name); pirate and tales name "
        "the bundled sets (a file of that name: ./pirate)."
    )
    format: FormatName = Field("auto", description="The layout of its rows; auto: recognised by their keys.")
    fields: dict[Text, Text] = Field(
        default_factory=dict,
        description="Where your rows name their keys otherwise: the format's name, then yours, as in {question: ask}.",
    )
    split: Literal["all", "train", "eval", "test"] = Field(
        "all", description="What these rows are for; all: cut by the fractions under `split`."
    )
    weight: Number = Field(
        1.0,
        gt=0,
        le=1000,
        description="How often each row is seen in an epoch; 0.5: every second epoch, 2: twice.",
    )
    subset: Text | None = Field(None, description="Of a data set on the hub: which of its configurations.")
    hub_split: Text = Field("train", description="Of a data set on the hub: which of its splits is read.")
    stream: Annotated[bool, Strict()] = Field(
        False, description="Of a data set on the hub: read it as it comes, without keeping a copy of its files."
    )


class AdapterRecipe(_Section):
    """The low-rank adapter that is trained (Hu et al. 2021): W + scale * B A, with W frozen."""

    kind: Literal["lora"] = Field("lora", description="The kind of adapter.")
    rank: Annotated[Whole, Field(ge=1)] | Auto = Field(
        "auto", description="Inner size of A and B: more rank, more that can be learned, more memory."
    )
    alpha: Annotated[Number, Field(gt=0)] | Auto = Field("auto", description="Strength of the adapter, see `scale`.")
    dropout: Number = Field(0.0, ge=0, lt=1, description="Share of the adapter's input that is dropped while training.")
    targets: Literal["all-linear", "attention"] | Annotated[tuple[Projection, ...], Field(min_length=1)] = Field(
        "all-linear", description="The projections that get an adapter: all seven, the four of attention, or a list."
    )
    scale: Literal["standard", "rslora"] = Field(
        "standard", description="standard: alpha / rank; rslora: alpha / sqrt(rank), for large ranks (2312.03732)."
    )


class TrainRecipe(_Section):
    """How it is trained."""

    epochs: Annotated[Number, Field(gt=0)] | Auto = Field(
        "auto", description="Passes over the training rows; may be fractions.", json_schema_extra={"unit": "epochs"}
    )
    steps: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="Optimizer steps, instead of epochs.", json_schema_extra={"unit": "steps"}
    )
    batch_size: Annotated[Whole, Field(ge=1)] | Auto = Field(
        "auto", description="Rows per optimizer step, whatever the micro-batch.", json_schema_extra={"unit": "rows"}
    )
    micro_batch: Annotated[Whole, Field(ge=1)] | Auto = Field(
        "auto",
        description="Rows computed at once: changes memory and speed, not the result. It must divide batch_size.",
        json_schema_extra={"unit": "rows"},
    )
    learning_rate: Annotated[Number, Field(gt=0, le=1)] | Auto = Field("auto", description="The highest learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warm-up: to zero, or not at all."
    )
    warmup_steps: Annotated[Whole, Field(ge=0)] | Auto = Field(
        "auto", description="Steps over which the learning rate rises from zero.", json_schema_extra={"unit": "steps"}
    )
    optimizer: Literal["auto", "adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(
        "auto", description="AdamW; 8-bit: its state in a quarter of the memory; paged: in CPU memory at need."
    )
    weight_decay: Number = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay, on the adapter.")
    clip: Number = Field(1.0, ge=0, description="The largest norm of the gradient, longer ones are scaled; 0: off.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="The number format of weights and activations; the adapter itself is always kept in fp32."
    )
    checkpointing: Annotated[bool, Strict()] | Annotated[Whole, Field(ge=0)] | Auto = Field(
        "auto",
        description="Compute activations a second time instead of keeping them: less memory, slower. true: of all "
        "layers; a number: of so many, from the first on.",
    )
    attention: Literal["auto", "flash", "efficient", "math"] = Field(
        "auto",
        description="The kernel of torch's attention: flash and efficient never hold the scores of all pairs of tokens "
        "at once; math does, and runs everywhere.",
    )
    max_length: Annotated[Whole, Field(ge=8)] | Auto = Field(
        "auto",
        description="Longest row, and with packing the length of a pack; see `long_rows` for what is longer.",
        json_schema_extra={"unit": "tokens"},
    )
    packing: Annotated[bool, Strict()] | Auto = Field(
        "auto",
        description="Fill packs of max_length tokens with whole rows, each seen alone; batch_size then counts these.",
    )
    longest_first: Annotated[bool, Strict()] = Field(
        False, description="Take the batches with most tokens first, so that a run that does not fit stops at once."
    )
    eval_every: Annotated[Whole, Field(ge=0)] | Auto = Field(
        "auto",
        description="Between measurements of the held-out loss; 0: none while training.",
        json_schema_extra={"unit": "steps"},
    )
    save_every: Annotated[Whole, Field(ge=1)] | Auto = Field(
        "auto",
        description="Between checkpoints; `keep` says how many stay.",
        json_schema_extra={"unit": "steps"},
    )
    keep: Whole = Field(
        3, ge=1, le=1000, description="How many of the newest checkpoints are kept; the best is kept besides."
    )
    max_time: Annotated[Number, Field(gt=0)] | Annotated[Text, Field(pattern=DURATION)] | None = Field(
        None,
        description="A sitting ends before it has lasted this long, with a checkpoint saved and exit code 75: for "
        "queues that end a job by the clock. A number is seconds.",
        json_schema_extra={"expects": "a number of seconds above 0, or a time such as 90m, 2h30m, 1d12h, or null"},
    )
    stop_file: Text | None = Field(
        None,
        description="As soon as a file of this name appears, the run stops as it does at Ctrl-C: for notices that a "
        "machine is about to be taken away. A relative path is taken from the folder that the command is run in.",
    )
    on_nonfinite: Literal["stop"] | Annotated[Text, Field(pattern=SKIP)] = Field(
        "stop",
        description="A loss or gradient that is not finite: stop before anything is updated, or skip up to N such "
        "steps in the whole run (nothing is updated; the step counts).",
        json_schema_extra={"expects": "stop, or skip and a number from 1, such as skip 3"},
    )


class SplitRecipe(_Section):
    """The fractions by which rows are cut into what is trained on and what is held out; they sum to 1."""

    train: Number = Field(0.9, gt=0, le=1, description="Trained on.")
    eval: Number = Field(0.1, ge=0, lt=1, description="Held out: its loss is measured while training and after.")
    test: Number = Field(0.0, ge=0, lt=1, description="Held out and used once, at the end.")
    near_duplicates: Literal["together", "anywhere"] = Field(
        "together",
        description="Rows that nearly say the same: kept on one side, or cut as if they had nothing in common.",
    )


class EvaluateRecipe(_Section):
    """What is measured after training, on the base and on the tuned model. Held-out loss and perplexity always are."""

    tasks: tuple[Text, ...] = Field((), description=f"Scores beyond the loss; known: {', '.join(KNOWN_TASKS)}.")
    max_new_tokens: Whole = Field(
        128, ge=1, description="An answer that has not ended by then is cut.", json_schema_extra={"unit": "tokens"}
    )
    samples: Whole = Field(
        10, ge=0, description="Held-out rows that both models answer, side by side.", json_schema_extra={"unit": "rows"}
    )
    limit: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="At most this many held-out rows are scored; null: all.", json_schema_extra={"unit": "rows"}
    )


class OllamaRecipe(_Section):
    """What the Modelfile sets for Ollama; the defaults are those of `luthier chat`."""

    system: Annotated[str, Strict()] = Field("", description="The system message of every conversation; empty: none.")
    temperature: Number = Field(0.7, ge=0, le=5, description="0: always the likeliest token.")
    top_p: Number = Field(0.9, gt=0, le=1, description="Draw from the likeliest tokens of this total.")
    top_k: Whole = Field(0, ge=0, description="Draw from this many likeliest tokens; 0: from all.")
    min_p: Number = Field(0.0, ge=0, le=1, description="Leave out tokens below this share of the likeliest one's.")
    repeat_penalty: Number = Field(1.0, gt=0, le=10, description="Above 1: tokens seen already count less.")
    context: Annotated[Whole, Field(ge=8)] | Auto = Field(
        "auto",
        description="Longest conversation; auto: the model's, 8192 at most.",
        json_schema_extra={"unit": "tokens"},
    )


def as_sources(value: object) -> object:
    """`data: rows.jsonl` and `data: [a.jsonl, b.jsonl]` are short for `data: [{path: ...}]`."""
    listed = [value] if isinstance(value, (str, dict)) else value
    if not isinstance(listed, list):
        return listed
    return [{"path": item} if isinstance(item, str) else item for item in listed]


class Recipe(_Section):
    """Everything a user asks for."""

    model: Text = Field(
        description="The base model: a hub id such as meta-llama/Llama-3.1-8B, a folder, or sprig (bundled)."
    )
    data: Annotated[tuple[DataSource, ...], Field(min_length=1), BeforeValidator(as_sources)] = Field(
        description="The rows to learn from: a file, a folder, a data set on the hub, pirate or tales (bundled), or a "
        "list of these or of {path, format, fields, split, weight}.",
        json_schema_extra={"expects": "a file, or a list of files or mappings with `path`"},
    )
    template: Text = Field(
        "model",
        description="How a row becomes text. model: the model's own chat template; alpaca, llama3, chatml, mistral, "
        "human-assistant: those layouts; or a text of your own that names the row's keys in braces, the answer last, "
        'such as "Q: {question}\\nA: {answer}".',
    )
    train_on: Literal["completions", "last", "all"] = Field(
        "completions", description="What is learned: every answer, the last answer of a row, or all of its text."
    )
    prompt_loss_weight: Number = Field(
        0.0, ge=0, le=1, description="How much a token that is not part of an answer counts in the loss (2405.14394)."
    )
    long_rows: Literal["truncate", "error", "drop", "split"] = Field(
        "truncate",
        description="Rows longer than max_length: cut at the end, refused, left out, or cut into several. All counted.",
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="A row that cannot be used: stop and list all of them, or leave them out (rejected.jsonl)."
    )
    split_by: Text | None = Field(
        None, description="A key of your rows: rows with the same value of it stay on one side of the split."
    )
    adapter: AdapterRecipe = Field(default_factory=AdapterRecipe, description="What is trained.")
    quantize: Literal["auto", "none", "nf4", "fp8"] = Field(
        "auto",
        description="The frozen base while training. nf4: in 4 bits (QLoRA), to fit where 16-bit does not. fp8: its "
        "weights and products in 8 bits, on NVIDIA cards from Ada and Hopper on; auto never chooses it.",
    )
    train: TrainRecipe = Field(default_factory=TrainRecipe, description="How it is trained.")
    split: SplitRecipe = Field(default_factory=SplitRecipe, description="What is held out.")
    seed: Whole = Field(0, ge=0, lt=2**32, description="Same seed, same run.")
    hardware: Text = Field(
        "this",
        description="The machine to plan for: this one, or one of the catalogue, such as t4 or 4xa100-40g. Training is "
        "always for this one.",
    )
    evaluate: EvaluateRecipe = Field(default_factory=EvaluateRecipe, description="What is measured afterwards.")
    export: tuple[Literal["hf", "gguf", "ollama", "mlx"], ...] = Field(
        ("hf", "gguf"),
        description="What `luthier run` writes: hf (transformers, vLLM), gguf (llama.cpp), ollama (and its Modelfile), "
        "mlx (mlx-lm).",
    )
    ollama: OllamaRecipe = Field(default_factory=OllamaRecipe, description="How Ollama asks, see `export`.")
