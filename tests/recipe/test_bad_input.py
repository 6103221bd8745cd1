"""Each mistake in a recipe gives its own message, with its place and what to try; all mistakes come at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.errors import Problem, RecipeError, UsageError
from luthier.recipe.init import load_preset
from luthier.recipe.load import load_recipe, recipe_from_mapping

Refused = Callable[..., tuple[Problem, ...]]
BASE = "model: sprig\ndata: pirate\n"


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Write a recipe, load it, give the problems."""

    def load(text: str, *overrides: str) -> tuple[Problem, ...]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        assert caught.value.exit_code == 2
        for problem in caught.value.problems:
            assert problem.line is None or problem.where == str(path)
        return caught.value.problems

    return load


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(BASE)
    with pytest.raises(RecipeError, match=r"recpe\.yaml: there is no such recipe file \(did you mean recipe\.yaml\?\)"):
        load_recipe(tmp_path / "recpe.yaml")
    with pytest.raises(RecipeError, match=r"there is no such recipe file .*luthier init"):
        load_recipe(tmp_path / "nowhere" / "recipe.yaml")


def test_folder_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(RecipeError, match=r"not a text in UTF-8 \(byte 7\)"):
        load_recipe(tmp_path / "b.yaml")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null"])
def test_empty(refused: Refused, text: str) -> None:
    (problem,) = refused(text)
    assert problem.reason == "the recipe is empty"
    assert "luthier init" in (problem.remedy or "")


@pytest.mark.parametrize(
    ("text", "what"), [("- a\n- b", "a list"), ("rows.jsonl", "the text 'rows.jsonl'"), ("5", "the number 5")]
)
def test_not_a_mapping(refused: Refused, text: str, what: str) -> None:
    (problem,) = refused(text)
    assert problem.line == 1
    assert problem.reason.endswith(f"this is {what}")


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (BASE + "train:\n\tsteps: 3", 4, "a tab in the indentation"),
        (BASE + "template: Q: {q}", 3, "not valid YAML"),
        (BASE + "adapter: {rank: 3", 3, "not valid YAML"),
        (BASE + 'template: "abc', 3, "not valid YAML"),
        (BASE + "seed: 1\nseed: 2", 4, "`seed` is given twice, first in line 3"),
        (BASE + "train:\n  steps: 1\n  clip: 2\n  steps: 2", 6, "`train.steps` is given twice, first in line 4"),
        (BASE + "seed: &a 1\ntrain: {steps: *a}", 3, "the anchor `&a`"),
        ("a: &a [x]\nb: *a", 2, "the alias `*a`"),
        (BASE + "seed: !!python/object/apply:os.getcwd []", 3, "the tag"),
        (BASE + "---\nseed: 1", 3, "a second document"),
        (BASE + "export: [[[[[[[[[[[[[[1]]]]]]]]]]]]]]", 3, "nested deeper"),
        (BASE + "? [a, b]\n: 1", 3, "a key must be a plain name"),
        (BASE + "template: a\x07b", 3, "the character"),
    ],
)
def test_yaml_mistakes_have_their_line(refused: Refused, text: str, line: int, reason: str) -> None:
    problems = refused(text)
    assert any(problem.line == line and problem.reason.startswith(reason) for problem in problems), problems


def test_alias_bomb_and_large_file_are_refused_at_once(refused: Refused) -> None:
    bomb = 'a: &a ["x", "x"]\n' + "".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *a]\n" for i in range(40))
    assert all("alias" in problem.reason or "anchor" in problem.reason for problem in refused(bomb))
    (problem,) = refused("# " + "x" * 300_000)
    assert "too much for a recipe" in problem.reason


@pytest.mark.parametrize(
    ("line", "reason", "remedy"),
    [
        ("seed: true", "`seed` must be a whole number from 0 and below 4294967296; it is the truth value true", None),
        ('seed: "3"', "`seed` must be a whole number from 0 and below 4294967296; it is the text '3'", None),
        ("quantize: nf5", "`quantize` must be auto, none, nf4 or fp8; it is the text 'nf5'", "did you mean `nf4`?"),
        ("quantize: null", "`quantize` must be auto, none, nf4 or fp8; it is empty (null)", None),
        ("train: 3", "`train` must be a mapping; it is the number 3", None),
        ("train: {steps: 1.5}", "`train.steps` must be a whole number from 1 or null; it is the number 1.5", None),
        (
            "train: {learning_rate: .inf}",
            "`train.learning_rate` must be a number above 0 up to 1 or auto; it is the number inf",
            None,
        ),
        (
            "train: {precision: bf61}",
            "`train.precision` must be auto, bf16, fp16 or fp32; it is the text 'bf61'",
            "did you mean `bf16`?",
        ),
        (
            "train: {eval_every: -1}",
            "`train.eval_every` must be a whole number from 0 or auto; it is the number -1",
            None,
        ),
        ("adapter: {targets: []}", "`adapter.targets` must be", None),
        (
            "adapter: {dropout: 1.0}",
            "`adapter.dropout` must be a number from 0 and below 1; it is the number 1.0",
            None,
        ),
        ("export: ggguf", "`export` must be a list of hf, gguf, ollama or mlx; it is the text 'ggguf'", None),
        ("hardware: 4", "`hardware` must be a text; it is the number 4", None),
        (
            "train: {checkpointing: some}",
            "`train.checkpointing` must be true, false, a whole number from 0 or auto; it is the text 'some'",
            None,
        ),
        ("train: {checkpointing: -1}", "`train.checkpointing` must be true, false, a whole number from 0 or", None),
        ("train: {checkpointing: 1.5}", "`train.checkpointing` must be true, false, a whole number from 0 or", None),
        (
            "train: {attention: flsh}",
            "`train.attention` must be auto, flash, efficient or math; it is the text 'flsh'",
            "did you mean `flash`?",
        ),
        ("gpu: t4", "unknown setting `gpu`", "did you mean `hardware`?"),
        ("train: {compile: true}", "unknown setting `train.compile`", None),
        (
            "train: {max_time: 2.5 hours}",
            "`train.max_time` must be a number of seconds above 0, or a time such as 90m, 2h30m, 1d12h, or null; it is",
            None,
        ),
        ("train: {max_time: 0}", "`train.max_time` must be a number of seconds above 0", None),
        (
            "train: {max_time: 0h0m}",
            "`train.max_time` is 0h0m, which leaves no time at all",
            "such as 2h30m; left out: no limit",
        ),
        ("train: {on_nonfinite: skip}", "`train.on_nonfinite` must be stop, or skip and a number from 1", None),
        ("train: {on_nonfinite: skip 0}", "`train.on_nonfinite` must be stop, or skip and a number from 1", None),
        ("train: {keep: 0}", "`train.keep` must be a whole number from 1 to 1000; it is the number 0", None),
        ("train: {save_total_limit: 2}", "unknown setting `train.save_total_limit`", "did you mean `train.keep`?"),
        ("track: [wandb]", "unknown setting `track`", None),
        ("adapter: {lora_alpha: 3}", "unknown setting `adapter.lora_alpha`", "did you mean `adapter.alpha`?"),
        ("lr: 3", "unknown setting `lr`", "did you mean `train.learning_rate`?"),
        ("rank: 3", "unknown setting `rank`", "did you mean `adapter.rank`?"),
    ],
)
def test_settings_say_what_they_expect_and_got(refused: Refused, line: str, reason: str, remedy: str | None) -> None:
    (problem,) = refused(BASE + line)
    assert problem.line == 3
    assert problem.reason.startswith(reason)
    assert remedy is None or problem.remedy == remedy


@pytest.mark.parametrize(
    ("lines", "line", "reason"),
    [
        ("train:\n  epochs: 2\n  steps: 60", 5, "`train.steps` is 60 and `train.epochs` is 2"),
        ("train:\n  steps: 60\n  warmup_steps: 60", 5, "`train.warmup_steps` is 60, but the run has only 60"),
        (
            "train:\n  batch_size: 12\n  micro_batch: 5",
            5,
            "`train.micro_batch` 5 does not divide `train.batch_size` 12",
        ),
        ("train: {batch_size: 4, micro_batch: 8}", 3, "`train.micro_batch` 8 does not divide"),
        ("split: {train: 0.8}", 3, "the fractions under `split` sum to 0.9, not to 1"),
        ("export: [hf, gguf, hf]", 3, "`hf` stands twice in `export`"),
        ("export: [hf, hf, hf]", 3, "`hf` stands twice in `export`"),
        ("adapter: {targets: [q_proj, q_proj]}", 3, "`q_proj` stands twice"),
        ("evaluate: {tasks: [pirat]}", 3, "there is no task `pirat`"),
        ("train_on: all\nprompt_loss_weight: 0.1", 4, "with `train_on: all` every token counts in full"),
        ("template: modle", 3, "`template` is 'modle', which names no key"),
        ('template: "{a} {"', 3, "`template`: "),
        ('template: "{a!r} {b}"', 3, "`template`: braces must hold"),
        ('template: "{a} {a}"', 3, "`template` names {a} more than once"),
        ('template: "{a} {b} end"', 3, "`template` goes on after its last key: 'end'"),
    ],
)
def test_rules_between_settings(refused: Refused, lines: str, line: int, reason: str) -> None:
    (problem,) = refused(BASE + lines)
    assert problem.line == line
    assert problem.reason.startswith(reason)


VAST = {
    "a batch of a hundred billion": (
        "train: {batch_size: 100000000007, micro_batch: 99999999977}", "`train.micro_batch` 99999999977 does not"),
    "a batch that only odd rows divide": (
        "train: {batch_size: 1000000000000000003, micro_batch: 1000000000000000000}", "`train.micro_batch` 1"),
    "unknown settings": ("\n".join(f"setting_{n}: 1" for n in range(11_000)), "more than 5,000 values and names"),
    "unknown settings, as many as may be": (
        "\n".join(f"setting_{n}: 1" for n in range(2_490)), "unknown setting `setting_0`"),
    "long unknown settings": ("\n".join(f"{'x' * 70}{n}: 1" for n in range(2_490)), "unknown setting `xxx"),
    "exports": (f"export: [{'hf,' * 60_000} hf]", "more than 5,000 values and names"),
    "exports, as many as may be": (f"export: [{'hf,' * 4_980} hf]", "`hf` stands twice in `export`"),
    "tasks": (f"evaluate: {{tasks: [{','.join(f't{n}' for n in range(4_980))}]}}", "there is no task `t0`"),
    "tasks of another kind": (f"split: {{}}\nevaluate: {{tasks: [{'5, ' * 4_970} 5]}}", "`evaluate.tasks.0` must be"),
    "empty lists": (f"export: [{'[],' * 4_980} []]", "`export.0` must be hf, gguf, ollama or mlx"),
    "a list in block style": ("export:\n" + "- hf\n" * 35_000, "more than 5,000 values and names"),
    "keys of a template": (f'template: "{"{a}" * 60_000}"', "`template` names {a} more than once"),
    "braces of a template": (f'template: "{"{}" * 90_000}"', "`template`: braces must hold a key's name"),
    "keys with formats": (
        'template: "' + "".join(f"{{k{n}:>3}}" for n in range(18_000)) + '"', "`template`: braces must hold a key's"),
}  # fmt: skip


@pytest.mark.parametrize("kind", VAST)
def test_what_is_vast_takes_no_time(refused: Refused, kind: str) -> None:
    lines, reason = VAST[kind]
    began = time.process_time()
    problems = refused(BASE + lines)
    took = time.process_time() - began
    assert any(problem.reason.startswith(reason) for problem in problems), problems[:3]
    assert len(problems) <= 201
    assert took < 1.6, f"{took:.2f} s"


def test_as_many_files_as_may_be(tmp_path: Path) -> None:
    """A thousand with a weight each, which is many."""
    path = tmp_path / "r.yaml"
    files = "".join(f"  - {{path: part-{n}.jsonl, weight: 2}}\n" for n in range(990))
    path.write_text("model: sprig\ndata:\n" + files, encoding="utf-8")
    began = time.process_time()
    assert len(load_recipe(path).data) == 990
    assert time.process_time() - began < 1.6
    path.write_text("model: sprig\ndata:\n" + files * 2, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems[0].remedy == "name a folder under `data` instead of its files"


def test_of_very_many_problems_the_first_are_shown(refused: Refused) -> None:
    problems = refused(BASE + "seed: x\n" + "\n".join(f"gp{n}: 1" for n in range(300)))
    assert [problem.line for problem in problems] == [*range(3, 203), None]
    assert problems[0].reason.startswith("`seed` must be")
    assert problems[199].remedy is not None
    assert problems[200].reason == "and 101 problems more"


def test_no_rows_to_train_on(refused: Refused) -> None:
    (problem,) = refused("model: sprig\ndata: [{path: a.jsonl, split: eval}]")
    assert "none is trained on" in problem.reason


def test_all_problems_at_once_in_order(refused: Refused) -> None:
    text = "modle: sprig\ndata: [{path: 5}]\nseed: x\ntrain:\n  batch_size: 12\n  micro_batch: 5\n  stesp: 1\n"
    problems = refused(text, "train.stpes=3", "evaluate.limit=0", "nonsense")
    assert [problem.line for problem in problems] == [1, 2, 3, 6, 7, None, None, None, None]
    assert {problem.where for problem in problems if problem.line is None and "--set" in problem.where} == {
        "--set train.stpes=3",
        "--set evaluate.limit=0",
        "--set nonsense",
    }
    assert any(problem.reason == "`model` is missing" for problem in problems)


@pytest.mark.parametrize(
    ("override", "reason", "remedy"),
    [
        ("train.stesp=60", "unknown setting `train.stesp`", "did you mean `train.steps`?"),
        ("steps=60", "unknown setting `steps`", "did you mean `train.steps`?"),
        ("train.steps=sixty", "`train.steps` must be a whole number from 1 or null; it is the text 'sixty'", None),
        ("train.steps.x=1", "`train.steps` is the number 5, it has nothing in it", None),
        ("data.3.path=x", "`data` is a list of 1, so `3` is not in it", None),
        ("train.steps", "this is not KEY=VALUE", None),
        ("=3", "this is not KEY=VALUE", None),
        ("train.=3", "this is not KEY=VALUE", None),
        (".".join("a" * 40) + "=3", "this is not KEY=VALUE", None),
        ("seed=&a 3", "the anchor", None),
        ("seed=[", "not valid YAML", None),
        ("train.epochs=2", "`train.steps` is 5 and `train.epochs` is 2", None),
    ],
)
def test_override_mistakes_name_the_override(refused: Refused, override: str, reason: str, remedy: str | None) -> None:
    (problem,) = refused(BASE + "train: {steps: 5}", override)
    assert problem.reason.startswith(reason)
    assert remedy is None or problem.remedy == remedy
    if "epochs" not in override:  # there both are at fault: the file's line is as good a place
        assert (problem.where, problem.line) == (f"--set {override}", None)


def test_later_override_wins_and_yaml_types_hold(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: sprig\ndata: rows.jsonl\ntrain:\n", encoding="utf-8")
    overrides = ["train.steps=1", "train.steps=60", "train.learning_rate=1e-4", "data.0.split=train"]
    recipe = load_recipe(path, overrides)
    assert recipe.train.steps == 60
    assert recipe.train.learning_rate == 1e-4
    assert recipe.data[0].split == "train"


def test_paths_resolve_against_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "in" / "base").mkdir(parents=True)
    path = tmp_path / "in" / "r.yaml"
    path.write_text("model: base\ndata: [../rows.jsonl, pirate, /x/y.jsonl, ./tales]", encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.model == str(tmp_path / "in" / "base")
    found = [source.path for source in recipe.data]
    assert found == [str(tmp_path / "rows.jsonl"), "pirate", "/x/y.jsonl", str(tmp_path / "in" / "tales")]
    assert load_recipe(path, ["model=org/name"]).model == "org/name"
    assert load_recipe(path, ["model=./gone"]).model == str(tmp_path / "in" / "gone")


def test_from_a_mapping(tmp_path: Path) -> None:
    given: dict[str, object] = {"model": "sprig", "data": ["a.jsonl"], "train": {"steps": 3}}
    recipe = recipe_from_mapping(given, folder=tmp_path)
    assert recipe.data[0].path == str(tmp_path / "a.jsonl")
    assert given == {"model": "sprig", "data": ["a.jsonl"], "train": {"steps": 3}}
    with pytest.raises(RecipeError, match="recipe: unknown setting `modell`"):
        recipe_from_mapping({**given, "modell": 1})


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="no preset 'pirat'") as caught:
        load_preset("pirat")
    assert caught.value.remedy == "did you mean pirate?"
