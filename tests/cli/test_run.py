"""The whole way on sprig in a few steps: every command, every file, and `--json` that is JSON and nothing else."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from luthier.model.locate import locate_model
from tests.cli.command import Command, Ended

RECIPE = """\
model: sprig
data: pirate
adapter: {rank: 4, alpha: 8}
train: {steps: 12, batch_size: 8, learning_rate: 2.0e-3, eval_every: 6, save_every: 4}
evaluate: {tasks: [pirate, exact], limit: 6, samples: 2, max_new_tokens: 16}
export: [hf, gguf, ollama]
"""
FILES = (
    *("recipe.yaml", "plan.json", "data/data.json", "events.jsonl", "adapter/adapter_model.safetensors", "eval.json"),
    *(
        "adapter/adapter_config.json",
        "adapter/tokenizer.json",
        "checkpoints/LATEST",
        "checkpoints/BEST",
        "checkpoints/step-000012/state.json",
        "checkpoints/step-000012/manifest.json",
        "adapter/manifest.json",
    ),
    *(
        "exports/hf/model.safetensors",
        "exports/hf/README.md",
        "exports/gguf/model-f16.gguf",
        "exports/ollama/Modelfile",
    ),
)


def document(ended: Ended) -> dict[str, object]:
    """The one JSON document on stdout."""
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by the command in a process of its own, as users start it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "luthier", "run", "recipe.yaml", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "runs/recipe"
    return folder / "runs" / "recipe"


def moved(run: Path, to: Path, data: str) -> None:
    """A copy of the run whose recipe names other rows."""
    shutil.copytree(run, to)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {"data": data, "evaluate": {"samples": 1}}
    (to / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_there(run: Path, name: str) -> None:
    assert (run / name).stat().st_size > 0


def test_the_loss_fell_and_is_the_one_reported(run: Path) -> None:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    evals = [event["loss"] for event in events if event["event"] == "eval"]
    found = json.loads((run / "eval.json").read_text())
    assert len([event for event in events if event["event"] == "step"]) == 12
    assert len(evals) == 3
    assert evals[-1] < evals[0]
    assert found["tuned"]["loss"] < found["base"]["loss"]
    assert [task["name"] for task in found["tasks"]] == ["pirate", "exact"]


def test_eval_says_the_same_again(run: Path, luthier: Command) -> None:
    before = json.loads((run / "eval.json").read_text())
    assert document(luthier("eval", run, "--json")) == before


def test_eval_refuses_rows_that_are_not_the_runs(run: Path, luthier: Command, tmp_path: Path) -> None:
    """Other rows under the same name: what is held out now may have been trained on."""
    moved(run, tmp_path / "run", "tales")
    ended = luthier("eval", tmp_path / "run", "--json")
    assert ended.code == 3, ended.err
    assert "not what" in ended.message
    assert "not what" in json.loads(ended.out)["error"]["message"]


def test_an_export_needs_no_rows(run: Path, luthier: Command, tmp_path: Path) -> None:
    """The rows may be gone by then; the card still says how many were trained on."""
    moved(run, tmp_path / "run", "gone.jsonl")
    assert luthier("export", tmp_path / "run", "--to", "hf").code == 0
    assert "800 rows of" in (tmp_path / "run" / "exports/hf/README.md").read_text()


def test_plan_in_json_names_every_decision(run: Path, luthier: Command) -> None:
    found = document(luthier("plan", run / "recipe.yaml", "--json"))
    decisions = found["decisions"]
    assert isinstance(decisions, list)
    assert {"setting", "value", "reason", "source", "rejected"} <= set(decisions[0])
    rank = next(one for one in decisions if one["setting"] == "adapter.rank")
    assert rank["value"] == 4


def test_merge_and_export_again(run: Path, luthier: Command) -> None:
    weights = (run / "exports/hf/model.safetensors").read_bytes()
    assert document(luthier("merge", run, "--json"))["merged"] == 5 * 7
    assert (run / "exports/hf/model.safetensors").read_bytes() == weights
    made = document(luthier("export", run, "--to", "gguf", "--quantize", "Q8_0", "--split", "--json"))
    assert (made["quantize"], made["parts"]) == ("q8_0", [])
    assert any("was not split" in str(note) for note in made["notes"])
    assert Path(str(made["path"])).stat().st_size == made["bytes"]
    for words, code, said in (
        (("gguf", "--quantize", "q4_k"), 2, "did you mean q4_k_m?"),
        (("hf", "--quantize", "q8_0"), 2, "--quantize is not for hf"),
        (("ollama", "--split"), 2, "Ollama reads one file"),
        (("hf", "--split"), 2, "--split is for gguf"),
    ):
        ended = luthier("export", run, "--to", *words)
        assert (ended.code, said in ended.message) == (code, True), ended.message
    ended = luthier("export", run, "--to", "onnx")
    assert (ended.code, "hf, gguf, ollama" in ended.message) == (2, True)


@pytest.mark.parametrize("target", ["", "adapter", "exports/hf"])
def test_run_adapter_and_merged_model_say_the_same(run: Path, luthier: Command, target: str) -> None:
    words = ("-p", "What colour is the sky?", "--temperature", 0, "--max-tokens", 24, "--json")
    whole = document(luthier("generate", run, *words))
    assert document(luthier("generate", run / target, *words))["text"] == whole["text"]


def test_the_base_speaks_without_the_adapter(run: Path, luthier: Command) -> None:
    words = ("-p", "What colour is the sky?", "--temperature", 0)
    ended = luthier("generate", run, "--base", *words)
    assert (ended.code, ended.out) == (0, "The sky is blue.\n")
    assert luthier("generate", run / "exports/hf", "--base", *words).code == 2


def test_one_seed_one_answer(run: Path, luthier: Command) -> None:
    words = ("generate", run, "-p", "Tell me a story.", "--temperature", 1.5, "--max-tokens", 24)
    answers = [luthier(*words, "--seed", seed).out for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_chat_remembers_resets_and_quits(run: Path) -> None:
    said = "My name is Anna.\n/reset\n/rest\nWhat colour is the sky?\n/quit\nnever read\n"
    command = [sys.executable, "-m", "luthier", "chat", str(run), "--base", "--temperature", "0"]
    done = subprocess.run(command, input=said, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The sky is blue." in done.stdout
    assert "forgotten" in done.stderr
    assert "there is no /rest" in done.stderr


def test_interrupted_and_resumed_is_the_same_run(run: Path, luthier: Command, tmp_path: Path) -> None:
    """SIGINT as Ctrl-C sends it, to the command itself: exit 75, then `--resume` gives the uninterrupted adapter."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "luthier", "train", "recipe.yaml", "--out", "again"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 75, rest
    assert "--resume" in rest
    assert "error" not in rest
    words = ["train", "again/recipe.yaml", "--resume", "--out", "again"]  # as `eval` tells people to go on
    assert f"luthier {' '.join(words)}" in luthier("eval", "again").message
    assert not (tmp_path / "again" / "adapter").exists()
    done = subprocess.run(
        [sys.executable, "-m", "luthier", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (tmp_path / "again", run))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


def test_init_writes_a_recipe_that_plans(luthier: Command) -> None:
    ended = luthier("init", "--preset", "pirate", "--out", "mine.yaml")
    assert (ended.code, "luthier plan mine.yaml" in ended.message) == (0, True)
    assert document(luthier("plan", "mine.yaml", "--json"))["trainable_parameters"] == 389_120
    assert luthier("init", "--preset", "pirate").out == Path("mine.yaml").read_text()


def test_presets_are_listed(luthier: Command) -> None:
    ended = luthier("presets", "--json")
    assert ended.code == 0
    assert {"pirate", "tales", "chat", "instruct", "qa", "qlora-8b"} == {one["name"] for one in json.loads(ended.out)}


def test_qlora_trains_and_merges_into_the_unquantised_base(luthier: Command, tmp_path: Path) -> None:
    """4-bit weights while training; the merge takes the unquantised ones, and leaves the rest bit for bit alone."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("[hf, gguf, ollama]", "[hf]"))
    found = document(luthier("run", "recipe.yaml", "--set", "quantize=nf4", "--set", "evaluate.tasks=[]", "--json"))
    assert json.loads((tmp_path / "runs/recipe/plan.json").read_text())["settings"]["quantize"] == "nf4"
    evaluation = found["evaluation"]
    assert isinstance(evaluation, dict)
    assert evaluation["tuned"]["loss"] < evaluation["base"]["loss"]
    base = load_file(locate_model("sprig") / "model.safetensors")
    merged = load_file(tmp_path / "runs/recipe/exports/hf/model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if bool((base[name] != merged[name]).any())}
    assert changed == {name for name in base if "_proj" in name}
